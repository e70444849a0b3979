"""Decisions that depend on what an autoscaler can add. tests/system/test_growing.py asks a real autoscaler."""

import json
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

from pipeline.cluster import autoscaler, room
from pipeline.cluster.autoscaler import Bundle, Shape, adds_nodes, answer, most
from pipeline.cluster.room import Cluster, Need, choose_gpu, refusal, wants_gpu
from pipeline.errors import InputError

HEAD: Bundle = {"memory": 1.0}
CPUS: Bundle = {"CPU": 4.0}
GPU: Bundle = {"CPU": 4.0, "GPU": 1.0}


def need(gpu: bool, count: int = 2, cpus: float = 2.0) -> Need:
    each = {"CPU": cpus, "GPU": 1.0} if gpu else {"CPU": cpus}
    return Need(count, each, "Nobody", f"--workers {count}{' --gpu' * gpu}")


@pytest.mark.parametrize(
    ("asked", "nodes", "growth", "gpu"),
    [
        (None, [GPU, GPU], "none", True),
        (None, [GPU], "none", False),  # one GPU for two workers is too few
        (None, [CPUS, CPUS], "none", False),
        (None, [HEAD], "none", False),
        (None, [HEAD], "answers", True),  # no worker node is up: the autoscaler may add GPUs
        (None, [HEAD, CPUS, CPUS], "answers", True),
        (None, [GPU], "answers", True),
        (None, [GPU], "silent", True),
        (False, [GPU, GPU], "answers", False),
        (True, [HEAD], "none", True),
        (True, [HEAD], "silent", True),
    ],
)
def test_gpus_are_taken_where_they_are_or_may_come(
    asked: bool | None, nodes: list[Bundle], growth: autoscaler.Growth, gpu: bool
) -> None:
    assert wants_gpu(asked, need(True), Cluster(nodes, growth)) is gpu


def test_where_only_the_user_can_know_what_may_come_he_is_asked() -> None:
    with pytest.raises(InputError, match="--gpu True to wait for GPUs, --gpu False to use CPUs"):
        wants_gpu(None, need(True), Cluster([HEAD, CPUS], "silent"))


@pytest.mark.parametrize(
    ("wanted", "cluster", "lack"),
    [
        (need(True), Cluster([HEAD, CPUS], "answers"), ""),
        (need(True), Cluster([HEAD, CPUS], "silent"), ""),
        (need(True), Cluster([HEAD, CPUS]), "the cluster has no GPU, and no autoscaler adds one"),
        (need(True), Cluster([HEAD]), ""),  # the nodes may not have joined yet
        (
            need(False, cpus=8),
            Cluster([HEAD, CPUS]),
            "no node of the cluster has 8 CPUs, and no autoscaler adds one",
        ),
        (need(False, cpus=8), Cluster([HEAD, CPUS], "answers"), ""),
        (need(False, count=3, cpus=4), Cluster([CPUS, CPUS]), ""),  # more nodes may join
        (
            need(False, count=3, cpus=4),
            Cluster([CPUS, CPUS], own=True),
            "12 CPUs are needed, and this machine has 8 CPUs",
        ),
        (
            need(True, count=16),
            Cluster([HEAD], "answers", {"CPU": 64, "GPU": 8}),
            "32 CPUs and 16 GPUs are needed, and the autoscaler adds nodes up to 64 CPUs and 8 GPUs",
        ),
    ],
)
def test_what_can_never_be_is_known_without_asking_where_it_can_be(
    wanted: Need, cluster: Cluster, lack: str
) -> None:
    assert refusal(wanted, cluster) == lack


