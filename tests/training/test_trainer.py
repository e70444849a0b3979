"""Whole Ray Train runs: object storage, validation, resumes, bad steps, full disks, disks that others can't see."""

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch

from pipeline import display, storage
from pipeline.config import OptimizerConfig
from pipeline.errors import InputError
from pipeline.lock import LeaseLost
from pipeline.models.export import load_model
from pipeline.models.snapshots import parse_snapshot
from pipeline.tracking import RUN_FILE, registry, runs
from pipeline.tracking.tracker import Tracker
from pipeline.training import checkpoint, trainer
from pipeline.training.trainer import train
from pipeline.training.worker import Hooks
from tests.jobs.common import ROOT
from tests.training.digit_runs import BATCH, ROWS, assert_same, curve, newest, settings
from tests.training.runs import Undisturbed
from tests.training.test_loop import epochs_digest
from tests.training.test_runs_in_bad_weather import Slow


class Reports(ray.train.UserCallback):
    """Writes the step of each report with a checkpoint to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        with self._path.open("a") as file:
            print(metrics[0]["step"], file=file)


def test_a_run_whose_driver_was_killed_before_it_logged_its_settings_has_them_after_a_resume(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(home, str(home / "unlogged"), steps=2)

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Tracker, "log_params", die)
        train(config)
    client = runs.open_client()
    run_id = json.loads((home / "unlogged" / RUN_FILE).read_text())["run_id"]
    assert not client.get_run(run_id).data.params
    assert train(dataclasses.replace(config, resume=True)).run.id == run_id
    mine = client.get_run(run_id)
    assert mine.data.params["batch_size"] == str(BATCH)
    assert [entry.dataset.name for entry in mine.inputs.dataset_inputs] == ["digits"]
    assert "config.yaml" in [file.path for file in client.list_artifacts(run_id)]
    # A resume with other settings changes none of it. It logs before it starts Ray Train.
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer, "_train", die)
        train(dataclasses.replace(config, resume=True, steps=4))
    again = client.get_run(run_id)
    assert (again.data.params, len(again.inputs.dataset_inputs)) == (mine.data.params, 1)


def test_a_run_on_object_storage_resumes_bitwise_with_one_curve(
    home: Path,
    straight: Undisturbed,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(display, "PHASE_SECONDS", 0.0)
    output, points = f"{bucket}/digits", list[tuple[int, dict[str, float]]]()
    config = settings(
        home, output, validate_every=2, validation_images=16, validation_terms=4, resume=True
    )  # no run exists yet, but a retried job passes --resume anyway
    train(
        dataclasses.replace(config, steps=10),
        callbacks=[Reports(home / "reports")],
        on_point=lambda step, values: points.append((step, values)),
    )
    assert (home / "reports").read_text().split() == ["3", "6", "9", "10"]
    assert [step for step, values in points if "bits_per_dim" in values] == [6, 10]
    shown = capfd.readouterr().err
    phases = (
        "opening the MLflow run",
        "MLflow run '",
        "starting ",
        "making the first steps",
        "10/10 steps",
        "writing the model",
    )
    places = [shown.index(f"train: {phase}") for phase in phases]
    assert places == sorted(places), shown
    assert re.search(r"train: 10/10 steps  loss \d.* bits/dim at step 10\n", shown), shown

    trained = train(config)
    assert set(curve(trained, "bits_per_dim")) == {6, 10, 12, 18}
    assert curve(trained, "loss").items() >= {s: v for s, v in straight.losses.items() if s != 12}.items()
    found = runs.open_client().search_runs(["1"], filter_string=f"tags.`ray_ddpm.output` = '{output}'")
    assert [run.info.run_id for run in found] == [trained.run.id]

    mine, state = newest(output)
    assert len(mine.averages) == 2
    assert_same(mine, straight.end)
    assert int(mine.timestep_sampler["count"].sum()) > 0
    assert state["run_id"] == trained.run.id
    assert state["position"] == {"samples": ROWS, "epoch": 1, "row": 0}
    assert state["seen"] == {"samples": ROWS, "digest": epochs_digest(1, ROWS), "undecodable": 0}

    steps = [checkpoint._read_state(uri)["step"] for uri in checkpoint.complete(f"{output}/checkpoints")]
    bits = curve(trained, "bits_per_dim")
    assert steps == sorted({18, *sorted(bits, key=lambda step: bits[step])[:2]}, reverse=True)
    best = json.loads(storage.read_bytes(f"{output}/best/config.json"))["provenance"]
    assert (best["steps"], best["bits_per_dim"]) == min(bits.items(), key=lambda item: item[1])
    assert trained.model == f"{output}/model"
    assert load_model(registry.resolve_model(trained.model)[0])[1].provenance["steps"] == 18
    artifacts = runs.open_client().list_artifacts(trained.run.id, "samples")
    assert [artifact.path for artifact in artifacts] == [
        f"samples/step-{step:09d}.png" for step in (6, 10, 12, 18)
    ]


def test_one_driver_at_a_time_trains_an_output_and_one_that_lost_its_lease_stops(
    home: Path, straight: Undisturbed, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = f"{bucket}/leased"
    averages = OptimizerConfig(ema_decays=(0.9,), ema_lengths=(0.1,), warmup_steps=5)
    config = settings(home, output, resume=True, optimizer=averages)
    refusals = list[str]()

    def disturb(step: int, values: dict[str, float]) -> None:
        if step == 4:
            with pytest.raises(InputError, match="is being written by process") as refused:
                train(config)
            refusals.append(str(refused.value))
            # Another driver takes over after this one was silent for too long.
            monkeypatch.setattr("pipeline.lock.RENEW_SECONDS", 0.1)
            storage.write_atomic(f"{output}/lock.json", b'{"owner": "another"}')

    monkeypatch.setattr("pipeline.lock.RENEW_SECONDS", 0.5)
    with pytest.raises(LeaseLost, match="taken over by another driver"):
        # Slow steps, since it writes checkpoints until it notices.
        train(dataclasses.replace(config, steps=100_000), on_point=disturb, hooks=Hooks(watch=Slow(0.1)))
    assert len(refusals) == 1
    for thread in threading.enumerate():
        if thread.name == "train":
            thread.join(120)
    assert storage.read_bytes(f"{output}/lock.json") == b'{"owner": "another"}'
    storage.remove(f"{output}/lock.json")
    (run,) = runs.open_client().search_runs(["1"], filter_string=f"tags.`ray_ddpm.output` = '{output}'")
    assert run.info.status == "RUNNING"  # it belongs to the other driver now
    taken_over = newest(output)[0].step
    end = taken_over // 4 * 4 + 8
    trained = train(dataclasses.replace(config, steps=end))
    assert trained.run.id == run.info.run_id
    losses = curve(trained, "loss")
    # The first driver must not log points that it got after the takeover, so these may be missing.
    assert {*range(4, end + 1, 4)} - losses.keys() <= {*range(8, taken_over + 1, 4)}
    assert all(losses[step] == straight.losses[step] for step in losses if step <= min(end, 16))
    # Snapshots outlive checkpoints, of which only two are kept.
    snapshots = map(parse_snapshot, map(storage.name, storage.list_files(f"{output}/snapshots")))
    assert {one.step for one in snapshots if one and one.sigma_rel == 0.1} >= {*range(3, end + 1, 3), end}
    assert len(checkpoint.complete(f"{output}/checkpoints")) == 2


def test_a_non_finite_step_stops_the_run_and_keeps_its_samples(home: Path) -> None:
    output = str(home / "overflow")
    wild = OptimizerConfig(learning_rate=1e38, warmup_steps=1)
    with pytest.raises(InputError, match=r"step \d+: .*not finite.*--skip-nonfinite"):
        train(settings(home, output, checkpoint_every=1, optimizer=wild))
    (file,) = (Path(output) / "nonfinite").iterdir()
    record = json.loads(file.read_text())
    assert len({sample["id"] for sample in record["samples"]}) == BATCH
    saved, _ = newest(output)
    assert saved.step == record["step"] - 1
    run_id = json.loads((Path(output) / "run.json").read_text())["run_id"]
    client = runs.open_client()
    assert client.get_run(run_id).info.status == "FAILED"
    assert [a.path for a in client.list_artifacts(run_id, "nonfinite")] == [f"nonfinite/{file.name}"]


@pytest.fixture
def disk(home: Path, straight: Undisturbed) -> Iterator[tuple[Path, bool]]:
    """A folder on a disk that two checkpoints fill, and whether the mount succeeded, which needs root."""
    folder = home / "disk"
    folder.mkdir()
    checkpoint.write(str(home / "one"), straight.end, {"run_id": "0" * 32, "points": []})
    one = sum(file.stat().st_size for file in (home / "one").iterdir())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(one * 2.6) // 1024}k", "tmpfs", str(folder)]
    mounted = not subprocess.run(mount, capture_output=True).returncode
    yield folder, mounted
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_the_run_and_a_resume_passes_over_a_damaged_checkpoint(
    home: Path, straight: Undisturbed, disk: tuple[Path, bool], capfd: pytest.CaptureFixture[str]
) -> None:
    output, small = disk
    if small:
        with pytest.raises(InputError, match=r"step 9 can't be written.*No space left.*--resume"):
            train(settings(home, str(output)))
        subprocess.run(["mount", "-o", "remount,size=1g", str(output)], check=True)
    else:
        train(settings(home, str(output), steps=6))
    uri = checkpoint.complete(f"{output}/checkpoints")[0]
    assert newest(str(output))[0].step == 6
    weights = Path(uri) / "optimizer.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    # Ray Train's own list is truncated too, as if its process died while writing it.
    os.truncate(output / "checkpoints" / "checkpoint_manager_snapshot.json", 100)
    trained = train(settings(home, str(output), resume=True))
    assert (
        f"checkpoint passed over: {storage.name(uri)}: optimizer.safetensors is damaged"
        in capfd.readouterr().err
    )
    whole, again = straight.losses, curve(trained, "loss")
    assert again.items() >= {step: loss for step, loss in whole.items() if step > 6}.items()
    assert again == whole or not small
    mine, state = newest(str(output))
    reference = straight.end
    assert all(torch.equal(mine.weights[name], reference.weights[name]) for name in reference.weights)
    assert state["seen"]["digest"] == epochs_digest(1, ROWS)
    assert len(storage.list_folders(f"{output}/checkpoints", "step-")) == 2
    if not small:
        pytest.skip("only the damage was tried: a small file system can be mounted by root only")


def test_a_model_says_the_steps_that_trained_it_and_checkpoints_belong_to_their_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = home / "longer"
    config = settings(home, str(output), steps=6)

    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"model can't be written: No space"):
        patch.setattr(trainer, "save_model", full)
        train(config)
    fewer = train(dataclasses.replace(config, resume=True, steps=3))
    assert [fewer.spec.provenance["steps"], load_model(output / "model")[1].provenance["steps"]] == [6, 6]
    # Without run.json, checkpoints of one run would go on as another.
    (output / RUN_FILE).unlink()
    for other in (dataclasses.replace(config, seed=5), dataclasses.replace(config, resume=True)):
        with pytest.raises(InputError, match=r"holds checkpoints, but run\.json.* is lost"):
            train(other)


def test_storage_that_not_all_processes_see_is_refused(home: Path) -> None:
    # Each process sees its own working directory here, as each machine sees its own disk.
    name = f"mine-{uuid.uuid4().hex}"
    try:
        with pytest.raises(InputError, match=rf"--output /proc/self/cwd/{name}: the node \S+ does not see"):
            train(settings(home, f"/proc/self/cwd/{name}"))
    finally:
        shutil.rmtree(ROOT / name, ignore_errors=True)  # a worker made it in Ray's start folder
