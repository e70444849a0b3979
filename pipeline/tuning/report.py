"""Reports a search: a table, and one interactive HTML page that needs no other file and no network.

The page is report.html beside this file, with the data inserted as JSON. It draws in plain JavaScript, because
libraries that draw parallel coordinates take megabytes and need updates.
"""

import base64
import csv
import io
import math
import warnings
from pathlib import Path
from typing import Any, get_args

import numpy as np
import optuna

from pipeline import storage
from pipeline.diffusion.process import make_process
from pipeline.diffusion.schedules import resolve
from pipeline.models.export import load_model
from pipeline.models.sampling import preview
from pipeline.output import to_json
from pipeline.pictures import draw
from pipeline.pictures.make import as_pixels
from pipeline.tuning import ledger
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.ledger import Record
from pipeline.tuning.objective import paired
from pipeline.tuning.space import Space
from pipeline.tuning.trial import training

HTML, TABLE = "report.html", "trials.csv"
PAGE = Path(__file__).with_name(HTML)
BEST, SAMPLES = 4, 36
# Number of points on a schedule's curve.
SIGNAL = 33
# Fewest trials for which importance is estimated, and number of shuffles to compare it with.
FEWEST, SHUFFLES = 12, 19
# Share of the trials that count as good.
GOOD = 1 / 3

Row = dict[str, str]


def write(config: TuneConfig, space: Space, records: list[Record], command: str) -> list[Path]:
    """Writes report.html and trials.csv.

    Args:
        records: the trials; at least one must be measured.
        command: command that trains the winner again.

    Returns:
        the paths of both files.
    """
    output = Path(config.output)
    rows = table_rows(config, records)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    storage.write_atomic(str(output / TABLE), text.getvalue().encode())
    # Text of users must not end the HTML element that contains the data.
    data = to_json(_page(config, space, records, rows, command)).replace("<", "\\u003c")
    storage.write_atomic(str(output / HTML), PAGE.read_text().replace(">DATA<", f">{data}<").encode())
    return [output / HTML, output / TABLE]


def table_rows(config: TuneConfig, records: list[Record]) -> list[Row]:
    """One row for each trial, best first, trials without a measurement last."""
    best = ledger.ranked(records, config.metrics[0])
    others = [record for record in records if record not in best]
    front = ledger.pareto_front(records, config.metrics) if len(config.metrics) > 1 else []
    varied = varied_flags(records)
    rows = []
    for rank, record in enumerate([*best, *others], start=1):
        row = {
            "rank": str(rank) if record in best else "",
            "trial": record.name,
            "status": record.status,
            "images": str(record.seen),
        }
        for metric in config.metrics:
            value, error = record.metrics.get(metric), record.metrics.get(f"{metric}_stderr")
            row[metric] = "" if value is None else f"{value:.4f}" + (f" ± {error:.4f}" if error else "")
        row["worse than the winner by"] = _gap(record, best[0]) if best and record in best[1:] else ""
        if len(config.metrics) > 1:
            row["Pareto front"] = "yes" if record in front else ""
        row |= {_short(flag): _shown(record.flags.get(flag, "default")) for flag in varied}
        row["note"] = record.reason
        rows.append(row)
    return rows


def table(config: TuneConfig, records: list[Record]) -> str:
    """The table as plain text."""
    rows = table_rows(config, records)
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = ["  ".join(name.ljust(widths[name]) for name in names)]
    lines += ["  ".join(row[name].ljust(widths[name]) for name in names) for row in rows]
    return "\n".join(text.rstrip() for text in lines)


def unequal(records: list[Record]) -> str:
    """A note if trials were compared that saw different numbers of images, because batches are whole; "" if none were."""
    seen: dict[int, set[int]] = {}
    for record in records:
        for rung in record.rungs:
            seen.setdefault(rung.images, set()).add(rung.seen or rung.images)
    places = [
        f"{min(some)} to {max(some)} at the rung of {images}"
        for images, some in sorted(seen.items())
        if len(some) > 1
    ]
    return f"batches are whole, so trials have seen different numbers of images: {', '.join(places)}" * bool(
        places
    )


def varied_flags(records: list[Record]) -> list[str]:
    """The flags in which trials differ, in the order of the space."""
    names = dict.fromkeys(name for record in records for name in record.flags)
    return [name for name in names if len({str(record.flags.get(name, "default")) for record in records}) > 1]


def _gap(record: Record, winner: Record) -> str:
    """The paired difference on the same images and noise; "" if the trials were not measured at the same rung."""
    if record.images != winner.images or not record.rungs[-1].per_image or not winner.rungs[-1].per_image:
        return ""
    mean, error = paired(record.rungs[-1].per_image, winner.rungs[-1].per_image)
    return f"{mean:.4f} ± {error:.4f}"


