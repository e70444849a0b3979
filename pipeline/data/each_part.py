"""Work on the parts of a source, over the cluster."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import ray.data

from pipeline.data.sources.parts import Part

Work = Callable[..., dict[str, Any]]


def each_part(
    work: Work, parts: tuple[Part, ...], numbers: Sequence[int], **settings: Any
) -> Iterator[dict[str, Any]]:
    """Calls work(number, part, **settings) for the parts of these numbers; yields the results as they come."""
    tasks = [{"part": number} for number in numbers]
    done = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
        _do,
        fn_kwargs={"work": work, "parts": ray.put(parts), "settings": settings},
        # Fractions let it run beside whatever holds the CPUs of a small machine.
        num_cpus=0.5,
    )
    yield from done.iter_rows()


def _do(row: dict[str, Any], work: Work, parts: Any, settings: dict[str, Any]) -> dict[str, Any]:
    number = int(row["part"])
    all_parts: tuple[Part, ...] = ray.get(parts) if isinstance(parts, ray.ObjectRef) else parts
    return work(number, all_parts[number], **settings)
