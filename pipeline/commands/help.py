"""Formats a configuration for `--help`: numbers with their range, settings in groups by their use."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo
from tyro.constructors._struct_spec_dataclass import dataclass_rule

from pipeline.ranges import Seed, range_of

HELP = ConstructorRegistry()


class _Group:
    """A group of settings in `--help`. A subclass holds their fields."""

    fields: tuple[StructFieldSpec, ...]


@HELP.struct_rule
def _as_shown(info: StructTypeInfo) -> StructConstructorSpec | None:
    """tyro's rule for a configuration: each number with its range, settings in their groups."""
    if isinstance(info.type, type) and issubclass(info.type, _Group):
        return StructConstructorSpec(dict, info.type.fields)
    spec = dataclass_rule(info)
    if spec is None:
        return None
    starts = getattr(info.type, "help_groups", {})
    current, entries, groups = "", list[Any](), dict[str, list[StructFieldSpec]]()
    for one in spec.fields:
        current = starts.get(one.name, current)
        one = dataclasses.replace(one, type=_with_hint(one.type), helptext=_on_one_line(one.helptext))
        if not current or dataclasses.is_dataclass(one.type):  # a nested configuration is a group already
            entries.append(one)
            continue
        if current not in groups:
            entries.append(current)
        groups.setdefault(current, []).append(one)

    def build(**values: Any) -> Any:
        for name in groups:
            values |= values.pop(name)
        return spec.instantiate(**values)

    build.__doc__ = info.type.__doc__
    types = {name: type(name, (_Group,), {"fields": tuple(some)}) for name, some in groups.items()}
    fields = (
        StructFieldSpec(one, types[one], tyro.MISSING_NONPROP) if isinstance(one, str) else one
        for one in entries
    )
    return StructConstructorSpec(build, tuple(fields))


def _on_one_line(text: str | Callable[[], str | None] | None) -> Callable[[], str | None]:
    """A setting's docstring without the line breaks of the source."""
    return lambda: " ".join(((text() if callable(text) else text) or "").split()) or None


def _with_hint(hint: Any) -> Any:
    """A setting's type with the end of its help text: the default, and the range of a number."""
    span = range_of(hint)
    ends = f"; {span.ends}" if span and span.ends and hint != Seed else ""

    def shown(default: str) -> str:
        return f"(default: {'empty' if default in ('', repr('')) else default}{ends})"

    return (
        hint if dataclasses.is_dataclass(hint) else Annotated[hint, tyro.conf.arg(help_behavior_hint=shown)]
    )
