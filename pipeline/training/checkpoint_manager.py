"""The run's checkpoints in Ray Train: saved in its background thread, found again on storage after any end."""

import json
import math
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import ray
import ray.train
import ray.train.collective
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode, ValidationTaskConfig

from pipeline import storage
from pipeline.cluster.ray_internals import get_train_context
from pipeline.errors import InputError, Outage
from pipeline.evaluation.config import BITS_PER_DIM
from pipeline.patience import PERMANENT, Patient
from pipeline.training import checkpoint

T = TypeVar("T")
CHECKPOINTS = "checkpoints"
SNAPSHOT = "checkpoint_manager_snapshot.json"
# The score of a checkpoint that is not validated, behind every score there can be. Ray Train keeps scores as JSON,
# which has no NaN and no infinity, and can't compare a missing one.
UNVALIDATED = sys.float_info.max
# Seconds that a checkpoint waits for the one before it to be written; then it is left out.
WAIT_SECONDS = 10.0
BROADCAST_BYTES = 64 * 2**20
_OURS = re.compile(r"step-\d{9}-\d{13}")


@dataclass
class Upload:
    """A checkpoint on its way to the storage.

    Attributes:
        contents: one copy of the state, until it is written: Ray Train keeps the function that writes it for longer.
    """

    contents: list[checkpoint.Saved]
    done: threading.Event = field(default_factory=threading.Event)


@dataclass
class CheckpointManager:
    """One worker's hand on the run's checkpoints.

    Args:
        folder: URI of Ray Train's folder in the run's output.
        device: of this worker.
        patient: calls the storage.
        validate: whether the checkpoint of a step is to be validated.
        on_write: writes whatever else is kept of a checkpoint.
    """

    folder: str
    rank: int
    device: torch.device
    channel: Any
    patient: Patient
    validate: Callable[[int], bool]
    on_write: Callable[[checkpoint.Saved], None] = lambda saved: None
    _upload: Upload | None = None

    def save(
        self, capture: Callable[[], checkpoint.Saved], step: int, extra: dict[str, Any], needed: bool
    ) -> bool:
        """Copies the training state and lets Ray Train's thread write it; every worker calls it at the same step.

        One copy at most is held: while the storage is slower than the steps, or away, checkpoints are left out.

        Args:
            needed: wait for the checkpoint before it, however long it takes.

        Returns:
            on rank 0, whether it is being written.
        """
        target, write = None, None
        if self.rank == 0 and (free := self._is_free(step, needed)):
            upload = self._upload = Upload([capture()])
            target = self._registered_as(checkpoint.new_name(step))

            def write(_: Checkpoint, name: str) -> Checkpoint:
                try:
                    self._write(name, upload.contents[0], extra)
                finally:
                    upload.contents.clear()
                    upload.done.set()
                return self._registered_as(name)

        taken = self._report(target, step, write, CheckpointUploadMode.ASYNC)
        if self.rank != 0 or not free:
            return False
        if not taken:
            self._upload = None
        return taken

    def _is_free(self, step: int, needed: bool) -> bool:
        """Whether nothing is being written, after a wait for it."""
        if self._upload is None or self._upload.done.wait(WAIT_SECONDS):
            return True
        if needed:
            self.channel.notice.remote(f"step {step}: waiting for the checkpoint before it to be written")
            return self._upload.done.wait()
        self.channel.notice.remote(
            f"the checkpoint of step {step} is left out: the one before it is still being written; "
            "--checkpoint-every is too small for the storage, or the storage is away"
        )
        return False

    def save_now(self, capture: Callable[[], checkpoint.Saved], step: int, extra: dict[str, Any]) -> None:
        """Writes at once and without Ray Train, which is about to end this group and no longer listens."""
        if self.rank == 0:
            self._write(checkpoint.new_name(step), capture(), extra)
            self.channel.saved.remote()

    def flush(self) -> None:
        """Waits for what is being written."""
        if self._upload is not None:
            self._upload.done.wait()

    def restore(self) -> tuple[checkpoint.Saved, dict[str, Any]] | None:
        """The newest whole checkpoint, the same for every worker; None where none was ever written to its end.

        Rank 0 reads it and sends it to the others. Damaged ones are passed over and reported.

        Raises:
            InputError: there are checkpoints and all are damaged, or the storage could not be read.
        """
        found, facts = None, None
        if self.rank == 0 and (
            found := newest_whole(self.folder, checkpoint.fetch, self.patient, self.channel.notice.remote)
        ):
            name = storage.name(found[0])
            reported = ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)
            known = name in {storage.name(entry.checkpoint.path) for entry in reported}
            sizes = {file: len(data) for file, data in found[1].files.items()}
            facts = name, known, found[1].state, sizes
        facts = ray.train.collective.broadcast_from_rank_zero(facts)
        if facts is None:
            return None
        name, known, state, sizes = facts
        files = found[1].files if found else {}
        if ray.train.get_context().get_world_size() > 1:
            files = {file: self._bytes_to_all(files.get(file), size) for file, size in sizes.items()}
        saved = checkpoint.unpack(checkpoint.Stored(state, files))
        if not known:  # written, but the driver was killed before Ray Train had noted it
            target = self._registered_as(name) if self.rank == 0 else None
            self._report(target, saved.step, None, CheckpointUploadMode.NO_UPLOAD)
        return saved, state

    def _bytes_to_all(self, data: bytes | None, size: int) -> bytes:
        """Rank 0's bytes, on every worker; a collective call."""
        received = bytearray(data or size)
        for start in range(0, size, BROADCAST_BYTES):
            here = torch.frombuffer(memoryview(received)[start : start + BROADCAST_BYTES], dtype=torch.uint8)
            there = here.to(self.device)
            dist.broadcast(there, 0)
            here.copy_(there)
        return bytes(received)

    def _report(self, target: Checkpoint | None, step: int, upload: Any, mode: CheckpointUploadMode) -> bool:
        """Whether Ray Train took it: while it restarts the workers it drops reports, and never calls `upload`."""
        context = get_train_context()
        before = context.report_call_index
        due = target is not None and self.validate(step)
        ray.train.report(
            {"step": step, BITS_PER_DIM: UNVALIDATED},
            checkpoint=target,
            checkpoint_dir_name=target and storage.name(target.path),
            checkpoint_upload_mode=mode,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=False,
            validation=ValidationTaskConfig(fn_kwargs={"step": step}) if due else False,
        )
        return bool(context.report_call_index > before)

    def _write(self, name: str, saved: checkpoint.Saved, extra: dict[str, Any]) -> None:
        uri = storage.join(self.folder, name)

        def write() -> None:
            self.on_write(saved)
            checkpoint.write(uri, saved, extra)

        what = f"the checkpoint of step {saved.step} can't be written to {uri}"
        try:
            self.patient(write, what)
        except OSError as error:
            storage.remove_folder(uri)
            if error.errno in PERMANENT:
                advice = "make room and go on with --resume: the checkpoint before it is whole"
                ray.get(self.channel.give_up.remote(Outage(f"{what}: {error.strerror}; {advice}")))
            raise

    def _registered_as(self, name: str) -> Checkpoint:
        place = ray.train.get_context().get_storage()
        return Checkpoint(place.build_checkpoint_path_from_name(name), place.storage_filesystem)


