"""What a search found: a table, pictures, and one HTML page that needs no other file."""

import base64
import csv
import io
from html import escape
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pipeline import storage
from pipeline.diffusion.process import make_process
from pipeline.diffusion.schedules import resolve
from pipeline.models.export import load_model
from pipeline.models.sampling import preview
from pipeline.pictures import draw
from pipeline.tuning import ledger
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.ledger import Record
from pipeline.tuning.objective import paired
from pipeline.tuning.trial import training

FOLDER, HTML, TABLE = "report", "report.html", "trials.csv"
BEST, SAMPLES = 4, 36

Row = dict[str, str]


def write(config: TuneConfig, records: list[Record], command: str) -> list[Path]:
    """Writes report.html, trials.csv and the pictures by themselves.

    Args:
        records: at least one of them measured.
        command: trains the winner again.

    Returns:
        every file.
    """
    output = Path(config.output)
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _draw(config, records, folder)
    rows = table_rows(config, records)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    storage.write_atomic(str(output / TABLE), text.getvalue().encode())
    storage.write_atomic(str(output / HTML), _page(config, records, rows, pictures, command).encode())
    return [output / HTML, output / TABLE, *(path for path, _ in pictures)]


def table_rows(config: TuneConfig, records: list[Record]) -> list[Row]:
    """One row a trial, best first, those without a measurement last."""
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
    """The same as plain text."""
    rows = table_rows(config, records)
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = ["  ".join(name.ljust(widths[name]) for name in names)]
    lines += ["  ".join(row[name].ljust(widths[name]) for name in names) for row in rows]
    return "\n".join(text.rstrip() for text in lines)


def unequal(records: list[Record]) -> str:
    """Where trials are compared that have not seen equally many images, since batches are whole; "" where nowhere."""
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
    """The difference on the same images and noise; empty where they were not measured at the same rung."""
    if record.images != winner.images or not record.rungs[-1].per_image or not winner.rungs[-1].per_image:
        return ""
    mean, error = paired(record.rungs[-1].per_image, winner.rungs[-1].per_image)
    return f"{mean:.4f} ± {error:.4f}"


def _draw(config: TuneConfig, records: list[Record], folder: Path) -> list[tuple[Path, str]]:
    """(file, what it shows) each."""
    metric = config.metrics[0]
    best = ledger.ranked(records, metric)
    names = [f"{rank}. trial {record.name}" for rank, record in enumerate(best, start=1)]
    columns: dict[str, list[Any]] = {
        _short(flag): [record.flags.get(flag, "default") for record in best] for flag in varied_flags(best)
    }
    columns[metric] = [record.metrics[metric] for record in best]
    pictures = [(folder / "parallel.png", "Every trial as a line through its settings, coloured by rank.")]
    draw.save_parallel_coordinates(columns, pictures[-1][0])
    curves = {
        name: (
            [rung.seen or rung.images for rung in record.rungs],
            [rung.metrics[metric] for rung in record.rungs],
            [rung.metrics.get(f"{metric}_stderr", 0.0) for rung in record.rungs],
        )
        for name, record in zip(names, best, strict=True)
    }
    pictures.append((folder / "objective.png", "The objective over images seen, measured at the rungs."))
    draw.save_objective(curves, metric, pictures[-1][0])
    bars = {
        name: make_process(resolve(training(config, record).diffusion)).alpha_bar.numpy()
        for name, record in zip(names, best, strict=True)
    }
    pictures.append(
        (folder / "alpha_bar.png", "The signal that each trial's schedule keeps, coloured by rank.")
    )
    draw.save_ranked_schedules(bars, pictures[-1][0])
    if len(config.metrics) > 1:
        first, second = config.metrics
        front = [record.number for record in ledger.pareto_front(records, config.metrics)]
        points = {
            record.name: (record.metrics[first], record.metrics[second], record.number in front)
            for record in best
        }
        pictures.append((folder / "pareto.png", "Both objectives; the Pareto front is joined."))
        draw.save_pareto(points, (first, second), pictures[-1][0])
    if grids := _samples(config, best, names):
        pictures.append(
            (folder / "samples.png", "Samples of the best trials from the same noise, side by side.")
        )
        draw.save_side_by_side(grids, pictures[-1][0])
    return pictures


def _samples(config: TuneConfig, best: list[Record], names: list[str]) -> dict[str, np.ndarray]:
    grids = {}
    for name, record in list(zip(names, best, strict=True))[:BEST]:
        folder = ledger.run_folder(config.output, record) / "model"
        if folder.exists():
            model, spec = load_model(folder)
            images = preview(model, spec, SAMPLES, steps=config.sampling_steps, seed=config.seed)
            grids[name] = images.permute(0, 2, 3, 1).numpy()
    return grids


def _page(
    config: TuneConfig, records: list[Record], rows: list[Row], pictures: list[tuple[Path, str]], command: str
) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join(
        f'<tr class="{escape(row["status"])}">'
        + "".join(f"<td>{escape(value)}</td>" for value in row.values())
        + "</tr>\n"
        for row in rows
    )
    figures = "".join(
        f'<figure><img alt="{escape(about)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"><figcaption>{escape(about)}</figcaption></figure>\n'
        for path, about in pictures
    )
    counts = ", ".join(
        f"{sum(record.status == status for record in records)} {status}"
        for status in get_args(ledger.Status)
        if any(record.status == status for record in records)
    )
    best = ledger.ranked(records, config.metrics[0])[0]
    note = f" Note: {text}." if (text := unequal(records)) else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Search</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; font-size: 13px }} .scroll {{ overflow-x: auto }}
th, td {{ padding: 3px 8px; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }}
tr.failed td, tr.interrupted td {{ color: #a33 }} tr.stopped td {{ color: #777 }}
tr.finished:nth-child(1) td {{ font-weight: 600 }}
figure {{ margin: 1.5rem 0 }} img {{ max-width: 100% }} figcaption {{ color: #555 }}
pre {{ background: #f4f4f4; padding: .8rem; white-space: pre-wrap }}
</style></head><body>
<h1>Search by {escape(" and ".join(config.metrics))}</h1>
<p>{len(records)} trials: {escape(counts)}. Lower is better. All trials are measured on the same held-out images with
the same noise; “worse than the winner by” is the paired difference with its standard error.{escape(note)}</p>
<p>The winner, trial {escape(best.name)}, trains again with</p><pre>{escape(command)}</pre>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>
{body}</tbody></table></div>
{figures}</body></html>
"""


def _short(flag: str) -> str:
    return flag.rpartition(".")[2]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
