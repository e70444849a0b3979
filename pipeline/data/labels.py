"""Names of the classes of a source that lists none: the texts that lie beside its images."""

from dataclasses import replace
from typing import Any

import ray
import ray.data

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
    parts = ray.put(source.parts)
    numbers = [{"part": number} for number in range(len(source.parts))]
    found = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map(
        _labels, fn_kwargs={"parts": parts}, num_cpus=0.5
    )
    names = set[str]()
    for row in found.iter_rows():
        names.update(row["labels"])
        if len(names) > MOST_UNNAMED_CLASSES:
            raise InputError(
                f"more than {MOST_UNNAMED_CLASSES:,} different labels, such as {min(names)!r}: those are no classes"
            )
    return replace(source, classes=tuple(sorted(names)))


def _first_label(part: Part) -> str:
    """As it stands beside the first image that has one; a number where none has."""
    return next((item.label for item in read_part(part) if item.label is not None), "0")


def _labels(row: dict[str, Any], parts: Any) -> dict[str, Any]:
    all_parts: tuple[Part, ...] = ray.get(parts) if isinstance(parts, ray.ObjectRef) else parts
    part = all_parts[int(row["part"])]
    return {"labels": sorted({item.label for item in read_part(part) if item.label is not None})}
