"""A trial of a search: one Ray Train run, as a Ray Tune trainable whose steps are the rungs."""

import contextlib
import math
import os
import threading
import uuid
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import ray
from ray import tune

from pipeline.cluster.session import connect
from pipeline.config import TrainConfig
from pipeline.errors import BadSettings, InputError
from pipeline.redact import one_line
from pipeline.tracking import runs
from pipeline.tracking.tracker import Tracker
from pipeline.training import run_channel, trainer
from pipeline.training.checks import make_spec
from pipeline.training.identity import logged_config, logged_settings
from pipeline.training.worker import Hooks
from pipeline.tuning import ledger, space
from pipeline.tuning.choices import check_trial
from pipeline.tuning.config import TuneConfig, base, finished, rung_steps
from pipeline.tuning.ledger import Record, Rung
from pipeline.tuning.rungs import RungWatch, open_exchange

POLL_SECONDS, STOP_SECONDS = 1.0, 60.0
# Seconds that a trial waits for MLflow to open its run, before it is interrupted.
OPENING_SECONDS = 600.0
IMAGES, SEEN, FAILED = "images", "seen", "failed"
CURVES = (IMAGES, *run_channel.CURVES)


def training(config: TuneConfig, record: Record, *, output: str = "") -> TrainConfig:
    """The training run that a trial stands for.

    Raises:
        InputError: a flag has the wrong type.
    """
    trial = space.apply(base(config), record.flags)
    output = output or str(ledger.run_folder(config.output, record))
    return finished(config, trial, output=output, run_name=f"trial {record.name}")


