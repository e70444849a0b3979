"""Which samples go in which file: arithmetic, whatever the number of samples.

Files are pieces of fixed chunks of `rows_per_file` samples. A job's last file may end inside its chunk; if the count
is raised later, the rest of that chunk becomes a file of its own, so nothing that exists is rewritten.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_NAME = re.compile(r"train-(\d{12})-(\d{12})\.(parquet|tar|png)")


class Piece(NamedTuple):
    """Samples [start, stop) of one file."""

    start: int
    stop: int


def file_name(piece: Piece, suffix: str) -> str:
    """The name says which samples are in it."""
    return f"train-{piece.start:012d}-{piece.stop:012d}.{suffix}"


def parse_name(name: str) -> Piece | None:
    """The inverse of `file_name`; None for a foreign name."""
    match = _NAME.fullmatch(name)
    return Piece(int(match[1]), int(match[2])) if match and int(match[1]) < int(match[2]) else None


def gaps(count: int, finished: Iterable[Piece]) -> Iterator[Piece]:
    """What of the first `count` samples is in no finished piece, in order."""
    position = 0
    for piece in [*sorted(finished), Piece(count, count)]:
        if position < (stop := min(piece.start, count)):
            yield Piece(position, stop)
        position = max(position, piece.stop)


def pieces(span: Piece, rows_per_file: int) -> Iterator[Piece]:
    """The files that a span of samples is written as: cut where the chunks end."""
    position = span.start
    while position < span.stop:
        stop = min((position // rows_per_file + 1) * rows_per_file, span.stop)
        yield Piece(position, stop)
        position = stop


def tasks(spans: list[Piece], rows_per_file: int, most: int) -> list[Piece]:
    """Spans cut into runs of whole files, one run a task: about `most` of them, whatever the number of files."""
    files = sum(-(-(span.stop - span.start) // rows_per_file) for span in spans)
    return [run for span in spans for run in pieces(span, rows_per_file * max(1, -(-files // most)))]


def batches(piece: Piece, batch_size: int) -> Iterator[tuple[range, slice]]:
    """The whole batches that cover a piece, and which of their samples belong to it.

    Batches are always full and begin at multiples of `batch_size`: a sample is computed beside the same
    neighbours whatever the count, so its bytes never depend on them.
    """
    for start in range(piece.start // batch_size * batch_size, piece.stop, batch_size):
        first, last = max(piece.start, start), min(piece.stop, start + batch_size)
        yield range(start, start + batch_size), slice(first - start, last - start)
