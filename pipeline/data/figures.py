"""Keeps the metrics of generated samples beside them: in figures.json and at the end of their card."""

import json
import sys
from typing import Any

from pipeline import storage
from pipeline.data.generated import read_manifest
from pipeline.data.manifest import CARD
from pipeline.errors import InputError
from pipeline.lock import locked
from pipeline.markdown import grid, table
from pipeline.redact import one_line

FIGURES = "figures.json"
_HEAD = "\n## Measured\n"
_REAL, _COUNT, _ERRORS = "_real", "_images", ("_stderr", "_std")


def record(uri: str, fingerprint: str, metrics: dict[str, float], on: dict[str, str]) -> None:
    """Writes the metrics of an evaluation beside the samples that it measured, and into their card.

    A failure is reported in one line on stderr and is no error, because the caller has the metrics anyway. An earlier
    evaluation with the same `on` is replaced; others stay.

    Args:
        uri: folder that jobs/generate.py wrote.
        fingerprint: `sha256` in the manifest of the samples that were measured.
        metrics: metrics by name.
        on: the data and the settings of the measurement, as shown in the card.
    """
    try:
        with storage.reporting(f"{uri} can't be written"), locked(uri):
            manifest = read_manifest(uri, "--samples") or {}
            if manifest.get("sha256") != fingerprint:
                raise InputError("the samples changed since they were measured")
            others = [one for one in _read(uri, fingerprint) if one["on"] != on]
            evaluations = [*others, {"on": on, "metrics": metrics}]
            content = {"sha256": fingerprint, "evaluations": evaluations}
            storage.write_atomic(storage.join(uri, FIGURES), json.dumps(content, indent=1).encode())
            if storage.exists(card := storage.join(uri, CARD)):
                text = storage.read_bytes(card).decode().split(_HEAD)[0]
                storage.write_atomic(card, (text + section(uri, fingerprint)).encode())
    except (InputError, UnicodeDecodeError) as error:
        print(
            f"evaluate: the metrics were not added to the card of {uri}: {one_line(error)}", file=sys.stderr
        )


def section(uri: str, fingerprint: str) -> str:
    """The section of a card with the metrics of the samples that have this fingerprint; "" if there are none."""
    evaluations = _read(uri, fingerprint)
    return _HEAD * bool(evaluations) + "".join(_shown(one["metrics"], one["on"]) for one in evaluations)


def _read(uri: str, fingerprint: str) -> list[dict[str, Any]]:
    try:
        content = json.loads(storage.read_bytes(storage.join(uri, FIGURES)))
        return list(content["evaluations"]) if content["sha256"] == fingerprint else []
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # the next evaluation rewrites it
        return []


def _shown(metrics: dict[str, float], on: dict[str, str]) -> str:
    beside = (_REAL, _COUNT, *_ERRORS)
    rows = [
        (name, _value(metrics, name, ""), _value(metrics, name, _REAL), metrics.get(name + _COUNT, ""))
        for name in metrics
        if not name.endswith(beside)
    ]
    head = ("figure", "samples", "held-out images in their place", "so many samples, if not all")
    return f"\n{grid(head, rows)}\n{table('measured on', on)}"


def _value(metrics: dict[str, float], name: str, of: str) -> str:
    if (value := metrics.get(name + of)) is None:
        return ""
    error = next((metrics[name + kind + of] for kind in _ERRORS if name + kind + of in metrics), None)
    return f"{value:.5g}" + (f" ± {error:.2g}" if error is not None else "")
