"""A trial: one Ray Train run, as a Ray Tune trainable whose steps are the rungs."""

import contextlib
import math
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune

from pipeline.cluster.session import connect
from pipeline.config import TrainConfig, to_dict
from pipeline.errors import InputError
from pipeline.tracking import runs
from pipeline.training import checkpoint, trainer
from pipeline.training.worker import Hooks
from pipeline.tuning import ledger, space
from pipeline.tuning.config import TuneConfig, base, finished, rung_steps
from pipeline.tuning.ledger import Record, Rung
from pipeline.tuning.objective import Objective
from pipeline.tuning.rungs import Exchange, RungWatch

POLL_SECONDS, STOP_SECONDS = 1.0, 60.0
IMAGES, FAILED = "images", "failed"


def training(config: TuneConfig, record: Record, *, output: str = "") -> TrainConfig:
    """The training run that a trial stands for.

    Raises:
        InputError: flags of the wrong type.
    """
    trial = space.apply(base(config), record.flags)
    output = output or str(ledger.run_folder(config.output, record))
    return finished(config, trial, output=output, run_name=f"trial {record.name}")


class Trial(tune.Trainable):
    """Keeps a trial's record; what a rung costs is its subclass's matter.

    Ray Tune calls `step` once for each rung, and `cleanup` when it is told to stop.
    """

    def setup(self, config: dict[str, Any], *, job: TuneConfig, **settings: Any) -> None:
        """Called by Ray Tune in the trial's own actor; `config` is the trial's flags."""
        connect()
        self.job, self.settings = job, settings
        self.record = ledger.read(job.output, self.trial_name)

    def step(self) -> dict[str, Any]:
        """Trains to the next rung and measures there; a failure is a result too, which ends this trial alone."""
        try:
            self.keep(status="running")
            rung = self.advance()
            if rung is not None:
                self.keep(rungs=(*self.record.rungs, rung))
            if done := rung is None or rung.images >= self.job.images:
                self.finish()
                self.keep(status="finished")
        except Exception as error:  # whatever training raises: Ray Train has retried what can be
            self.fail(line(error))
            return {**dict.fromkeys(self.job.metrics, math.nan), IMAGES: 0, FAILED: True, "done": True}
        last = self.record.rungs[-1]
        return {**last.metrics, IMAGES: last.images, FAILED: False, "done": done}

    def cleanup(self) -> None:
        """Ends an unfinished trial at its last rung, if Ray Tune told it to stop."""
        if self.record.status != "running":
            return
        try:
            if self.stopped_early():
                self.keep(status="stopped")
        except Exception as error:
            # Under population based training the record already is the next incarnation's.
            if self.job.scheduler != "pbt":
                self.fail(line(error))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial in the same process, which saves the seconds of a start; see Ray Tune's reuse_actors."""
        self.cleanup()
        self.record = ledger.read(self.job.output, self.trial_name)
        return True

    def fail(self, reason: str) -> None:
        """Clears up, and only then is over: a search that is killed meanwhile tries this trial again."""
        self.failed(reason)
        self.keep(status="failed", reason=reason)

    def keep(self, **changes: Any) -> None:
        """Changes the trial's record, in memory and on disk."""
        self.record = replace(self.record, **changes)
        ledger.write(self.job.output, self.record)

    def advance(self) -> Rung | None:
        """Goes on to the next rung; None where training ended without another."""
        raise NotImplementedError

    def finish(self) -> None:
        """Waits for the end of a trial that had its last rung."""

    def failed(self, reason: str) -> None:
        """Clears up after a failure."""

    def stopped_early(self) -> bool:
        """Ends a trial between two rungs; whether it counts as stopped by the scheduler."""
        return True


