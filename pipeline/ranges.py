"""The ranges of numeric settings, and the groups of settings in `--help`.

A setting's type holds its range, and `check_ranges` checks them all:

    batch_size: Annotated[int, Range(ge=1)] = 128

It is called after flags and `--config` are read, by the jobs' own checks, and for every value of a search space.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from pipeline.errors import InputError

# File names have twelve digits for numbers, and no setting needs a larger number.
LARGEST = 10**12 - 1


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have. They are finite; whole numbers without an upper end are at most LARGEST.

    Attributes:
        ge, gt: lower end: at least, or more than.
        le, lt: upper end: at most, or less than.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def refusal(self, value: float) -> str:
        """Says what is wrong with a value; "" if it is in the range."""
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be a finite number{', ' + self.ends if self.ends else ''}"
        if (
            (self.ge is not None and value < self.ge)
            or (self.gt is not None and value <= self.gt)
            or (self.le is not None and value > self.le)
            or (self.lt is not None and value >= self.lt)
        ):
            return f"must be {self.ends}"
        unbounded = self.le is None and self.lt is None
        return (
            f"must be at most {LARGEST}" if unbounded and isinstance(value, int) and value > LARGEST else ""
        )

    @property
    def ends(self) -> str:
        """The ends in words; "" if there are none."""
        words = {"at least": self.ge, "more than": self.gt, "at most": self.le, "less than": self.lt}
        return " and ".join(f"{word} {end}" for word, end in words.items() if end is not None)


Natural = Annotated[int, Range(ge=0)]
Positive = Annotated[int, Range(ge=1)]
Seed = Annotated[int, Range(ge=-(2**63), le=2**64 - 1)]
Finite = Annotated[float, Range()]
NotNegative = Annotated[float, Range(ge=0)]
MoreThanZero = Annotated[float, Range(gt=0)]
Share = Annotated[float, Range(ge=0, le=1)]
# Ray counts ten-thousandths of a CPU, in 64 bits.
Cpus = Annotated[float, Range(ge=0.0001, le=1_000_000)]
GpuShare = Annotated[float, Range(ge=0.0001, le=1)]


_Class = TypeVar("_Class", bound=type)


def help_groups(**first: str) -> Callable[[_Class], _Class]:
    """Class decorator that splits a configuration into groups for `--help`.

    Args:
        first: first setting of each group, by the group's name. Settings before the first group stay ungrouped.
    """

    def mark(cls: _Class) -> _Class:
        cls.help_groups = {start: group for group, start in first.items()}  # type: ignore[attr-defined]
        return cls

    return mark


def check_ranges(config: Any) -> None:
    """Refuses a configuration if a number in it, or in a nested configuration, is outside of its range.

    Raises:
        InputError: names the flag, the value and the range.
    """
    for name, span in _ranges(type(config)).items():  # type: ignore[arg-type]
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        elif span is not None and value is not None:
            for one in value if isinstance(value, (tuple, list)) else (value,):
                if refusal := span.refusal(one):
                    raise InputError(f"--{name.replace('_', '-')} {one}: {refusal}")


@functools.cache
def _ranges(cls: type) -> dict[str, Range | None]:
    """The range of every field of a dataclass by name; None if it has none."""
    return {name: range_of(hint) for name, hint in get_type_hints(cls, include_extras=True).items()}


def range_of(hint: Any) -> Range | None:
    """The range in a setting's type, for a number or for each number of a tuple; None if it has none."""
    if isinstance(hint, Range):
        return hint
    return next(filter(None, map(range_of, get_args(hint))), None)
