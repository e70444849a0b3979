"""The digest of samples seen, and averages that a stop doesn't disturb."""

import numpy as np
import pytest
import torch

from pipeline.data.batch import Batch
from pipeline.errors import InputError
from pipeline.training.meter import Meter, samples_digest
from pipeline.training.step import Outcome
from tests.training.common import problem


def digest(*pairs: tuple[int, int]) -> int:
    epochs, ids = np.array(pairs, np.int64).reshape(-1, 2).T
    return samples_digest(epochs, ids)


def test_the_hash_is_splitmix64() -> None:
    # The first outputs of the published generator from seed 0 (Vigna, splitmix64.c).
    assert [digest((0, i)) for i in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_the_digest_is_of_a_multiset() -> None:
    assert digest((0, 1), (0, 2), (1, 1)) == digest((1, 1), (0, 1), (0, 2))
    assert digest((0, 1), (0, 2)) == (digest((0, 1)) + digest((0, 2))) % 2**64
    assert (
        len({digest(), digest((0, 1)), digest((0, 1), (0, 1)), digest((1, 0)), digest((0, 1), (0, 2))}) == 5
    )


def batch(count: int, bad: int = 0) -> Batch:
    ids = torch.arange(count)
    return Batch(
        torch.zeros(count, 1, 8, 8),
        ids,
        ids,
        torch.zeros_like(ids),
        torch.ones(count),
        {f"x{i}": "bad" for i in range(bad)},
    )


def outcome(of: Batch, loss: float = 1.0, norm: float = 1.0) -> Outcome:
    return Outcome(
        1, of, torch.tensor(loss), torch.tensor(norm), torch.tensor(True), of.ids, torch.zeros(len(of.ids))
    )


def test_an_interval_that_a_stop_cut_in_two_has_the_same_averages() -> None:
    config, _ = problem()
    whole, head, tail = (Meter(config, 1, torch.device("cpu")) for _ in range(3))
    for i, meter in enumerate((head, head, tail)):
        for m in (whole, meter):
            if m is tail and i == 2:
                tail.restore(head.state(), 0)
            m.add(outcome(batch(10), loss=0.1 * i + 1 / 3, norm=float(i)), 0.0)
    assert whole.state() == tail.state()
    a, b = whole.read(0.1), tail.read(0.1)
    assert {k: a[k] for k in ("loss", "gradient_norm")} == {k: b[k] for k in ("loss", "gradient_norm")}


def test_too_many_undecodable_images_stop_the_run() -> None:
    meter = Meter(problem()[0], 1, torch.device("cpu"))
    meter.add(outcome(batch(99, 50)), 0.0)
    with pytest.raises(InputError, match="could not be decoded"):
        meter.add(outcome(batch(10)), 0.0)


@pytest.mark.parametrize(("share", "stops"), [(0.002, 0), (0.02, 40)])
def test_chance_stops_no_run_and_what_is_worse_than_allowed_stops_every_one(share: float, stops: int) -> None:
    """Each of forty workers sees 40,000 images, of which `share` is bad. One hundredth is allowed."""
    rng, stopped = np.random.default_rng(0), 0
    for _ in range(40):
        meter = Meter(problem()[0], 1, torch.device("cpu"))
        try:
            for bad in rng.binomial(100, share, 400):
                meter.add(outcome(batch(100, int(bad))), 0.0)
        except InputError:
            stopped += 1
    assert stopped == stops


def test_what_no_worker_sees_alone_is_seen_in_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(problem()[0], 1, torch.device("cpu"))
    meter.add(outcome(batch(400, 12)), 0.0)
    monkeypatch.setattr(Meter, "_total", lambda _, *values: [16.0 * float(value) for value in values])
    with pytest.raises(InputError, match="192 of 6400 images"):
        meter.read(0.1)
