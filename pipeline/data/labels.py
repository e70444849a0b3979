"""What the label of an image means: decided here alone, for jobs/prepare.py and for training on raw files alike."""

from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.redact import printable

MOST_UNNAMED_CLASSES = 100_000
UNPUBLISHED = "-1"  # what data sets hold in place of labels that are kept back
_MOST_DIGITS = 18  # of an int64
_SHOWN = 60  # characters of a label that is none


def label_text(value: Any, names: tuple[str, ...] = ()) -> str | None:
    """What a source holds beside an image (text, bytes, a number, nothing) as text; None for nothing.

    Args:
        names: of the classes 0, 1, …, where the source has them.
    """
    if value is None or value != value:  # pandas writes NaN where there is nothing
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (bytes, str)):
        text = value.decode(errors="replace") if isinstance(value, bytes) else value
        return text.strip() or None
    if isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    # Also truth, and whole numbers that were made floats or decimals.
    return str(int(value)) if _is_whole(value) else str(value)


def _is_whole(value: Any) -> bool:
    if isinstance(value, Decimal):
        return value == value.to_integral_value()
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def class_text(value: Any, names: tuple[str, ...] = ()) -> tuple[str | None, str]:
    """What a column says of an image's class: a text, a number, truth, nothing, or a list of one of these.

    Args:
        names: of the classes 0, 1, …, where the column has them.

    Returns:
        the label as text, or None for none; and the reason why it can be no class, else "".
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
    """Whether a label is a class number in itself."""
    return label.isdecimal() and len(label) <= _MOST_DIGITS


def name_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """The classes behind labels that nothing names: 0 to the largest where they are numbers, else the texts in order.

    Returns:
        the names; none for numbers so large that they must be something else.

    Raises:
        InputError: so many different texts that they can't be classes.
    """
    found = set(labels) - {UNPUBLISHED}
    if all(map(is_number, found)):
        top = max(map(int, found), default=-1)
        return _counted(top + 1) if top < MOST_UNNAMED_CLASSES else ()
    if len(found) > MOST_UNNAMED_CLASSES:
        raise InputError(
            f"more than {MOST_UNNAMED_CLASSES:,} different labels, such as {min(found)!r}: those are no classes"
        )
    return tuple(sorted(found))


def names_of_all(labels: Iterable[str], first: str) -> tuple[str, ...]:
    """The classes of a source whose labels were all read: where the first is a number, only numbers name classes."""
    return name_classes(filter(is_number, labels) if is_number(first) else labels)


def class_numbers(classes: tuple[str, ...]) -> Callable[[str | None], int | None]:
    """Returns a function from a label to its class number: -1 for no label, None for a label that is no class.

    Args:
        classes: all of them, in order; with none, numbers are taken as they are.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    counted = classes == _counted(len(classes))

    def number(label: str | None) -> int | None:
        if label is None or (label == UNPUBLISHED and label not in numbers):
            return -1
        if counted and is_number(label):  # there may be zeros in front of it
            return int(label) if not classes or int(label) < len(classes) else None
        return numbers.get(label)

    return number


def unknown_label(label: str | None, classes: tuple[str, ...]) -> str:
    """Why an image can't be used whose label is no class."""
    known = f"not among the {len(classes)} classes" if classes else "not a class number"
    return f"label {label!r} is {known}"


def stored_numbers(column: pa.ChunkedArray) -> pa.Array:
    """Class numbers as prepared and generated files hold them: int64, -1 for none, and for what is no number."""
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64(), safe=False).fill_null(-1)  # what is larger is no class
    return pa.array(np.full(len(column), -1, np.int64))


def _counted(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))
