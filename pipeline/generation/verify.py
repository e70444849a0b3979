"""Whether a dataset is still what it was written as, and whether it can be made again."""

import hashlib
import random
from collections.abc import Iterable
from typing import Any

from pipeline import storage
from pipeline.display import Display
from pipeline.errors import InputError
from pipeline.generation import ledger
from pipeline.generation.chunks import Chunk, file_name, gaps
from pipeline.generation.config import GenerateConfig
from pipeline.generation.ledger import ChunkRecord
from pipeline.generation.pool import Pool
from pipeline.generation.sampler import Renderer, Setup
from pipeline.generation.writers import SUFFIX

NAMED = 5
DAMAGED, DIFFERENT = "damaged", "sound, but made again with other bytes"


def verify(setup: Setup, whole: dict[Chunk, ChunkRecord], pool: Pool) -> dict[str, float]:
    """Reads every file, and makes a random share of them again.

    Args:
        whole: the chunks whose files have the right length.

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
    again = {chunk for chunk in whole if random.random() < config.verify_share}
    again |= {random.choice(list(whole))}
    rows = [
        {"start": chunk.start, "stop": chunk.stop, "sha256": record.sha256, "again": chunk in again}
        for chunk, record in whole.items()
    ]
    display, checked, wrong = Display("verify", len(rows), "files"), 0, dict[str, list[Chunk]]()
    try:
        for row in pool(Verifier, rows, setup):
            checked += 1
            display.update(checked, f"{sum(map(len, wrong.values()))} wrong")
            if row["wrong"]:
                wrong.setdefault(row["wrong"], []).append(Chunk(row["start"], row["stop"]))
    finally:
        display.close()
    for chunk in wrong.get(DAMAGED, []):
        storage.remove(ledger.record_uri(setup.output, chunk, config.format))
    if wrong:
        named = "; ".join(
            f"{len(found)} {how}: {_names(found, config)}" for how, found in sorted(wrong.items())
        )
        raise InputError(
            f"--output {config.output}: of {checked} files {named}. The same command without --verify makes damaged "
            "files again"
        )
    return {"verified": checked, "regenerated": len(again)}


def _names(chunks: list[Chunk], config: GenerateConfig) -> str:
    names = [file_name(chunk, SUFFIX[config.format]) for chunk in sorted(chunks)]
    return ", ".join(names[:NAMED] + ["and so on"] * (len(names) > NAMED))


class Verifier:
    """Called with chunks; see `sampler.SamplerActor`."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._renderer = setup, Renderer(setup)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Says what is wrong with a chunk's file, or ""."""
        result = {"start": row["start"], "stop": row["stop"], "wrong": ""}
        chunk, renderer = Chunk(int(row["start"]), int(row["stop"])), self._renderer
        try:
            stored = _sha256(map(storage.read_bytes, renderer.places(self._setup.output, chunk)))
        except FileNotFoundError:
            stored = ""
        if stored != row["sha256"]:
            return result | {"wrong": DAMAGED}
        if row["again"] and _sha256(renderer.contents(chunk, renderer.render(chunk))) != stored:
            return result | {"wrong": DIFFERENT}
        return result


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
