"""Whether a dataset is still what it was written as, and whether it can be made again."""

import hashlib
import random
from collections.abc import Iterable
from typing import Any

from pipeline.data import storage
from pipeline.display import Display
from pipeline.errors import InputError
from pipeline.generation import ledger, pool
from pipeline.generation.config import GenerateConfig
from pipeline.generation.ledger import Note
from pipeline.generation.plan import Piece, file_name, gaps
from pipeline.generation.sampler import Renderer, Setup
from pipeline.generation.writers import SUFFIX

NAMED = 5
DAMAGED, DIFFERENT = "damaged", "sound, but made again with other bytes"


def verify(setup: Setup, whole: dict[Piece, Note], run: pool.Runner) -> dict[str, float]:
    """Reads every file, and makes a random share of them again.

    Args:
        whole: the pieces whose files have the right length.

    Returns:
        how many files were checked, and how many of them made again.

    Raises:
        InputError: something is missing, damaged, or comes out otherwise; names it.
    """
    config = setup.config
    if gap := next(gaps(config.count, whole), None):
        raise InputError(
            f"--output {config.output}: samples {gap.start} to {gap.stop - 1} are missing or their file is cut short: "
            "run the same command without --verify"
        )
    again = {piece for piece in whole if random.random() < config.verify_share}
    again |= {random.choice(list(whole))}
    rows = [
        {"start": piece.start, "stop": piece.stop, "sha256": note.sha256, "again": piece in again}
        for piece, note in whole.items()
    ]
    display, checked, wrong = Display("verify", len(rows), "files"), 0, dict[str, list[Piece]]()
    try:
        for row in run(Verifier, rows, setup):
            checked += 1
            display.update(checked, f"{sum(map(len, wrong.values()))} wrong")
            if row["wrong"]:
                wrong.setdefault(row["wrong"], []).append(Piece(row["start"], row["stop"]))
    finally:
        display.close()
    for piece in wrong.get(DAMAGED, []):
        storage.remove(ledger.note_uri(setup.output, piece, config.format))
    if wrong:
        named = "; ".join(
            f"{len(found)} {how}: {_names(found, config)}" for how, found in sorted(wrong.items())
        )
        raise InputError(
            f"--output {config.output}: of {checked} files {named}. The same command without --verify makes damaged "
            "files again"
        )
    return {"verified": checked, "regenerated": len(again)}


def _names(pieces: list[Piece], config: GenerateConfig) -> str:
    names = [file_name(piece, SUFFIX[config.format]) for piece in sorted(pieces)]
    return ", ".join(names[:NAMED] + ["and so on"] * (len(names) > NAMED))


class Verifier:
    """Called with pieces; see `sampler.Sampler`."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._renderer = setup, Renderer(setup)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Says what is wrong with a piece's file, or ""."""
        result = {"start": row["start"], "stop": row["stop"], "wrong": ""}
        piece, renderer = Piece(int(row["start"]), int(row["stop"])), self._renderer
        try:
            stored = _sha256(map(storage.read_bytes, renderer.places(self._setup.output, piece)))
        except FileNotFoundError:
            stored = ""
        if stored != row["sha256"]:
            return result | {"wrong": DAMAGED}
        if row["again"] and _sha256(renderer.contents(piece, renderer.render(piece))) != stored:
            return result | {"wrong": DIFFERENT}
        return result


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
