"""Runs a search with Ray Tune. Every trial is a Ray Train run, judged by a metric that all schedules share.

The state of a search is its ledger (see ledger.py). A resume needs none of Ray Tune's own files, which contain
absolute paths and pickled objects.
"""

import contextlib
import os
import shutil
import sys
import threading
import time
import uuid
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.util import get_node_ip_address

from pipeline import storage
from pipeline.cluster.ray_internals import ENV_VARS_TO_PROPAGATE
from pipeline.cluster.room import Need, announced, choose_gpu, most_places
from pipeline.data.index import Splits, open_splits
from pipeline.display import Display, status
from pipeline.errors import InputError
from pipeline.evaluation.config import FRECHET
from pipeline.evaluation.features import open_extractor
from pipeline.lock import locked
from pipeline.output import check_apart
from pipeline.tracking import address, runs
from pipeline.tracking.tracker import FOLDER as UNDELIVERED
from pipeline.tracking.tracker import HURRIED, Tracker
from pipeline.training.identity import logged_settings
from pipeline.training.trainer import SAMPLES, draw_exported, room_needed
from pipeline.tuning import ledger, report
from pipeline.tuning.choices import check_choices
from pipeline.tuning.config import TuneConfig, base, check
from pipeline.tuning.identity import PATIENCE, SEARCH_FILE, open_search
from pipeline.tuning.objective import CLASSIFIER, make_objective
from pipeline.tuning.proposals import Halving, Proposals
from pipeline.tuning.space import Space, apply, fitted, load_space, train_command
from pipeline.tuning.trial import CURVES, SEEN, TrainTrial, Trial, reason_of, training

SESSION = "ray-"
SECRETS = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"
# Restarts of a trial whose own process died. Training within a trial has restarts of its own.
RESTARTS = 2


def check_search(config: TuneConfig) -> tuple[Space, Splits]:
    """Checks everything that can be checked before a cluster is needed.

    Returns:
        the search space and the opened dataset.

    Raises:
        InputError: no trial could run with the settings or the space, or the output already holds a search.
    """
    check(config)
    space = load_space(config.space)  # reports a wrong file before the data is opened
    if not storage.is_local(config.output):
        raise InputError(
            f"--output {config.output}: the trials share files: give a folder that all nodes see"
        )
    storage.check_writable(config.output)
    if storage.exists(storage.join(config.output, SEARCH_FILE)) and not config.resume:
        raise InputError(f"--output {config.output} already holds a search: pass --resume, or another folder")
    check_apart(config.output, "--data", config.data)
    size = int(space.fixed.get("image_size", 0))
    splits = open_splits(config.data, size, config.reading, config.split, config.output)
    _ = splits["validation"]
    if not config.space:
        space = load_space(flags=fitted(splits["train"].image, splits["train"].rows))
    check_choices(config, space, splits)
    if FRECHET in config.metrics and config.features != CLASSIFIER:
        open_extractor(config.features, splits["train"].image)
    return space, splits


def search(
    config: TuneConfig, trial: type[Trial] = TrainTrial, *, checked: tuple[Space, Splits] | None = None
) -> dict[str, Any]:
    """Runs the search, or the rest of it, and writes the report.

    Args:
        trial: class that runs a trial.
        checked: result of `check_search`, if it was called before.

    Raises:
        InputError: as `check_search`; or a resume has other settings, or no trial could be measured.
    """
    # Trials run in Ray's own folders, so relative paths would be wrong there.
    config = replace(config, data=storage.absolute(config.data), output=storage.absolute(config.output))
    space, splits = checked or check_search(config)
    with locked(config.output) as lost:
        run = open_search(config, space, splits)
        _say(f"MLflow run of the search: {address.how_to_open(run.id)}")
        if not config.space:
            image = splits["train"].image
            flags = ", ".join(
                f"{name} {value}" for name, value in fitted(image, splits["train"].rows).items()
            )
            _say(f"space for {image.size}x{image.size} images of {len(image.classes)} classes: {flags}")
        splits = splits.keep(config.output)
        with Tracker(run, config.output, config.metrics, PATIENCE, _say, lost) as tracker:
            tracker.log_params(logged_settings(config) | {"search": space.shown})
            train = splits["train"]
            tracker.log_dataset(config.data, train.fingerprint, train.rows, train.quarantined)
            ended = "FAILED"
            try:
                gpu, need = _room(config, space)
                at_a_time, objective = _concurrent(config, need), make_objective(config, splits, gpu)
                settings = {
                    "job": config,
                    "objective": objective,
                    "splits": splits,
                    "parent_run": run.id,
                    "gpu": gpu,
                }
                trainable = tune.with_parameters(trial, tracking=address.with_secrets(), **settings)
                _run(config, need, space, trainable, at_a_time)
                result = _conclude(config, space, tracker, config.gpus_per_worker * gpu)
                ended = "FINISHED"
                return result
            except KeyboardInterrupt:
                ended = "KILLED"
                _say("the trials so far are kept; go on with --resume")
                raise
            finally:
                tracker.end(ended)
                if not lost.is_set():
                    _end_runs(config)


