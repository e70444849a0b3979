"""Decides what the label of an image means, for jobs/prepare.py and for training on raw files alike."""

import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.redact import printable

MOST_UNNAMED_CLASSES = 100_000
UNPUBLISHED = "-1"  # data sets write this where a label is withheld
_MOST_DIGITS = 18  # always fit an int64
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN = 60  # characters of a wrong label that errors show


def label_text(value: Any, names: tuple[str, ...] = ()) -> str | None:
    """A label as text, given as text, bytes, a number or nothing; None for nothing.

    Args:
        names: names of the classes 0, 1, …, if the source has them.
    """
    if value is None or value != value:  # pandas writes NaN for a missing value
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (bytes, str)):
        text = value.decode(errors="replace") if isinstance(value, bytes) else value
        # A lone surrogate, such as a byte of a table that is not UTF-8, can't be stored.
        return (printable(text) if _SURROGATE.search(text) else text).strip() or None
    if isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    # This covers booleans too, and whole numbers stored as floats or decimals.
    return str(int(value)) if _is_whole(value) else str(value)


def _is_whole(value: Any) -> bool:
    if isinstance(value, Decimal):
        return value == value.to_integral_value()
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def class_text(value: Any, names: tuple[str, ...] = ()) -> tuple[str | None, str]:
    """An image's class from a column's value: text, a number, a boolean, nothing, or a list of one of these.

    Args:
        names: names of the classes 0, 1, …, if the column has them.

    Returns:
        the label as text, or None for no label; and the reason why the value is no class, or "".
    """
    if isinstance(value, (list, tuple)):
        if len(value) > 1:
            return None, f"label {_shown(value)} names {len(value)} classes"
        return class_text(value[0] if value else None, names)
    text = label_text(value)
    if text is None or isinstance(value, (bytes, str)):
        return text, ""
    if text == UNPUBLISHED:
        return None, ""
    if not is_number(text):
        return None, f"label {_shown(text)} is not a class number"
    if names and int(text) >= len(names):
        return None, f"label {text} is not among the {len(names)} classes"
    return (names[int(text)] if names else text), ""


def _shown(value: Any) -> str:
    text = printable(str(value))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def is_number(label: str) -> bool:
    """True if a label is itself a class number."""
    return label.isdecimal() and len(label) <= _MOST_DIGITS


def name_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """The classes of labels that come without a list of names.

    Labels that are all numbers give the classes 0 to the largest. Other labels give their texts, sorted.

    Returns:
        names of the classes; empty for numbers too large to be classes.

    Raises:
        InputError: there are too many different texts for classes.
    """
    found = set(labels) - {UNPUBLISHED}
    if all(map(is_number, found)):
        top = max(map(int, found), default=-1)
        return _counted(top + 1) if top < MOST_UNNAMED_CLASSES else ()
    if len(found) > MOST_UNNAMED_CLASSES:
        raise InputError(
            f"more than {MOST_UNNAMED_CLASSES:,} different labels, such as {min(found)!r}: too many for classes"
        )
    return tuple(sorted(found))


def names_of_all(labels: Iterable[str], first: str) -> tuple[str, ...]:
    """The classes of a source, from all its labels. If the first label is a number, only numbers count as classes."""
    return name_classes(filter(is_number, labels) if is_number(first) else labels)


def class_numbers(classes: tuple[str, ...]) -> Callable[[str | None], int | None]:
    """Returns a function from a label to its class number: -1 for no label, None for a label that is no class.

    Args:
        classes: names of all classes, in order; empty = labels are class numbers themselves.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    counted = classes == _counted(len(classes))

    def number(label: str | None) -> int | None:
        if label is None or (label == UNPUBLISHED and label not in numbers):
            return -1
        if counted and is_number(label):  # int() also accepts leading zeros
            return int(label) if not classes or int(label) < len(classes) else None
        return numbers.get(label)

    return number


def unknown_label(label: str | None, classes: tuple[str, ...]) -> str:
    """The reason why an image can't be used whose label is no class."""
    known = f"not among the {len(classes)} classes" if classes else "not a class number"
    return f"label {label!r} is {known}"


def stored_numbers(column: pa.ChunkedArray) -> pa.Array:
    """Class numbers of prepared and generated files as int64: -1 for no label, and in a column of any other type."""
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64(), safe=False).fill_null(-1)  # a number that overflows int64 is no class
    return pa.array(np.full(len(column), -1, np.int64))


def _counted(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))
