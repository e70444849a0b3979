"""Formats untrusted text for cards and descriptions: one line, with everything escaped that Markdown or HTML acts on."""

from collections.abc import Iterable, Sequence
from typing import Any


def plain(value: Any) -> str:
    """Text in one line, escaped for Markdown and HTML."""
    text = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>|#" else c for c in text)


def table(head: str, rows: dict[str, Any]) -> str:
    """A Markdown table of two columns, with keys and values escaped."""
    lines = "".join(f"| {plain(key)} | {plain(value)} |\n" for key, value in rows.items())
    return f"| {head} | |\n| --- | --- |\n{lines}"


def grid(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table with any number of columns. The text of its rows is escaped, the head is not."""
    lines = [head, ["---"] * len(head), *([plain(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