@pytest.mark.parametrize(
    ("asked", "brings", "gpu", "said"),
    [
        (None, [{"CPU": 2.0, "GPU": 1.0}], True, 0),
        (None, [{"CPU": 2.0}], False, 1),  # the job says that it takes CPUs
        (None, [], None, 1),
        (True, [{"CPU": 2.0}], None, 0),
        (False, [{"CPU": 2.0}], False, 0),
    ],
)
def test_cpus_are_taken_where_no_gpu_can_come_and_no_silence_is_kept_about_it(
    monkeypatch: pytest.MonkeyPatch, asked: bool | None, brings: list[Bundle], gpu: bool | None, said: int
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(room, "look", lambda: Cluster([HEAD], "answers"))
    monkeypatch.setattr(room, "_nodes", lambda: [HEAD])
    monkeypatch.setattr(autoscaler, "bring", lambda bundles, arrived: bundles[0] in brings)
    if gpu is None:
        with pytest.raises(InputError, match="are more than the autoscaler can bring"):
            choose_gpu(asked, need, lines.append)
    else:
        assert choose_gpu(asked, need, lines.append) is gpu
    assert len(lines) == said
    assert all(line.endswith("on CPUs") for line in lines)


def status(asked: list[Counter[Shape]], refused: list[Counter[Shape]], version: int, seen: int) -> object:
    """Build Ray's reply with these requests, refusals and versions."""
    reply = GetClusterStatusReply()
    reply.cluster_resource_state.cluster_resource_state_version = version
    reply.autoscaling_state.last_seen_cluster_resource_state_version = seen
    for bundles, where in (
        (asked, reply.cluster_resource_state.cluster_resource_constraints),
        (refused, reply.autoscaling_state.infeasible_cluster_resource_constraints),
    ):
        for one in bundles:
            constraint = where.add()
            for shape, count in one.items():
                entry = constraint.resource_requests.add()
                entry.count = count
                entry.request.resources_bundle.update(dict(shape))
    return reply


MINE: Counter[Shape] = Counter({frozenset(GPU.items()): 2})
OTHERS: Counter[Shape] = Counter({frozenset(CPUS.items()): 100})


@pytest.mark.parametrize(
    ("refused", "seen", "said"),
    [
        ([], 8, "unheard"),
        ([], 9, "can"),
        ([MINE], 9, "never"),
        ([MINE + OTHERS], 9, "crowded"),
        ([OTHERS], 8, "unheard"),
    ],
)
def test_an_autoscalers_answer_is_to_the_sum_of_all_requests(
    refused: list[Counter[Shape]], seen: int, said: autoscaler.Answer
) -> None:
    assert answer(status([MINE], refused, 9, seen), MINE, since=9) == said


@pytest.mark.parametrize(
    ("answers", "joined_after", "brought"),
    [
        (["unheard", "can", "can", "can"], 3, True),
        (["unheard", "never"], 9, False),
        (["unheard", *["crowded"] * 40], 99, True),  # then the job's own processes ask
        (["crowded"] * 20 + ["never"], 99, False),
    ],
)
def test_what_is_asked_for_is_waited_for_unless_it_never_comes_and_then_let_go(
    monkeypatch: pytest.MonkeyPatch, answers: list[autoscaler.Answer], joined_after: int, brought: bool
) -> None:
    rounds, closed = list[int](), list[bool]()

    def asking(bundles: list[Bundle]) -> Iterator[autoscaler.Answer]:
        try:
            yield from answers
        finally:
            closed.append(True)

    monkeypatch.setattr(autoscaler, "_answers", asking)
    assert autoscaler.bring([GPU], lambda: rounds.append(1) or len(rounds) > joined_after) is brought
    assert closed == [True]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers that `most` asks for, of an autoscaler that can add 5 of any shape."""
    numbers: list[int] = []
    monkeypatch.setattr(autoscaler, "_known", {})
    monkeypatch.setattr(
        autoscaler, "_could", lambda bundles: numbers.append(len(bundles)) or len(bundles) <= 5
    )
    yield numbers


def test_the_most_that_may_come_is_found_and_remembered(asked: list[int]) -> None:
    assert most(GPU, 3, 0) == 3
    assert asked == [3]
    assert most(GPU, 2, 0) == 2 and asked == [3]
    assert most(GPU, 64, 0) == 5
    assert len(asked) < 9
    asked.clear()
    assert most(GPU, 5000, 0) == 5 and most(GPU, 4, 0) == 4 and asked == []
    assert most(GPU, 8, 7) == 7  # somebody added more nodes by hand


def test_nothing_is_asked_for_that_is_there(asked: list[int]) -> None:
    assert most(GPU, 4, 6) == 4
    assert asked == []


def test_without_an_answer_what_is_there_is_sure(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscaler, "_could", lambda bundles: None)
    assert most(GPU, 64, 2) == 2
    assert autoscaler._known == {frozenset(GPU.items()): (2, sys.maxsize)}


@pytest.mark.parametrize(
    ("types", "adds"),
    [
        ({"ray.head.default": 1}, True),
        ({"headgroup": 1, "gpu": 2}, True),
        ({"node_" + "f" * 56: 1, "node_" + "a" * 56: 1}, False),
        ({}, False),
    ],
)
def test_a_cluster_with_types_of_nodes_has_an_autoscaler(types: dict[str, int], adds: bool) -> None:
    report = {"autoscaler_report": {"active_nodes": types, "idle_nodes": None}}
    assert adds_nodes(json.dumps(report).encode()) is adds
    assert not adds_nodes(None)