def newest_whole(
    folder: str, read: Callable[[str], T], patient: Patient, say: Callable[[str], object]
) -> tuple[str, T] | None:
    """The newest checkpoint whose bytes are as written, as `read` gives it, and its URI.

    Args:
        read: raises `DamagedCheckpoint`.
        say: is told of damaged ones.

    Returns:
        None where no checkpoint was ever written to its end.

    Raises:
        InputError: all are damaged, or the storage could not be read for that long.
    """
    what = f"the checkpoints in {folder} can't be read"
    found = patient(lambda: checkpoint.complete(folder), what)
    damaged = []
    for uri in found:
        try:
            return uri, patient(partial(read, uri), what)
        except checkpoint.DamagedCheckpoint as error:
            damaged.append(str(error))
            say(f"checkpoint passed over: {error}")
    if damaged:
        raise InputError(
            f"all {len(damaged)} checkpoints in {folder} are damaged ({damaged[0]}): put them right, or begin anew in "
            "another --output"
        )
    return None


def mend(folder: str, patient: Patient) -> None:
    """Drops Ray Train's list of checkpoints where it can't be used: it isn't written in one piece.

    Ray Train refuses to start on such a list, or fails at its next checkpoint. It is no loss:
    `CheckpointManager.restore` looks at the storage.
    """
    place = storage.join(folder, SNAPSHOT)

    def drop() -> None:
        if not storage.exists(place):
            return
        names = _usable(storage.read_bytes(place))
        if names is None or not all(storage.exists(storage.join(folder, name)) for name in names):
            storage.remove(place)

    patient(drop, f"{place} can't be read")


def _usable(content: bytes) -> set[str] | None:
    """The names of the checkpoints in a list of Ray Train's; None where it could not load the list and go on with it."""
    try:
        snapshot = json.loads(content)
        listed = snapshot["checkpoint_results"]
        latest, pending = snapshot["latest_checkpoint_result"], snapshot["pending_training_results"]
        names = {entry["checkpoint_dir_name"] for entry in listed}
        mentioned = {entry["checkpoint_dir_name"] for entry in (*([latest] if latest else []), *pending)}
        for state in ("validated", "timed_out_validation", "failed_validation"):
            mentioned |= set(snapshot[f"{state}_checkpoint_dir_names"])
        usable = (
            snapshot["ray_version"] == ray.__version__
            and len(names) == len(listed) == len(snapshot["checkpoint_report_indices"])
            and len(pending) == len(snapshot["pending_validation_specs"])
            and mentioned <= names
            and all(math.isfinite(entry["metrics"][BITS_PER_DIM]) for entry in (*listed, *pending))
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return names if usable else None


def sweep(folder: str, kept: list[Checkpoint]) -> None:
    """Deletes what Ray Train does not keep: half-written checkpoints, and whole ones that it never knew of."""
    names = {storage.name(entry.path) for entry in kept} | {
        storage.name(uri) for uri in checkpoint.complete(folder)[:1]
    }
    for uri in storage.list_folders(folder, "step-"):
        if _OURS.fullmatch(storage.name(uri)) and storage.name(uri) not in names:
            storage.remove_folder(uri)
