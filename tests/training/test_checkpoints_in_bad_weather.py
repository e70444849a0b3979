"""Checkpoints on failing storage: one that can't be read now isn't damaged, and no intact one is given up."""

import errno
import json
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import patience, storage
from pipeline.errors import InputError
from pipeline.training import checkpoint, checkpoint_manager
from pipeline.training.checkpoint_manager import SNAPSHOT, UNVALIDATED, Checkpoint, mend, newest_whole, sweep
from pipeline.training.state import new_state
from tests.data.weather import FAULTS, Weather
from tests.training.common import problem, start_ranks


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.05)


def at_once(do: Callable[[], Any], what: str) -> Any:
    return do()


def write(folder: str, *steps: int) -> list[str]:
    """Write checkpoints of these steps and return their folders."""
    state = new_state(*problem(), torch.device("cpu"))
    written = []
    for step in steps:
        state.step = step
        written.append(storage.join(folder, checkpoint.new_name(step)))
        checkpoint.write(written[-1], checkpoint.capture(state), {})
    return written


def find(folder: str, seconds: float = 30.0) -> tuple[str, int, list[str]]:
    """Return the newest whole checkpoint, its step, and the lines printed meanwhile."""
    said: list[str] = []
    patient = partial(patience.patiently, seconds=seconds, say=said.append)
    found = newest_whole(folder, checkpoint.read_model, patient, said.append)
    assert found is not None
    return found[0], found[1][1], said


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
def test_an_outage_while_a_checkpoint_is_read_is_waited_for(bucket: str, weather: Weather, kind: str) -> None:
    _, newest = write(bucket, 3, 6)
    weather.storm(kind, 1.0, lambda method, path: "safetensors" in path)
    uri, step, said = find(bucket)
    assert weather.seen
    assert (uri, step) == (newest, 6)
    assert all("can't be read" in line and "trying again" in line for line in said)
    assert not any("passed over" in line for line in said)


