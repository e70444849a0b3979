"""A search with Ray Tune: every trial is a Ray Train run, judged by a figure that all schedules share.

The state of a search is its ledger (see ledger.py): a resume proposes what is unfinished again and tells
Optuna and the scheduler what was measured before, so it needs none of Ray Tune's own files, which hold absolute
paths and pickled objects.
"""

import json
import os
import random
import shutil
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune

from pipeline import storage
from pipeline.cluster.ray_internals import ENV_VARS_TO_PROPAGATE
from pipeline.config import to_dict
from pipeline.data.index import open_dataset
from pipeline.display import Display
from pipeline.errors import InputError
from pipeline.tracking import registry, runs
from pipeline.tuning import ledger, report
from pipeline.tuning.config import TuneConfig, base, check, finished
from pipeline.tuning.ledger import Record
from pipeline.tuning.objective import Objective, make_objective
from pipeline.tuning.proposals import Proposals, make_scheduler
from pipeline.tuning.space import Space, apply, load_space, train_command
from pipeline.tuning.trial import TrainTrial, Trial, training

SEARCH_FILE = "search.json"
SESSION = "ray-"
SECRETS = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"
# Starts of a trial whose own process died; training within it has restarts of its own.
RESTARTS = 2


def check_search(config: TuneConfig) -> Space:
    """Everything that can be known to be wrong before a cluster is asked for anything.

    Raises:
        InputError: settings or a space of which no trial could be run, an output that already holds a search.
    """
    check(config)
    space = load_space(config.space)
    storage.check_writable(config.output)
    open_dataset(config.data, "validation")
    fixed = finished(config, apply(base(config), space.fixed))
    if fixed.batch_size < config.workers:
        raise InputError(f"--workers {config.workers}: more than the space's batch_size {fixed.batch_size}")
    if (Path(config.output) / SEARCH_FILE).exists() and not config.resume:
        raise InputError(f"--output {config.output} already holds a search: pass --resume, or another folder")
    make_scheduler(config, space, [])
    return space


def search(config: TuneConfig, trial: type[Trial] = TrainTrial) -> dict[str, Any]:
    """Runs the search, or what is left of it, and reports.

    Args:
        trial: what a trial does at each rung.

    Raises:
        InputError: see `check_search`; also a resume with other settings, or when no trial could be measured.
    """
    # Trials run in folders of Ray's.
    config = replace(config, data=storage.absolute(config.data), output=storage.absolute(config.output))
    space = check_search(config)
    parent = _open(config, space)
    at_a_time = _concurrent(config)
    objective = make_objective(config)
    records = ledger.read_all(config.output)
    # A trial that was killed before it knew its run will open another.
    runs.delete_children(parent, keep={record.run_id for record in records})
    left = config.trials - sum(record.over for record in records)
    try:
        if left > 0:
            _run(config, space, records, left, at_a_time, trial, objective, parent)
        return _conclude(config, parent)
    except InputError:
        runs.end_run(parent, "FAILED")
        raise


