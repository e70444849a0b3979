"""Names of the classes of a source that lists none: the texts that lie beside its images."""

from dataclasses import replace
from typing import Any

from pipeline.data.each_part import each_part
from pipeline.data.parts import Part, Plan
from pipeline.data.sources import read_part
from pipeline.errors import InputError

MOST_UNNAMED_CLASSES = 100_000


def with_class_names(source: Plan) -> Plan:
    """The plan with the classes by name, in order, where its labels are texts; numbers name themselves.

    Only a WebDataset has labels that nothing lists: where the first of them is a text, all are read once, over the
    cluster, for the names.

    Raises:
        InputError: so many different texts that they can't be classes.
    """
    if source.parts[0].source != "webdataset" or _first_label(source.parts[0]).isdecimal():
        return source
    names = set[str]()
    for row in each_part(_labels, source.parts, range(len(source.parts))):
        names.update(row["labels"])
        if len(names) > MOST_UNNAMED_CLASSES:
            raise InputError(
                f"more than {MOST_UNNAMED_CLASSES:,} different labels, such as {min(names)!r}: those are no classes"
            )
    return replace(source, classes=tuple(sorted(names)))


def _first_label(part: Part) -> str:
    """As it stands beside the first image that has one; a number where none has."""
    return next((item.label for item in read_part(part) if item.label is not None), "0")


def _labels(number: int, part: Part) -> dict[str, Any]:
    return {"labels": sorted({item.label for item in read_part(part) if item.label is not None})}
