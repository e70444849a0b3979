"""The run's checkpoints in Ray Train: its background thread writes them, and a restart finds them on the storage."""

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
# Score of a checkpoint that is not validated; it is worse than any real score. Ray Train stores scores as JSON, which
# has neither NaN nor infinity, and it can't compare a missing score.
UNVALIDATED = sys.float_info.max
# Seconds that a checkpoint waits for the previous one to be written. After that it is skipped.
WAIT_SECONDS = 10.0
BROADCAST_BYTES = 64 * 2**20
_OURS = re.compile(r"step-\d{9}-\d{13}")


@dataclass
class Upload:
    """A checkpoint that is being written.

    Attributes:
        contents: one copy of the state, removed once it is written, because Ray Train keeps the writing function longer.
        done: set once the write has ended, whether it succeeded or not.
    """

    contents: list[checkpoint.Saved]
    done: threading.Event = field(default_factory=threading.Event)


@dataclass
class CheckpointManager:
    """Saves and restores the run's checkpoints for one worker.

    Args:
        folder: URI of Ray Train's folder in the run's output.
        rank: this worker's rank; rank 0 alone reads and writes.
        device: this worker's device.
        channel: handle of the run's `RunChannel`.
        patient: calls the storage, and repeats calls that fail.
        validate: returns True for a step whose checkpoint is to be validated.
        on_write: writes other files that belong to a checkpoint.
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
        """Copies the training state and lets Ray Train's thread write it. Every worker calls this at the same step.

        At most one copy is held. Checkpoints are skipped while the storage fails or is slower than the steps.

        Args:
            capture: copies the training state.
            extra: JSON values to keep with the checkpoint.
            needed: True waits for the previous checkpoint, however long it takes.

        Returns:
            True on rank 0 if the checkpoint is being written.
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
        """Waits for the previous checkpoint. Returns True if it has been written."""
        if self._upload is None or self._upload.done.wait(WAIT_SECONDS):
            return True
        if needed:
            self.channel.notice.remote(f"step {step}: waiting for the checkpoint before it to be written")
            return self._upload.done.wait()
        self.channel.notice.remote(
            f"the checkpoint of step {step} is left out: the previous one is still being written; "
            "--checkpoint-every is too small for the storage, or the storage does not answer"
        )
        return False

    def save_now(self, capture: Callable[[], checkpoint.Saved], step: int, extra: dict[str, Any]) -> None:
        """Writes a checkpoint at once and without Ray Train, which accepts none while it stops this worker group."""
        if self.rank == 0:
            self._write(checkpoint.new_name(step), capture(), extra)
            self.channel.saved.remote()

    def flush(self) -> None:
        """Waits for the checkpoint that is being written."""
        if self._upload is not None:
            self._upload.done.wait()

    def restore(self) -> tuple[checkpoint.Saved, dict[str, Any]] | None:
        """Reads the newest intact checkpoint, the same one for every worker. A collective call.

        Rank 0 reads it and sends it to the others. It skips damaged ones and reports them.

        Returns:
            the contents and those of `state.json`; None if no checkpoint was completely written.

        Raises:
            InputError: all checkpoints are damaged, or the storage could not be read.
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
        if not known:  # the driver was killed after the write and before Ray Train recorded it
            target = self._registered_as(name) if self.rank == 0 else None
            self._report(target, saved.step, None, CheckpointUploadMode.NO_UPLOAD)
        return saved, state

    def _bytes_to_all(self, data: bytes | None, size: int) -> bytes:
        """Sends rank 0's bytes to every worker. A collective call.

        Args:
            data: the bytes, on rank 0.
            size: number of bytes.
        """
        received = bytearray(data or size)
        for start in range(0, size, BROADCAST_BYTES):
            here = torch.frombuffer(memoryview(received)[start : start + BROADCAST_BYTES], dtype=torch.uint8)
            there = here.to(self.device)
            dist.broadcast(there, 0)
            here.copy_(there)
        return bytes(received)

    def _report(self, target: Checkpoint | None, step: int, upload: Any, mode: CheckpointUploadMode) -> bool:
        """Reports a checkpoint to Ray Train. Returns True if Ray Train accepted it.

        While it restarts the workers, Ray Train drops reports and never calls `upload`.
        """
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
    """Reads the newest intact checkpoint in a folder.

    Args:
        read: reads the checkpoint at a URI; raises `DamagedCheckpoint` for a damaged one.
        patient: calls the storage, and repeats calls that fail.
        say: called with a line about each damaged checkpoint.

    Returns:
        the checkpoint's URI and the result of `read`; None if no checkpoint was completely written.

    Raises:
        InputError: all checkpoints are damaged, or the storage could not be read in the time that `patient` allows.
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
            f"all {len(damaged)} checkpoints in {folder} are damaged ({damaged[0]}): restore one, or start a new run "
            "with another --output"
        )
    return None


def mend(folder: str, patient: Patient) -> None:
    """Removes Ray Train's list of checkpoints if it is unusable. Ray Train does not write the list atomically.

    With an unusable list Ray Train does not start, or fails at its next checkpoint. Nothing is lost without the list,
    because `CheckpointManager.restore` looks at the storage.
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
    """The names of the checkpoints in Ray Train's list; None if Ray Train could not continue with that list."""
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
    """Deletes the checkpoints that Ray Train does not keep: incomplete ones, and complete ones that it never recorded.

    The newest complete checkpoint always stays.

    Args:
        kept: checkpoints that Ray Train keeps.
    """
    names = {storage.name(entry.path) for entry in kept} | {
        storage.name(uri) for uri in checkpoint.complete(folder)[:1]
    }
    for uri in storage.list_folders(folder, "step-"):
        if _OURS.fullmatch(storage.name(uri)) and storage.name(uri) not in names:
            storage.remove_folder(uri)
