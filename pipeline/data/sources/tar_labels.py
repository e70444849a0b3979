"""Reads the labels of images in a tar from .cls and .json members, and matches them to images.

An image takes the label of the member that shares its name up to the last dot. If there is none, it takes the member
that shares its name up to an earlier dot, the longest first: a.input.jpg takes a.input.cls, else a.cls.

A .cls member holds a class number or a name; an empty one, or -1, means no label. A .json member holds the label as
`label`, else as `class` or `cls`. If both exist, .cls comes first. An image whose label can't be read is not used.
Unreadable JSON is ignored if no member of the tar holds a label and other JSON could be read.
"""

import codecs
import json
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.data.labels import UNPUBLISHED, class_text, label_text
from pipeline.redact import printable

SUFFIXES = (".cls", ".json")
MOST_BYTES = 64 * 2**20
_KEYS = ("label", "class", "cls")
_NO_JSON = "not JSON"
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Label(NamedTuple):
    """The label that a member holds, or the reason why it can't be used; neither if it holds none.

    Attributes:
        unfit: True if it could be read but is no class.
    """

    text: str | None = None
    problem: str = ""
    unfit: bool = False


def stem_and_suffix(name: str) -> tuple[str, str]:
    """A name split at the last dot of its last component; the suffix includes the dot, in lower case."""
    base = posixpath.basename(name)
    suffix = base[base.rfind(".") :] if "." in base else ""
    return name[: len(name) - len(suffix)], suffix.lower()


def parse_label(suffix: str, content: bytes) -> Label:
    """Parses a .cls or .json member."""
    if suffix == ".cls":
        encoding = "utf-16" if content.startswith(_UTF_16) else "utf-8-sig"
        return Label(_published(content.decode(encoding, errors="backslashreplace")))
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return Label(problem=_NO_JSON)
    some = [value[key] for key in _KEYS if value.get(key) is not None] if isinstance(value, dict) else []
    text, problem = class_text(some[0] if some else None)
    return Label(_published(text), problem, bool(problem))


def _published(text: str | None) -> str | None:
    """A label as text that can be stored, with lone surrogates escaped; None for a withheld label."""
    text = label_text(text and text.encode(errors="backslashreplace"))
    return None if text == UNPUBLISHED else text


@dataclass
class Labels:
    """The labels in a tar, by the names of their members.

    Attributes:
        images: number of images with each name.
    """

    images: Counter[str] = field(default_factory=Counter)
    _found: defaultdict[tuple[str, str], list[Label]] = field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, label: Label) -> None:
        self._found[stem_and_suffix(name)].append(label)

    def finder(self) -> Callable[[str, int], Label]:
        """Returns a function from an image's name and its index among images of that name (from 0) to its label."""
        labels = [(suffix, label) for (_, suffix), some in self._found.items() for label in some]
        some_have = any(label.text is not None or label.unfit for _, label in labels)
        some_read = any(suffix == ".json" and label.problem != _NO_JSON for suffix, label in labels)
        ignored = ".json" if some_read and not some_have else ""

        def find(name: str, number: int) -> Label:
            problem = ""
            for stem in _stems(name):
                for suffix in SUFFIXES:
                    label = _one(self._found.get((stem, suffix), []), number, self.images[name])
                    if label.text is not None:
                        return label
                    if label.problem and suffix != ignored and not problem:
                        side = printable(posixpath.basename(stem) + suffix)
                        problem = f"its label can't be read: {side}: {label.problem}"
            return Label(problem=problem)

        return find


def _stems(name: str) -> Iterator[str]:
    """A name, then all its prefixes that end before a dot of its last component, longest first."""
    yield name
    base = name.rfind("/") + 1
    while (dot := name.rfind(".", base)) > base:
        name = name[:dot]
        yield name


def _one(found: list[Label], number: int, images: int) -> Label:
    """The label for image `number` of the `images` images with one name, from all members that may hold it."""
    if len(set(found)) <= 1:
        return found[0] if found else Label()
    # Concatenated tars may repeat names. Then the n-th label belongs to the n-th image.
    return (
        found[number]
        if len(found) == images
        else Label(problem="occurs more than once, with different labels")
    )