@pytest.mark.parametrize("kind", FAULTS)
def test_an_outage_while_checkpoints_are_listed_is_waited_for(
    bucket: str, weather: Weather, kind: str
) -> None:
    newest = write(bucket, 3, 6)[-1]
    weather.storm(kind, 1.0, lambda method, path: "list-type" in path)
    assert find(bucket)[:2] == (newest, 6)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle"), TimeoutError("timed out"),
        PermissionError(errno.EACCES, "Permission denied"), ConnectionResetError("reset by peer"),
    ],
    ids=lambda error: type(error).__name__ + str(error.errno),
)  # fmt: skip
def test_a_storage_that_stays_away_ends_the_run_in_one_line_and_loses_nothing(
    tmp_path: Path, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(str(tmp_path), 3, 6)
    before = sorted(tmp_path.rglob("*"))

    def fail(uri: str) -> bytes:
        raise error

    monkeypatch.setattr(storage, "read_bytes", fail)
    with pytest.raises(InputError, match=r"checkpoints in \S+ can't be read, for \d+ s now: \S") as raised:
        find(str(tmp_path), 0.2)
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damage_is_passed_over_and_damage_of_all_of_them_stops_the_run(tmp_path: Path, damage: str) -> None:
    older, newer = write(str(tmp_path), 3, 6)

    def spoil(uri: str) -> None:
        file = Path(uri) / checkpoint.average_file(0)
        file.write_bytes(file.read_bytes()[:-1]) if damage == "cut" else file.unlink()

    spoil(newer)
    uri, step, said = find(str(tmp_path))
    assert (uri, step) == (older, 3)
    assert [line for line in said if Path(newer).name in line and "passed over" in line]
    spoil(older)
    with pytest.raises(InputError, match=r"all 2 checkpoints in .* are damaged"):
        find(str(tmp_path))


def test_where_none_was_ever_whole_a_run_begins(tmp_path: Path) -> None:
    assert newest_whole(str(tmp_path / "none"), checkpoint.fetch, at_once, print) is None
    half = Path(write(str(tmp_path), 3)[0])
    (half / checkpoint.STATE).unlink()
    assert newest_whole(str(tmp_path), checkpoint.fetch, at_once, print) is None


def test_only_what_a_run_wrote_is_swept(tmp_path: Path) -> None:
    first, _, third = write(str(tmp_path), 3, 6, 9)
    (tmp_path / "step-by-step").mkdir()
    (tmp_path / "step-000000003-mine").mkdir()
    half = tmp_path / checkpoint.new_name(12)
    half.mkdir()
    sweep(str(tmp_path), [Checkpoint(first)])
    left = {first, third, str(tmp_path / "step-by-step"), str(tmp_path / "step-000000003-mine")}
    assert set(map(str, tmp_path.iterdir())) == left


def test_a_sweep_during_an_outage_says_so(bucket: str, weather: Weather) -> None:
    first, second = write(bucket, 3, 6)
    listed: list[str] = []

    def one_of_the_folder(method: str, path: str) -> bool:
        """Choose the listings of the folder after the first, which only finds the newest checkpoint."""
        if "list-type" in path:
            listed.append(path)
        return len(listed) > 1 and "list-type" in path

    weather.storm("expired", 1.0, one_of_the_folder)
    said: list[str] = []
    patience.patiently(lambda: sweep(bucket, []), "can't be removed", 30, said.append)
    assert weather.seen and len(said) == 1 and "can't be removed" in said[0]
    assert storage.list_folders(bucket, "step-") == [second]
    assert not storage.exists(first)


def entry(name: str, score: float | None) -> dict[str, Any]:
    return {"version": 0, "checkpoint_dir_name": name, "metrics": {"step": 1, "bits_per_dim": score}}


def snapshot(*names: str) -> dict[str, Any]:
    """Return Ray Train's snapshot file with these checkpoints."""
    import ray

    return {
        "ray_version": ray.__version__,
        "checkpoint_results": [entry(name, UNVALIDATED) for name in names],
        "checkpoint_report_indices": list(range(len(names))),
        "latest_checkpoint_result": entry(names[-1], UNVALIDATED),
        "pending_training_results": [entry(names[-1], UNVALIDATED)],
        "pending_validation_specs": [{"fn_kwargs": {"step": 1}}],
        "current_report_index": len(names),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "as it was": lambda s: None,
    "a score that is null": lambda s: s["checkpoint_results"][0]["metrics"].update(bits_per_dim=None),
    "a pending score that is null": lambda s: s["pending_training_results"][0]["metrics"].update(bits_per_dim=None),
    "no score": lambda s: s["checkpoint_results"][0]["metrics"].pop("bits_per_dim"),
    "latest is not listed": lambda s: s.update(latest_checkpoint_result=entry("step-9", 1.0)),
    "pending is not listed": lambda s: s.update(pending_training_results=[entry("step-9", 1.0)]),
    "validated is not listed": lambda s: s.update(validated_checkpoint_dir_names=["step-9"]),
    "an index too few": lambda s: s["checkpoint_report_indices"].pop(),
    "listed twice": lambda s: s["checkpoint_results"].append(s["checkpoint_results"][0]),
    "another Ray": lambda s: s.update(ray_version="2.0"),
    "a folder that is gone": lambda s: s["checkpoint_results"][0].update(checkpoint_dir_name="step-9"),
    "a key that is gone": lambda s: s.pop("pending_validation_specs"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_rays_list_is_dropped_where_ray_could_not_use_it(tmp_path: Path, damage: str) -> None:
    for name in ("step-1", "step-2"):
        (tmp_path / name).mkdir()
    content = snapshot("step-1", "step-2")
    DAMAGES[damage](content)
    file = tmp_path / SNAPSHOT
    file.write_text(json.dumps(content))
    mend(str(tmp_path), at_once)
    assert file.exists() is (damage == "as it was")


def test_rays_list_outlives_a_storage_that_can_not_be_asked(bucket: str, weather: Weather) -> None:
    for name in ("step-1", "step-2"):
        storage.write_atomic(f"{bucket}/{name}/{checkpoint.STATE}", b"")
    storage.write_atomic(f"{bucket}/{SNAPSHOT}", json.dumps(snapshot("step-1", "step-2")).encode())
    weather.storm("expired", 1.0, lambda method, path: "step-1" in path)
    said: list[str] = []
    mend(bucket, partial(patience.patiently, seconds=30, say=said.append))
    assert storage.exists(f"{bucket}/{SNAPSHOT}")
    assert len(said) == 1


class Silent:
    """A run channel without a listener."""

    class notice:
        remote = staticmethod(print)


@pytest.mark.slow
def test_one_copy_at_most_is_held_for_a_slow_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """As in Ray Train, one thread calls the upload functions with a delay, and they stay referenced afterwards.

    Every fifth report is dropped.
    """
    kept: list[Any] = []
    copies: list[weakref.ref[checkpoint.Saved]] = []
    pool = ThreadPoolExecutor(1)

    def capture() -> checkpoint.Saved:
        saved = checkpoint.capture(state)
        copies.append(weakref.ref(saved))
        return saved

    def held() -> int:
        return sum(copy() is not None for copy in copies)

    def report(target: Any, step: int, upload: Any, mode: Any) -> bool:
        if upload is not None and step % 5 != 0:
            kept.append(upload)
            pool.submit(time.sleep, 0.1)
            pool.submit(upload, None, target)
        return step % 5 != 0

    gate = threading.Event()
    request.addfinalizer(gate.set)  # Python waits for the pool at its end

    def slowly(do: Callable[[], Any], what: str) -> Any:
        gate.wait()
        return do()

    monkeypatch.setattr(checkpoint_manager, "WAIT_SECONDS", 0.05)
    state, cpu = new_state(*problem(), torch.device("cpu")), torch.device("cpu")
    manager = checkpoint_manager.CheckpointManager(str(tmp_path), 0, cpu, Silent, slowly, lambda step: False)
    monkeypatch.setattr(manager, "_report", report)
    monkeypatch.setattr(manager, "_registered_as", lambda name: name)
    taken = []
    for step in range(1, 25):
        state.step = step
        taken.append(manager.save(capture, step, {}, needed=step == 24))
        assert held() <= 1
        if step == 8:
            gate.set()
    manager.flush()
    written = checkpoint.complete(str(tmp_path))
    assert len(written) == sum(taken)
    assert taken[0]
    assert not any(taken[1:7])  # while the first checkpoint is being written
    assert not any(taken[4::5])
    assert checkpoint.read_model(written[0])[1] == 24
    assert held() == 0 and len(copies) >= sum(taken)
    pool.shutdown()


@pytest.mark.slow
def test_the_bytes_of_a_checkpoint_reach_another_worker(tmp_path: Path) -> None:
    """Two processes exchange them over gloo."""
    start_ranks(_broadcast, (str(tmp_path / "rendezvous"),), 2)


def _broadcast(rank: int, place: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{place}", rank=rank, world_size=2)
    manager = checkpoint_manager.CheckpointManager(
        "", rank, torch.device("cpu"), None, at_once, lambda step: False
    )
    for size in (0, 1, checkpoint_manager.BROADCAST_BYTES + 5):
        data = np.random.default_rng(size).bytes(size)
        assert manager._bytes_to_all(data if rank == 0 else None, size) == data
    torch.distributed.destroy_process_group()
