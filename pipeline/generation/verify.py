"""Whether a dataset is still what it was written as, and whether it can be made again."""

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from pipeline import storage
from pipeline.cluster.pool import Pool
from pipeline.display import Display
from pipeline.errors import InputError
from pipeline.generation import arithmetic, ledger
from pipeline.generation.chunks import Chunk, file_name, gaps
from pipeline.generation.config import GenerateConfig
from pipeline.generation.ledger import ChunkRecord
from pipeline.generation.sampler import Renderer, Setup
from pipeline.generation.writers import SUFFIX

NAMED = 5
DAMAGED, DIFFERENT = "damaged", "intact, but regenerating it gave different bytes"


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
    tasks = [Sealed(chunk, record.sha256, chunk in again) for chunk, record in whole.items()]
    checked, wrong = 0, dict[str, list[Chunk]]()
    with Display("verify", len(tasks), "files") as display:
        for chunk, how in pool(VerifyWork(setup), tasks):
            checked += 1
            if how:
                wrong.setdefault(how, []).append(chunk)
            display.update(checked, f"{sum(map(len, wrong.values()))} wrong")
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


class Sealed(NamedTuple):
    """A chunk to check: the digest that it had, and whether to make it again."""

    chunk: Chunk
    sha256: str
    again: bool


@dataclass(frozen=True)
class VerifyWork:
    """Says of a chunk what is wrong with its file, or ""; see `pool.Work`."""

    setup: Setup

    def start(self, device: str) -> Callable[[Sealed], tuple[Chunk, str]]:
        """Loads the model; raises InputError as `Renderer` and `arithmetic.check`."""
        renderer, output = Renderer(self.setup, device), self.setup.output
        arithmetic.check(output, renderer.arithmetic, self.setup.config.mixed_arithmetic)
        return partial(_check, output, renderer)


def _check(output: str, renderer: Renderer, task: Sealed) -> tuple[Chunk, str]:
    chunk = task.chunk
    try:
        stored = _sha256(map(storage.read_bytes, renderer.places(output, chunk)))
    except FileNotFoundError:
        stored = ""
    if stored != task.sha256:
        return chunk, DAMAGED
    if task.again and _sha256(renderer.contents(chunk, renderer.render(chunk))) != stored:
        return chunk, DIFFERENT
    return chunk, ""


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
