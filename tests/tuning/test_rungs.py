"""The exchange between a trial and its workers: each question gets its answer, whichever process dies meanwhile."""

from typing import Any

import pytest
import ray

from pipeline.tuning.ledger import Rung
from pipeline.tuning.rungs import open_exchange

RUNG = Rung(images=100, step=10, time=0.0, metrics={"a": 1.0})


@pytest.fixture
def exchange(cluster: None) -> Any:
    return open_exchange()


def die(exchange: Any) -> None:
    ray.kill(exchange, no_restart=False)


def answered(question: Any) -> bool:
    """Wait for the answer that a worker gets."""
    return bool(ray.get(question, timeout=60))


def asked(exchange: Any) -> Rung:
    for _ in range(60):
        if (rung := ray.get(exchange.next.remote(1.0), timeout=60)) is not None:
            return rung  # type: ignore[no-any-return]
    pytest.fail("the question is not heard")


def answer_if_asked(exchange: Any, question: Any, go_on: bool) -> None:
    """Answer as often as it is asked, as a trial does, until the worker has its answer."""
    while not ray.wait([question], timeout=0)[0]:
        if ray.get(exchange.next.remote(0.2), timeout=60) is not None:
            ray.get(exchange.answer.remote(RUNG.step, go_on), timeout=60)
            ray.get(exchange.answer.remote(RUNG.step, not go_on), timeout=60)  # the first answer counts


@pytest.mark.parametrize("go_on", [True, False])
def test_a_question_survives_the_process_that_holds_it(exchange: Any, go_on: bool) -> None:
    question = exchange.ask.remote(RUNG)
    assert asked(exchange) == RUNG
    die(exchange)  # after the trial got the question
    ray.get(exchange.answer.remote(RUNG.step, go_on), timeout=60)
    answer_if_asked(exchange, question, go_on)  # the first answer may have reached the dying process
    assert answered(question) is go_on
    assert ray.get(exchange.next.remote(0.1), timeout=60) is None  # no question is open


def test_a_question_is_heard_after_a_death_before_and_a_lost_answer_is_asked_for_again(exchange: Any) -> None:
    question = exchange.ask.remote(RUNG)
    die(exchange)
    assert asked(exchange) == RUNG
    ray.get(exchange.answer.remote(RUNG.step, True), timeout=60)
    assert answered(question) is True
    die(exchange)
    again = exchange.ask.remote(RUNG)  # a restarted worker asks again
    # The dying process may still know the answer. Its successor has to ask the trial.
    answer_if_asked(exchange, again, True)
    assert answered(again) is True