def _page(
    config: TuneConfig, space: Space, records: list[Record], rows: list[Row], command: str
) -> dict[str, Any]:
    """The data of the page."""
    metrics, by_name = config.metrics, {record.name: record for record in records}
    rank = {
        metric: {record.name: i for i, record in enumerate(ledger.ranked(records, metric), start=1)}
        for metric in metrics
    }
    front = ledger.pareto_front(records, metrics) if len(metrics) > 1 else []
    best, varied = ledger.ranked(records, metrics[0])[0], varied_flags(records)
    counts = ", ".join(
        f"{sum(record.status == status for record in records)} {status}"
        for status in get_args(ledger.Status)
        if any(record.status == status for record in records)
    )
    note = f" Note: {text}." if (text := unequal(records)) else ""
    return {
        "title": f"Search of {storage.title(config.data)} by {' and '.join(metrics)}",
        "about": f"{len(records)} trials: {counts}. Lower is better. All trials are measured on the same held-out images "
        f"with the same noise; “worse than the winner by” is the paired difference with its standard error.{note}",
        "winner": f"The winner, trial {best.name}, trains again with",
        "command": command,
        "metrics": metrics,
        "flags": [_short(flag) for flag in varied],
        "columns": list(rows[0]),
        "trials": [
            {
                "name": record.name,
                "status": record.status,
                "rank": {metric: rank[metric].get(record.name) for metric in metrics},
                "metrics": {metric: record.metrics[metric] for metric in metrics if metric in record.metrics},
                "flags": {_short(flag): _plain(record.flags.get(flag, "default")) for flag in varied},
                "front": record in front,
                "note": record.reason,
                "curve": [
                    {"seen": rung.seen or rung.images, "metrics": rung.metrics} for rung in record.rungs
                ],
                "signal": _signal(config, record) if record.name in rank[metrics[0]] else [],
                "row": list(row.values()),
            }
            for row in rows
            for record in (by_name[row["trial"]],)
        ],
        "importance": {metric: importance(config, space, records, metric) for metric in metrics},
        "importance_note": "how far the best third of the trials differ from all trials in a setting (PED-ANOVA); one in "
        f"{SHUFFLES + 1} settings without any effect passes its mark by chance; click a bar to plot it",
        "samples": _samples(config, records),
    }


def importance(config: TuneConfig, space: Space, records: list[Record], metric: str) -> list[dict[str, Any]]:
    """The importance of each setting by PED-ANOVA (Watanabe et al. 2023), the most important first.

    PED-ANOVA uses only ranks, which suits trials that were stopped at different rungs and so can't be compared by
    value. fANOVA uses values, takes minutes for many trials, and can't tell effects from chance with few trials.

    Returns:
        for each setting its `share` of the total importance, and as `chance` the largest share in `SHUFFLES` shuffles
        of the ranks; empty if there are too few trials.
    """
    from optuna.importance import PedAnovaImportanceEvaluator  # imports scikit-learn

    best = [one for one in ledger.ranked(records, metric) if one.parameters.keys() >= space.entries.keys()]
    entries = {
        name: entry
        for name, entry in space.entries.items()
        if len({record.parameters.get(name) for record in best}) > 1
    }
    if len(best) < FEWEST or not entries:
        return []
    study = optuna.create_study()
    for record in best:
        parameters = {name: record.parameters[name] for name in entries}
        study.add_trial(optuna.trial.create_trial(params=parameters, distributions=entries, value=0.0))
    ranks, chance = np.arange(len(best)) / len(best), np.random.default_rng(config.seed)

    measure = PedAnovaImportanceEvaluator(target_quantile=GOOD)

    def of_order(values: np.ndarray) -> dict[str, float]:
        with warnings.catch_warnings(action="ignore"):  # it warns that lower is better
            found: dict[str, float] = measure.evaluate(
                study, target=lambda trial: float(values[trial.number])
            )
        return found

    found = of_order(ranks)
    shuffled = [of_order(chance.permutation(ranks)) for _ in range(SHUFFLES)]
    total = sum(found.values()) or 1.0
    return [
        {
            "name": _short(name),
            "flags": [_short(flag) for flag in space.decode({name: best[0].parameters[name]})],
            "share": round(float(found[name]) / total, 4),
            "chance": round(max(float(some[name]) for some in shuffled) / total, 4),
        }
        for name in sorted(found, key=lambda name: -found[name])
    ]


def _signal(config: TuneConfig, record: Record) -> list[list[float]]:
    """[t / T, alpha_bar] of a trial's schedule, at `SIGNAL` of its steps."""
    alpha_bar = make_process(resolve(training(config, record).diffusion)).alpha_bar.numpy()
    steps = np.unique(np.linspace(0, len(alpha_bar) - 1, SIGNAL).round().astype(int))
    return [[round((t + 1) / len(alpha_bar), 3), round(float(alpha_bar[t]), 3)] for t in steps]


def _samples(config: TuneConfig, records: list[Record]) -> list[dict[str, str]]:
    """Samples of the best trials by each metric, from the same noise, as PNG data URIs."""
    best = {one.name: one for metric in config.metrics for one in ledger.ranked(records, metric)[:BEST]}
    found = []
    for record in best.values():
        folder = ledger.run_folder(config.output, record) / "model"
        if folder.exists():
            images = preview(*load_model(folder), SAMPLES, steps=config.sampling_steps, seed=config.seed)
            buffer = io.BytesIO()
            draw.grid(as_pixels(images), math.isqrt(SAMPLES)).save(buffer, "PNG")
            uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            found.append({"name": record.name, "picture": uri})
    return found


def _plain(value: Any) -> Any:
    """Numbers unchanged, everything else as text."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _short(flag: str) -> str:
    return flag.rpartition(".")[2]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