class TrainTrial(Trial):
    """A trial that trains; `settings` hold the objective and the parent MLflow run.

    The training runs in a thread of its own, and its workers wait at each rung until the next call of `step`
    (go on) or `cleanup` (end here: the model is exported as it is).
    """

    _future: Future[trainer.Trained] | None = None
    _asked: Rung | None = None
    _logged = -1  # step of the newest measurement that MLflow has

    def advance(self) -> Rung | None:
        """See `Trial`."""
        self._answer(True)
        if self._future is None:
            self._start()
        while True:
            rung: Rung | None = ray.get(self._exchange.next.remote(POLL_SECONDS))
            if rung is not None:
                self._asked = rung
                if rung.step > self._logged:
                    point = (int(rung.time * 1000), rung.step, rung.metrics | {IMAGES: rung.images})
                    runs.log_points(runs.Run(self.record.run_id), [point])
                return rung
            if self._future is not None and self._future.done():
                self._future.result()
                return None

    def finish(self) -> None:
        """See `Trial`."""
        self._answer(True)
        assert self._future is not None
        future, self._future = self._future, None
        future.result()
        runs.end_run(runs.Run(self.record.run_id))

    def stopped_early(self) -> bool:
        """See `Trial`; under population based training a stop is a pause: the folder is the next incarnation's."""
        if self._future is None:
            return False
        self._answer(False)
        future, self._future = self._future, None
        future.result()
        if self.job.scheduler == "pbt":
            return False
        runs.end_run(runs.Run(self.record.run_id), reason="stopped by the scheduler")
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """For population based training: the state at the last rung, and whose it is."""
        shutil.copytree(self._start_folder(None), checkpoint_dir, dirs_exist_ok=True)
        (Path(checkpoint_dir) / "trial").write_text(self.record.name)

    def load_checkpoint(self, saved: Any) -> None:
        """For population based training: a new incarnation, from a trial's weights (or its own), with changed flags.

        Also a trial that goes on where it was gets a new folder: its old workers may still be on their way out.
        """
        donor, incarnation = (Path(saved) / "trial").read_text(), self.record.incarnation + 1
        start = self._start_folder(incarnation)
        shutil.rmtree(start, ignore_errors=True)
        shutil.copytree(saved, start)
        _, step = checkpoint.read_model(str(start))
        history = self.record.history
        if donor != self.record.name:
            changed = {k: v for k, v in self.config.items() if self.record.flags.get(k) != v}
            history = (*history, f"after {self.record.images} images: weights of trial {donor}, {changed}")
        # What was measured on weights that are given up doesn't count.
        rungs = tuple(rung for rung in self.record.rungs if rung.step <= step)
        self.keep(incarnation=incarnation, flags=dict(self.config), history=history, rungs=rungs)

    def failed(self, reason: str) -> None:
        """See `Trial`."""
        if self._future is not None:  # no workers are left waiting at a rung
            with contextlib.suppress(ray.exceptions.RayError):
                self._answer(False)
            wait([self._future], timeout=STOP_SECONDS)
        self._future, self._asked = None, None
        if self.record.run_id:
            runs.end_run(runs.Run(self.record.run_id), "FAILED", reason=reason)

    def _start(self) -> None:
        config = training(self.job, self.record)
        run = runs.reopen_run(self.record.run_id, (IMAGES,)) if self.record.run_id else None
        if run is None:
            run = runs.start_run(
                config.experiment,
                config.run_name,
                to_dict(config),
                {"ray_ddpm.output": config.output},
                parent=self.settings["parent_run"],
            )
            runs.log_config(run, to_dict(config))
            self.keep(run_id=run.id)
        # What another trial's weights are measured at again is shown beside what was given up for them.
        self._logged = -1 if self.record.incarnation else run.last_steps.get(IMAGES, -1)
        _, spec = trainer.check(config)
        start = self._start_folder(self.record.incarnation)
        begun = checkpoint.read_model(str(start))[1] if start.exists() else -1
        behind = max([begun, *(rung.step for rung in self.record.rungs)])
        rungs = {k: v for k, v in rung_steps(self.job, config.batch_size).items() if k > behind}
        self._exchange = Exchange.remote()  # type: ignore[attr-defined]
        objective: Objective = self.settings["objective"]
        keep = str(self._start_folder(None)) if self.job.scheduler == "pbt" else ""
        hooks = Hooks(
            watch=RungWatch(rungs, spec, objective, self._exchange, keep),
            start_from=str(start) if start.exists() else "",
            run_id=self.record.run_id,
            log_model=False,
        )
        pool = ThreadPoolExecutor(1, thread_name_prefix="training")
        self._future = pool.submit(trainer.train, config, hooks=hooks)
        pool.shutdown(wait=False)

    def _start_folder(self, incarnation: int | None) -> Path:
        """The state that an incarnation starts from; of None, the state at the last rung."""
        name = "newest" if incarnation is None else f"start-{incarnation}"
        return ledger.folder(self.job.output, self.record.name) / name

    def _answer(self, go_on: bool) -> None:
        if self._asked is not None:
            ray.get(self._exchange.answer.remote(self._asked.step, go_on))
            self._asked = None


def line(error: BaseException) -> str:
    """An error's sense in one line: of a traceback, the last."""
    lines = [part.strip() for part in str(error).splitlines() if part.strip()]
    text = lines[-1] if lines else ""
    name = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return f"{name}{text}"[:500]