def _run(
    config: TuneConfig,
    space: Space,
    records: list[Record],
    left: int,
    at_a_time: int,
    trial: type[Trial],
    objective: Objective,
    parent: runs.Run,
) -> None:
    """Runs `left` trials with Ray Tune."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # Interrupted is not stopped by the scheduler: such trials go on after a resume.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    # Ray Tune would write the driver's keys into every trial's runtime environment, which whoever may list a
    # cluster's actors can read. The nodes have keys of their own.
    ENV_VARS_TO_PROPAGATE.difference_update(SECRETS)
    random.seed(config.seed)
    proposals = Proposals(config, space, records)
    names = proposals.names
    trainable = tune.with_parameters(trial, job=config, objective=objective, parent_run=parent.id)
    # A trial only waits for its workers and asks for no CPU: nothing they need can be held by what waits for them.
    nothing = tune.PlacementGroupFactory([{"memory": 1024 * 1024}])
    session = f"{SESSION}{uuid.uuid4().hex[:8]}"
    tuner = tune.Tuner(
        tune.with_resources(trainable, nothing),
        tune_config=tune.TuneConfig(
            num_samples=left,
            max_concurrent_trials=at_a_time,
            reuse_actors=config.scheduler != "pbt",
            search_alg=proposals,
            scheduler=make_scheduler(config, space, records),
            trial_name_creator=lambda one: names[one.trial_id],
            trial_dirname_creator=lambda one: names[one.trial_id],
        ),
        run_config=tune.RunConfig(
            name=session,
            storage_path=config.output,
            verbose=0,
            # Trials have checkpoints of their own; the scheduler asks for one where it needs it.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=RESTARTS),
            callbacks=[_Progress(config)],
        ),
    )
    results = tuner.fit()
    for result in results:
        name = Path(result.path).name
        record = ledger.read(config.output, name)
        if result.error is not None and not record.over:
            reason = f"its process died: {' '.join(str(result.error).split())[-300:]}"
            if record.run_id:
                runs.end_run(runs.Run(record.run_id), "FAILED", reason=reason)
            ledger.write(config.output, replace(record, status="failed", reason=reason))
    # Also those of starts that were killed.
    for folder in Path(config.output).glob(f"{SESSION}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _conclude(config: TuneConfig, parent: runs.Run) -> dict[str, Any]:
    """Table, report, winner."""
    records = ledger.read_all(config.output)
    best = ledger.ranked(records, config.metrics[0])
    if not best:
        reason = records[0].reason if records else "none was started"
        raise InputError(f"no trial could be measured; the first one's reason: {reason}")
    winner = best[0]
    command = train_command(replace(training(config, winner, output=f"{config.output}/winner"), run_name=""))
    files = report.write(config, records, command)
    for file in files:
        runs.log_file(parent, file)
    runs.log_points(parent, [(int(winner.rungs[-1].time * 1000), len(records), winner.metrics)])
    model = str(ledger.run_folder(config.output, winner) / "model")
    if config.register and storage.exists(model):
        nested = runs.Run(winner.run_id)
        model = registry.log_model(nested, Path(model), config.register, config.alias)
        runs.end_run(nested)
    runs.end_run(parent)
    print(report.table(config, records), file=sys.stderr)
    print(f"winner's training again:\n  {command}", file=sys.stderr)
    return {
        "output": config.output,
        "model": model,
        "run_id": parent.id,
        "metrics": winner.metrics,
        "flags": winner.flags,
        "count": sum(record.status != "failed" for record in records),
        "report": str(Path(config.output) / report.HTML),
        "command": command,
    }


def _open(config: TuneConfig, space: Space) -> runs.Run:
    """One parent run for one search, and a note of what can't change under it."""
    note = Path(config.output) / SEARCH_FILE
    fixed = _fixed(config, space)
    run: runs.Run | None = None
    if note.exists():
        old = json.loads(note.read_text())
        for key, now in fixed.items():
            if old["fixed"].get(key) != now:
                raise InputError(
                    f"--resume: {key} was {old['fixed'].get(key)} in {config.output} and is {now} now; keep it, or "
                    "search in another folder"
                )
        run = runs.reopen_run(old["run_id"], config.metrics)
    if run is None:
        params = to_dict(config) | {"search": fixed["space"]}
        tags = {"ray_ddpm.search": config.output}
        run = runs.start_run(config.experiment, "search", params, tags)
    storage.write_atomic(str(note), json.dumps({"run_id": run.id, "fixed": fixed}, indent=1).encode())
    return run


def _fixed(config: TuneConfig, space: Space) -> dict[str, Any]:
    names = "objective scheduler images rungs reduction terms max_images samples sampling_steps seed"
    entries = {name: str(entry) for name, entry in space.entries.items()}
    return {
        "data": open_dataset(config.data).fingerprint,
        "space": space.fixed | entries,
        **{name: getattr(config, name) for name in names.split()},
    }


def _concurrent(config: TuneConfig) -> int:
    """How many trials run at a time.

    Raises:
        InputError: not one fits the cluster, or not the population of population based training.
    """
    have = ray.cluster_resources().get("CPU", 1.0)
    each = config.workers * config.cpus_per_worker
    fit = int(have / each + 1e-6)
    if fit < 1:
        raise InputError(
            f"--workers {config.workers} of {config.cpus_per_worker:g} CPUs are more than the cluster's {have:g}"
        )
    if config.scheduler == "pbt":
        if fit < config.trials:
            raise InputError(
                f"--scheduler pbt trains all {config.trials} trials at a time, which takes {config.trials * each:g} "
                f"CPUs of the cluster's {have:g}: lower --cpus-per-worker or --trials"
            )
        return config.trials
    return min(config.concurrent, fit, config.trials)


class _Progress(tune.Callback):
    """A line for each measurement and each trial that ends."""

    def __init__(self, config: TuneConfig) -> None:
        self._config = config
        self._display = Display("tune", config.trials, "trials")

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        self._show(str(trial), result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._show(str(trial), trial.last_result)

    def on_experiment_end(self, trials: Any, **_: Any) -> None:
        self._display.close()

    def _show(self, name: str, result: dict[str, Any]) -> None:
        over = sum(record.over for record in ledger.read_all(self._config.output))
        values = "  ".join(
            f"{metric} {result.get(metric, float('nan')):.4f}" for metric in self._config.metrics
        )
        self._display.update(over, f"trial {name} after {result.get('images', 0)} images: {values}")