class Trial(tune.Trainable):
    """Keeps a trial's record. A subclass does the work of a rung.

    A failure ends only this trial. It is final if the settings can't be trained, training diverges, or a measurement
    is not finite. Any other failure may be the infrastructure's, and a resume tries the trial again.

    Ray Tune calls `step` once for each rung, and `cleanup` when it is told to stop.
    """

    _measured = False  # True once this process has measured the trial

    def setup(
        self,
        config: dict[str, Any],
        *,
        job: TuneConfig,
        tracking: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        """Ray Tune calls this in the trial's actor. `config` holds the trial's flags, `tracking` variables for MLflow."""
        # Use the driver's MLflow with its password, since this node may be configured for another one, or none.
        os.environ.update(tracking or {})
        connect()
        self.job, self.settings = job, settings
        self.record = ledger.read(job.output, self.trial_name)

    def step(self) -> dict[str, Any]:
        """Trains to the next rung and measures there. A failure is returned as a result too."""
        try:
            self.keep(status="running", reason="")
            rung = self.advance()
            if rung not in self.record.rungs:
                check_finite(rung)
                self.keep(rungs=(*self.record.rungs, rung))
            self._measured = True
            if done := rung.images >= self.job.images:
                self.finish()
                self.keep(status="finished")
        except Exception as error:  # Ray Train has already retried
            self.fail(error)
            return {
                **dict.fromkeys(self.job.metrics, math.nan),
                IMAGES: 0,
                SEEN: 0,
                FAILED: True,
                "done": True,
            }
        return {**rung.metrics, IMAGES: rung.images, SEEN: self.record.seen, FAILED: False, "done": done}

    def cleanup(self) -> None:
        """Ends an unfinished trial at its last rung, if Ray Tune told it to stop."""
        measured, self._measured = self._measured, False
        if self.record.status != "running" or not measured:
            return  # a trial without a rung continues after a resume
        try:
            if self.stopped_early():
                self.keep(status="stopped")
        except Exception as error:
            self.fail(error)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Starts the next trial in the same process, which saves seconds; see Ray Tune's reuse_actors."""
        self.cleanup()
        self.record = ledger.read(self.job.output, self.trial_name)
        return True

    def fail(self, error: Exception) -> None:
        """Cleans up, and records the failure only after that, so that a search killed meanwhile tries the trial again."""
        status = "failed" if isinstance(error, BadSettings) else "interrupted"
        self.failed(reason := reason_of(error))
        self.keep(status=status, reason=reason)

    def keep(self, **changes: Any) -> None:
        """Changes the trial's record in memory and on disk."""
        self.record = replace(self.record, **changes)
        ledger.write(self.job.output, self.record)

    def advance(self) -> Rung:
        """Trains to the next rung and returns it. After a resume this may be the last measured rung again."""
        raise NotImplementedError

    def finish(self) -> None:
        """Waits for the end of a trial that reached its last rung."""

    def failed(self, reason: str) -> None:
        """Cleans up after a failure."""

    def stopped_early(self) -> bool:
        """Ends a trial between two rungs. Returns True if it counts as stopped by the scheduler."""
        return True


class TrainTrial(Trial):
    """A trial that trains. `settings` hold the objective, the splits, the parent MLflow run and the use of GPUs.

    Training runs in a thread of its own. Its workers wait at each rung until the next call of `step` (continue) or
    `cleanup` (end here and export the model as it is).
    """

    _future: Future[trainer.Trained] | None = None
    _asked: Rung | None = None
    _tracker: Tracker | None = None  # open while the trial trains

    def advance(self) -> Rung:
        """See `Trial`."""
        self._answer(True)
        future = self._future = self._future or self._start()
        while True:
            rung: Rung | None = ray.get(self._exchange.next.remote(POLL_SECONDS))
            if rung is not None:
                self._asked = rung
                point = (int(rung.time * 1000), rung.step, rung.metrics | {IMAGES: rung.seen or rung.images})
                assert self._tracker is not None
                self._tracker.log_points([point])
                return rung
            if future.done():
                future.result()
                raise RuntimeError("training ended before its last rung")

    def finish(self) -> None:
        """See `Trial`."""
        self._wait(True)
        self._close()

    def stopped_early(self) -> bool:
        """See `Trial`."""
        if self._future is None:
            return False
        self._wait(False)
        self._close(reason="stopped by the scheduler")
        return True

    def failed(self, reason: str) -> None:
        """See `Trial`."""
        if self._future is not None:  # leave no worker waiting at a rung
            with contextlib.suppress(ray.exceptions.RayError):
                self._answer(False, STOP_SECONDS)
            wait([self._future], timeout=STOP_SECONDS)
        self._future, self._asked = None, None
        self._close("FAILED", reason)

    def _start(self) -> Future[trainer.Trained]:
        splits = self.settings["splits"]
        config = training(self.job, self.record)
        if config.gpu is None:
            config = replace(config, gpu=self.settings["gpu"])
        run = runs.reopen_later(self.record.run_id, CURVES) if self.record.run_id else None
        if run is None:
            # Runs that a killed attempt opened with this mark are deleted.
            self.keep(opening=self.record.opening or uuid.uuid4().hex)
            run = runs.open_run(
                config.experiment,
                config.run_name,
                {"ray_ddpm.output": config.output, **runs.origin("tune")},
                OPENING_SECONDS,
                self.settings["parent_run"],
                self.record.opening,
            )
            self.keep(run_id=run.id)
        self._tracker = Tracker(
            run, config.output, CURVES, config.tracking_patience, print, threading.Event()
        )
        self._tracker.log_params(logged_settings(config))
        self._tracker.log_config(logged_config(config))
        check_trial(self.job, self.record.flags, splits)  # the open run records a failure
        self._exchange = open_exchange()
        watch = RungWatch(
            rung_steps(self.job, config.batch_size),
            config.batch_size,
            {rung.step: rung for rung in self.record.rungs},
            make_spec(config, splits["train"]),
            self.settings["objective"],
            self._exchange,
        )
        hooks = Hooks(watch=watch)
        pool = ThreadPoolExecutor(1, thread_name_prefix="training")
        future = pool.submit(trainer.train, config, splits, hooks=hooks, tracker=self._tracker)
        pool.shutdown(wait=False)
        return future

    def _close(self, status: str = "FINISHED", reason: str = "") -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.end(status, reason)
            tracker.close()

    def _wait(self, go_on: bool) -> None:
        """Waits for the end of training. Repeats the answer, because the exchange may restart and lose it."""
        assert self._future is not None
        while not self._future.done():
            self._answer(go_on)
            wait([self._future], timeout=POLL_SECONDS)
        future, self._future, self._asked = self._future, None, None
        future.result()

    def _answer(self, go_on: bool, timeout: float | None = None) -> None:
        if self._asked is not None:
            ray.get(self._exchange.answer.remote(self._asked.step, go_on), timeout=timeout)


def reason_of(error: Exception) -> str:
    """An error in one line. Of a traceback, this is the last line, which names the error."""
    name = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return one_line(name + str(error).strip().rpartition("\n")[2])


def check_finite(rung: Rung) -> None:
    """Refuses a measurement that can't be compared.

    Raises:
        BadSettings: a metric is not finite.
    """
    for name, value in (*rung.metrics.items(), *(("that of an image", one) for one in rung.per_image)):
        if not math.isfinite(value):
            raise BadSettings(f"{name} is {value} after {rung.images} images")
