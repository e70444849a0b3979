"""A job waits for free resources and says which. A job that can never get them is refused."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from pipeline.cluster import autoscaler, room
from pipeline.cluster.pool import ActorPool
from pipeline.cluster.ray_internals import placement_groups, state
from pipeline.cluster.room import Cluster, Need, announced, release_orphans, settle, shortage, wants_gpu
from pipeline.config import TrainConfig
from pipeline.errors import InputError
from pipeline.training.checks import check_settings
from pipeline.training.trainer import room_needed, train
from pipeline.training.validation import SpareResources
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.search import _concurrent, _room
from pipeline.tuning.space import load_space, parse_space
from tests.data.common import sent_by_value
from tests.training.digit_runs import settings


@ray.remote
class Holder:
    """Another job that holds CPUs until it is killed."""

    def ready(self) -> None:
        pass


@contextlib.contextmanager
def held(cpus: float) -> Iterator[Callable[[], None]]:
    """Hold CPUs in a `with` block, or until the yielded function is called."""
    holder = Holder.options(num_cpus=cpus).remote()  # type: ignore[attr-defined]
    ray.get(holder.ready.remote())
    released = threading.Event()

    def release() -> None:
        if not released.is_set():
            released.set()
            ray.kill(holder)

    try:
        yield release
    finally:
        release()


@pytest.fixture
def cpus(cluster: None) -> int:
    """The number of CPUs of the cluster, once all are free."""
    total = ray.cluster_resources()["CPU"]
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != total and time.monotonic() < deadline:
        time.sleep(0.1)
    return int(total)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' Ray counts as a joined cluster, so more nodes may join."""
    monkeypatch.setattr(room, "is_own_ray", lambda: False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(room, "PATIENCE_SECONDS", 1.0)


def need(count: int, **each: float) -> Need:
    return Need(count, each, "Nobody", "--workers 4")


def fit(need: Need) -> None:
    """Raise InputError if the need can never be met."""
    settle(need, lambda line: None)


def test_what_is_short_is_named_with_what_there_is(cpus: int) -> None:
    assert shortage(need(cpus, CPU=1)) == ""
    assert shortage(need(cpus + 2, CPU=1)) == f"waiting for {cpus + 2} CPUs, the cluster has {cpus}"
    assert (
        shortage(need(1, CPU=1, GPU=1))
        == f"waiting for 1 CPU and 1 GPU, the cluster has {cpus} CPUs and 0 GPUs"
    )
    with held(cpus - 0.5):
        deadline = time.monotonic() + 20
        while not shortage(need(1, CPU=1)) and time.monotonic() < deadline:
            time.sleep(0.1)  # nodes report their free resources only from time to time
        assert shortage(need(1, CPU=1)) == "waiting for 1 CPU, the cluster has 0.5 free"
        assert shortage(need(1, CPU=0.5)) == ""


def test_small_rooms_are_no_large_one(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_nodes", lambda: [{"CPU": 2.0}, {"CPU": 2.0}])
    monkeypatch.setattr(state, "available_resources_per_node", lambda: {"a": {"CPU": 2.0}, "b": {"CPU": 2.0}})
    assert shortage(need(2, CPU=2)) == ""
    assert shortage(need(2, CPU=1.5)) == ""
    expected = "waiting for room for a process of 3 CPUs, there is room for 0"
    assert shortage(need(1, CPU=3)) == expected


def test_what_can_never_fit_is_refused(cpus: int, joined: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(need(cpus + 2, CPU=1))  # more nodes may join
    with pytest.raises(
        InputError, match=rf"--workers 4: no node of the cluster has {cpus + 1} CPUs, and no auto"
    ):
        fit(need(1, CPU=cpus + 1))
    with pytest.raises(InputError, match="the cluster has no GPU"):
        fit(need(1, CPU=1, GPU=1))
    with monkeypatch.context() as autoscaled:
        autoscaled.setattr(state, "get_max_resources_from_cluster_config", lambda: {"CPU": 64, "GPU": 8})
        fit(need(8, CPU=8, GPU=1))
        with pytest.raises(InputError, match=r"16 CPUs and 16 GPUs are needed.* up to 64 CPUs and 8 GPUs"):
            fit(need(16, CPU=1, GPU=1))
    with monkeypatch.context() as empty:  # no worker node has joined yet
        empty.setattr(ray, "cluster_resources", lambda: {"memory": 1.0})
        empty.setattr(room, "_nodes", lambda: [{"memory": 1.0}])
        fit(need(4, CPU=1))
        assert shortage(need(4, CPU=1)) == "waiting for 4 CPUs, the cluster has 0"


def test_a_ray_of_the_jobs_own_never_grows(cpus: int) -> None:
    fit(need(cpus, CPU=1))
    with pytest.raises(InputError, match=f"{cpus + 2} CPUs are needed, and this machine has {cpus} CPUs"):
        fit(need(cpus + 2, CPU=1))


def test_a_wait_is_said_once_then_now_and_then_and_when_it_changes(
    cluster: None, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "REPEAT_SECONDS", 3.0)
    lines, said = ["one", "two", ""], list[tuple[float, str]]()
    monkeypatch.setattr(room, "shortage", lambda _: lines[0])
    began = time.monotonic()
    with announced(need(1, CPU=1), lambda line: said.append((time.monotonic() - began, line))):
        time.sleep(5.5)
        lines.pop(0)
        time.sleep(1)
        lines.pop(0)
        time.sleep(1)
    assert [line for _, line in said] == ["one", "one", "two"]
    assert said[0][0] >= 1 and said[1][0] - said[0][0] >= 3


def test_a_job_without_a_place_that_is_there_says_so(
    cpus: int, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, mine = list[str](), need(1, CPU=1)
    assert not shortage(mine)
    monkeypatch.setattr(room, "UNPLACED_SECONDS", 0.5)
    with announced(mine, said.append):
        time.sleep(3)
    assert len(said) == 1 and said[0].startswith("waiting for Ray to place a process of 1 CPU: ")


def test_a_job_that_holds_its_places_waits_for_none(cluster: None, cpus: int, quick: None) -> None:
    """Its workers' processes may start long after Ray reserved their places, as on a loaded node."""
    said, mine = list[str](), need(cpus, CPU=1)
    small = placement_group([{"memory": 1024}])  # such a group holds a trial
    ray.get(small.ready())
    group = placement_group([{"CPU": 1}] * cpus)
    ray.get(group.ready())
    try:
        assert shortage(mine)
        with announced(mine, said.append):
            time.sleep(2)
        assert not said
        remove_placement_group(group)
        with held(cpus), announced(mine, said.append):
            time.sleep(2)
        assert said == [f"waiting for {cpus} CPUs, the cluster has 0 free"]
    finally:
        remove_placement_group(small)
        remove_placement_group(group)


@ray.remote(num_cpus=0)
class Controller:
    """Reserves a place, as Ray Train's controller does."""

    def reserve(self) -> str:
        self.group = placement_group([{"CPU": 1}])
        ray.get(self.group.ready())
        return self.group.id.hex()


def test_only_the_places_of_dead_actors_are_released(cpus: int) -> None:
    """The driver of a search makes its trials' groups. One trial's failure must not end the others."""
    drivers, controller = placement_group([{"memory": 1024}]), Controller.remote()  # type: ignore[attr-defined]
    ray.get(drivers.ready())
    reserved = ray.get(controller.reserve.remote())
    try:
        release_orphans()
        assert {drivers.id.hex(), reserved} <= set(placement_groups())
        ray.kill(controller)
        deadline = time.monotonic() + 30
        while not placement_groups()[reserved].creator_actor_dead and time.monotonic() < deadline:
            time.sleep(0.1)
        release_orphans()
        assert drivers.id.hex() in placement_groups() and reserved not in placement_groups()
    finally:
        remove_placement_group(drivers)


@dataclass(frozen=True)
class Same:
    """Returns each number. Its setup takes longer than the delay before a wait is reported."""

    def start(self, device: str) -> Callable[[int], int]:
        time.sleep(3)
        return lambda number: number


def test_a_pool_waits_for_room_and_says_so(
    cpus: int, quick: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with sent_by_value(__name__), held(cpus) as release:
        threading.Timer(5, release).start()
        assert list(ActorPool(gpu=False)(Same(), range(3), "numbers")) == [0, 1, 2]  # type: ignore[arg-type]
    assert capfd.readouterr().err.count("waiting") == 1
    monkeypatch.undo()
    assert list(ActorPool(cpus, gpu=False, cpus=1)(Same(), range(3))) == [0, 1, 2]  # type: ignore[arg-type]
    assert "waiting" not in capfd.readouterr().err  # its own actors hold all CPUs


def test_a_training_waits_for_room_and_says_so(
    home: Path, cpus: int, quick: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """One worker takes all CPUs: several would import what DDP needs, for seconds."""
    with held(cpus) as release:
        threading.Timer(12, release).start()
        train(settings(home, str(home / "waits"), steps=2, cpus_per_worker=cpus))
    out = capfd.readouterr().err
    assert out.count("waiting") == 1
    assert f"train: waiting for {cpus} CPU" in out and ", the cluster has 0 free\n" in out


def test_a_training_that_never_fits_opens_no_run(home: Path, cpus: int) -> None:
    output = home / "never"
    with pytest.raises(InputError, match=rf"--workers {cpus + 1} .*this machine has {cpus} CPUs"):
        train(settings(home, str(output), workers=cpus + 1))
    assert not output.exists()


def test_an_elastic_run_needs_its_least_workers_alone() -> None:
    config = TrainConfig(data="", output="", workers=4)
    there = Cluster([{"CPU": 8.0, "GPU": 2.0}])
    assert room_needed(config, gpu=False).each == {"CPU": 1.0}
    assert not wants_gpu(None, room_needed(config, gpu=True), there)
    elastic = room_needed(replace(config, min_workers=2), gpu=True)
    assert (elastic.count, elastic.each) == (2, {"CPU": 1.0, "GPU": 1.0})
    assert wants_gpu(None, elastic, there)


def test_a_search_waits_for_a_trials_workers_where_nodes_may_join(
    cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, space = TuneConfig(data="", output="", workers=cpus + 1, trials=3), load_space()
    with pytest.raises(InputError, match=rf"--workers {cpus + 1} .*this machine has {cpus} CPUs"):
        _room(config, space)
    monkeypatch.setattr(room, "is_own_ray", lambda: False)
    gpu, trial = _room(config, space)
    assert not gpu and _concurrent(config, trial) == 1
    with pytest.raises(InputError, match="no node of the cluster has 99 CPUs"):
        _room(replace(config, cpus_per_worker=99), space)


def test_a_validation_gets_what_is_left_when_it_starts(cpus: int) -> None:
    spare = SpareResources(TrainConfig(data="", output="", workers=cpus - 1), gpu=False)
    assert {**spare} == {"num_cpus": 1, "num_gpus": 0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    with held(cpus):
        deadline = time.monotonic() + 20
        while spare["num_cpus"] and time.monotonic() < deadline:
            time.sleep(0.1)
        assert spare["num_cpus"] == 0
    assert SpareResources(TrainConfig(data="", output="", workers=cpus), gpu=False)["num_cpus"] == 0


@pytest.mark.parametrize(
    ("share", "gpu", "each", "trials"),
    [
        (1.0, {}, {"CPU": 0.25, "GPU": 1.0}, 2),
        (0.5, {}, {"CPU": 0.25, "GPU": 0.5}, 4),
        (0.3, {}, {"CPU": 0.25, "GPU": 0.3}, 6),  # three per GPU, since no trial can use parts of two GPUs
        (0.5, {"gpu": False}, {"CPU": 0.25}, 16),
    ],
)
def test_trials_are_counted_by_gpus_and_shares_of_them(
    monkeypatch: pytest.MonkeyPatch, share: float, gpu: dict[str, bool], each: dict[str, float], trials: int
) -> None:
    monkeypatch.setattr(room, "look", lambda: Cluster([{"CPU": 4.0, "GPU": 2.0}]))
    config = TuneConfig("d", "o", trials=20, cpus_per_worker=0.25, gpus_per_worker=share)
    space = parse_space({"schedule": ["cosine", "linear"], **gpu})
    gpu, trial = _room(config, space)
    assert trial.each == each and gpu == ("GPU" in each)
    assert _concurrent(config, trial) == trials


def test_as_many_trials_run_as_an_autoscaler_can_give_room_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscaler, "_known", {})
    monkeypatch.setattr(autoscaler, "_could", lambda bundles: len(bundles) <= 11)
    config = TuneConfig("d", "o", trials=20, workers=2)
    trial = Need(2, {"CPU": 1.0, "GPU": 1.0}, "", "")
    for growth, trials in (("none", 1), ("silent", 20), ("answers", 5)):
        monkeypatch.setattr(room, "look", lambda growth=growth: Cluster([{"memory": 1.0}], growth))
        assert _concurrent(config, trial) == trials
    assert _concurrent(replace(config, concurrent=3), trial) == 3


def test_workers_of_one_run_share_no_gpu() -> None:
    check_settings(TrainConfig("d", "o", gpus_per_worker=0.5))
    with pytest.raises(InputError, match=r"--gpus-per-worker 0.5 with --workers 2: NCCL can't connect two"):
        check_settings(TrainConfig("d", "o", gpus_per_worker=0.5, workers=2))
