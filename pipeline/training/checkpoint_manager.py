"""The run's checkpoints in Ray Train: saved in its background thread, found again on storage after any end."""

import errno
import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.train
import ray.train.collective
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode, ValidationTaskConfig

from pipeline import storage
from pipeline.evaluation.config import BITS_PER_DIM
from pipeline.training import checkpoint

CHECKPOINTS = "checkpoints"
SNAPSHOT = "checkpoint_manager_snapshot.json"
UNRECOVERABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@dataclass
class CheckpointManager:
    """One worker's hand on the run's checkpoints.

    Args:
        folder: URI of Ray Train's folder in the run's output.
        validate: whether the checkpoint of a step is to be validated.
        on_write: writes whatever else is kept of a checkpoint.
    """

    folder: str
    rank: int
    channel: Any
    validate: Callable[[int], bool]
    on_write: Callable[[checkpoint.Saved], None] = lambda saved: None
    # One upload at a time: a storage slower than the steps holds training up, rather than filling the memory.
    _idle: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(1))

    def save(
        self,
        capture: Callable[[], checkpoint.Saved],
        step: int,
        extra: dict[str, Any],
    ) -> None:
        """Copies the training state and lets Ray Train's thread write it; every worker calls it at the same step."""
        target, upload = None, None
        if self.rank == 0:
            # Ray Train skips a report while a node is being preempted, and then nothing ever releases.
            self._idle.acquire(timeout=60)
            saved = capture()
            target = self._registered_as(checkpoint.new_name(step))

            def upload(_: Checkpoint, name: str) -> Checkpoint:
                try:
                    self._write(name, saved, extra)
                finally:
                    self._idle.release()
                return self._registered_as(name)

        self._report(target, step, upload, CheckpointUploadMode.ASYNC)

    def save_now(self, capture: Callable[[], checkpoint.Saved], step: int, extra: dict[str, Any]) -> None:
        """Writes at once and without Ray Train, which is about to end this group and no longer listens."""
        if self.rank == 0:
            self._write(checkpoint.new_name(step), capture(), extra)
            self.channel.saved.remote()

    def flush(self) -> None:
        """Waits for what is being written."""
        if self._idle.acquire(timeout=60):
            self._idle.release()

    def restore(self) -> tuple[checkpoint.Saved, dict[str, Any]] | None:
        """The newest checkpoint whose bytes are as written, the same for every worker; None where there is none.

        Damaged ones are passed over and reported.
        """
        name, known, found = "", True, None
        if self.rank == 0:
            for uri in checkpoint.complete(self.folder):
                try:
                    found, name = checkpoint.read(uri), storage.name(uri)
                    break
                except checkpoint.DamagedCheckpoint as error:
                    self.channel.notice.remote(f"checkpoint passed over: {error}")
            reported = ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)
            known = not name or name in {storage.name(entry.checkpoint.path) for entry in reported}
        name, known = ray.train.collective.broadcast_from_rank_zero((name, known))
        if not name:
            return None
        saved, state = found or checkpoint.read(storage.join(self.folder, name))
        if not known:  # written, but the driver was killed before Ray Train had noted it
            target = self._registered_as(name) if self.rank == 0 else None
            self._report(target, saved.step, None, CheckpointUploadMode.NO_UPLOAD)
        return saved, state

    def _report(self, target: Checkpoint | None, step: int, upload: Any, mode: CheckpointUploadMode) -> None:
        due = target is not None and self.validate(step)
        ray.train.report(
            # Not a number ranks below every number, as an unvalidated checkpoint should; a missing one, above them all.
            {"step": step, BITS_PER_DIM: math.nan},
            checkpoint=target,
            checkpoint_dir_name=target and storage.name(target.path),
            checkpoint_upload_mode=mode,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=False,
            validation=ValidationTaskConfig(fn_kwargs={"step": step}) if due else False,
        )

    def _write(self, name: str, saved: checkpoint.Saved, extra: dict[str, Any]) -> None:
        uri = storage.join(self.folder, name)
        try:
            self.on_write(saved)
            checkpoint.write(uri, saved, extra)
        except OSError as error:
            storage.remove_folder(uri)
            if error.errno in UNRECOVERABLE:
                reason = (
                    f"the checkpoint of step {saved.step} can't be written to {uri}: {error.strerror}; make room and "
                    "go on with --resume: the checkpoint before it is whole"
                )
                ray.get(self.channel.give_up.remote(reason))
            raise

    def _registered_as(self, name: str) -> Checkpoint:
        place = ray.train.get_context().get_storage()
        return Checkpoint(place.build_checkpoint_path_from_name(name), place.storage_filesystem)


def mend(folder: str) -> None:
    """Drops Ray Train's list of checkpoints where it can't be used: it isn't written in one piece.

    Ray Train refuses to start on such a list. It is no loss: `CheckpointManager.restore` looks at the storage.
    """
    place = storage.join(folder, SNAPSHOT)
    if not storage.exists(place):
        return
    try:
        snapshot = json.loads(storage.read_bytes(place))
        names = [entry["checkpoint_dir_name"] for entry in snapshot["checkpoint_results"]]
        usable = snapshot["ray_version"] == ray.__version__
        usable = usable and all(storage.exists(storage.join(folder, name)) for name in names)
    except (ValueError, KeyError, TypeError):
        usable = False
    if not usable:
        storage.remove(place)


def sweep(folder: str, kept: list[Checkpoint]) -> None:
    """Deletes what Ray Train does not keep: half-written folders, and whole ones that it never knew of."""
    names = {storage.name(entry.path) for entry in kept} | {
        storage.name(uri) for uri in checkpoint.complete(folder)[:1]
    }
    for uri in storage.list_folders(folder, "step-"):
        if storage.name(uri) not in names:
            storage.remove_folder(uri)