def _run(
    config: TuneConfig, need: Need, space: Space, trainable: type[tune.Trainable], at_a_time: int
) -> None:
    """Runs the remaining trials with Ray Tune."""
    records = ledger.read_all(config.output)
    over = sum(record.over for record in records)
    if over >= config.trials:
        return
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # An interrupted trial must not count as stopped by the scheduler, so that a resume continues it.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    # Ray Tune would copy the driver's keys into the runtime environment of every trial. Everybody who may list a
    # cluster's actors can read that. Nodes have keys of their own.
    ENV_VARS_TO_PROPAGATE.difference_update(SECRETS)
    proposals = Proposals(config, space, records)
    names = proposals.names
    # A trial only waits for its workers, so it requests no CPU: what waits must not hold what its workers need. It
    # runs on the driver's node, so that a lost node takes workers with it, but no trial.
    nothing = tune.PlacementGroupFactory([{"memory": 1024 * 1024, f"node:{get_node_ip_address()}": 0.0001}])
    session = f"{SESSION}{uuid.uuid4().hex[:8]}"
    progress = _Progress(config, over)
    tuner = tune.Tuner(
        tune.with_resources(trainable, nothing),
        tune_config=tune.TuneConfig(
            num_samples=config.trials - over,
            max_concurrent_trials=at_a_time,
            reuse_actors=True,
            search_alg=proposals,
            trial_name_creator=lambda one: names[one.trial_id],
            trial_dirname_creator=lambda one: names[one.trial_id],
        ),
        run_config=tune.RunConfig(
            name=session,
            storage_path=config.output,
            verbose=0,
            stop=Halving(config, records, names) if config.scheduler == "asha" else None,
            # Trials write checkpoints of their own.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=RESTARTS),
            callbacks=[progress],
        ),
    )
    with announced(need, progress.note):
        results = tuner.fit()
    for result in results:
        name = Path(result.path).name
        record = ledger.read(config.output, name)
        if result.error is not None and not record.over:
            reason = f"its process died: {reason_of(result.error)}"
            record = replace(record, status="interrupted", reason=reason)
            ledger.write(config.output, record)
            if record.run_id:
                with _tracker(config, record) as tracker:
                    tracker.end("FAILED", reason)
    # This includes folders of earlier starts that were killed.
    for folder in Path(config.output).glob(f"{SESSION}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _end_runs(config: TuneConfig) -> None:
    """Ends the MLflow runs of trials that no process trains any more. A resume opens them again."""

    def end() -> None:
        with contextlib.suppress(Exception):
            for record in ledger.read_all(config.output):
                if record.run_id and not record.over and record.status != "interrupted":
                    runs.end_run(runs.Run(record.run_id, None), "KILLED")

    # MLflow may not answer, and whoever sent a signal does not wait for long.
    thread = threading.Thread(target=end, daemon=True, name="mlflow")
    thread.start()
    thread.join(HURRIED)


def _tracker(config: TuneConfig, record: ledger.Record, seconds: float = PATIENCE) -> Tracker:
    """A tracker for a trial that no process trains."""
    output = str(ledger.run_folder(config.output, record))
    return Tracker(runs.Run(record.run_id, None), output, CURVES, seconds, _say, threading.Event())


def _conclude(config: TuneConfig, space: Space, parent: Tracker, gpus: float) -> dict[str, Any]:
    """Writes the report, registers the winner's model if asked for, and returns the job's result.

    Args:
        gpus: GPUs of each worker.
    """
    records = ledger.read_all(config.output)
    end = time.monotonic() + PATIENCE  # for all trials together
    for record in records:
        kept = ledger.run_folder(config.output, record) / UNDELIVERED
        if next(kept.glob("*.json"), None):  # MLflow did not answer when the trial ended
            with _tracker(config, record, max(0.0, end - time.monotonic())) as tracker:
                tracker.end("FAILED" if record.lost else "FINISHED", record.reason)
    best = ledger.ranked(records, config.metrics[0])
    if not best:
        reason = records[0].reason if records else "none was started"
        raise InputError(f"no trial could be measured; the first one's reason: {reason}")
    winner = best[0]
    command = train_command(replace(training(config, winner, output=f"{config.output}/winner"), run_name=""))
    status.show("tune: writing the report")
    files = report.write(config, space, records, command)
    for file in files:
        parent.log_file(str(file.relative_to(config.output)))
    parent.log_points([(int(winner.rungs[-1].time * 1000), len(records), winner.metrics)])
    model = str(ledger.run_folder(config.output, winner) / "model")
    if config.register and storage.exists(model):
        status.show("tune: drawing samples of the winner, and registering it")
        with _tracker(config, winner) as tracker:
            draw_exported(str(ledger.run_folder(config.output, winner)), config.seed, gpus)
            tracker.log_file(SAMPLES)
            tracker.log_model(model, config.register, config.alias)
            tracker.end()
        model = tracker.model or model
    status.clear()
    print(report.table(config, records), file=sys.stderr)
    if note := report.unequal(records):
        _say(note)
    print(f"command that trains the winner again:\n  {command}", file=sys.stderr)
    if again := sum(record.status == "interrupted" for record in records):
        print(f"interrupted trials: {again}; --resume makes another attempt", file=sys.stderr)
    return {
        "output": config.output,
        "model": model,
        "run_id": parent.run.id,
        "metrics": winner.metrics,
        "flags": winner.flags,
        "count": sum(not record.lost for record in records),
        "report": str(Path(config.output) / report.HTML),
        "command": command,
    }


def _room(config: TuneConfig, space: Space) -> tuple[bool, Need]:
    """True if trials train on GPUs, and what one trial needs. Waits until there is room for one.

    Raises:
        InputError: the cluster will never have room for a trial.
    """
    trial = apply(base(config), space.fixed)
    gpu = choose_gpu(trial.gpu, partial(room_needed, trial), _say)
    return gpu, room_needed(trial, gpu)


def _concurrent(config: TuneConfig, need: Need) -> int:
    """The number of trials to run at a time: as many as requested and as the cluster may hold."""
    wanted = min(config.concurrent, config.trials)
    return max(1, most_places(need, wanted * need.count) // need.count)


def _say(line: str) -> None:
    print(f"tune: {line}", file=sys.stderr, flush=True)


class _Progress(tune.Callback):
    """Shows a line for each measurement and for each trial that ends."""

    def __init__(self, config: TuneConfig, over: int) -> None:
        self._config, self._over = config, over
        self._display = Display("tune", config.trials, "trials")
        self.note = self._display.note

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        self._show(str(trial), result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._over += 1
        self._show(str(trial), trial.last_result)

    def on_experiment_end(self, trials: Any, **_: Any) -> None:
        self._display.close()

    def _show(self, name: str, result: dict[str, Any]) -> None:
        values = "  ".join(
            f"{metric} {result.get(metric, float('nan')):.4f}" for metric in self._config.metrics
        )
        self._display.update(self._over, f"trial {name} after {result.get(SEEN, 0)} images: {values}")
