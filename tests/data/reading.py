"""Read whole sources, and check that every given file is accounted for."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.config import Source
from pipeline.data.sources.parts import Item, Request
from pipeline.data.sources.registry import Opened, open_source
from pipeline.redact import printable
from tests.data.common import encode, picture

PNG = encode(picture(0))


def put(root: Path, *names: str | bytes, data: bytes = PNG) -> Path:
    for name in names:
        path = Path(os.fsdecode(name) if isinstance(name, bytes) else name)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def opened(
    uri: Path | str, images_per_part: int = 20, source: Source = "auto", **request: Any
) -> tuple[Opened, list[Item]]:
    """Open a source and read all images. Check that each file is used, ignored or bad, and that paths are unique."""
    found = open_source(source, str(uri), Request(images_per_part, **request))
    listing = found.listing
    named = {printable(name) for name in listing.used} | listing.ignored.keys() | listing.bad.keys()
    assert {printable(name) for name in found.tree.files} <= named
    assert not listing.used & (listing.ignored.keys() | listing.bad.keys())
    items = [item for part in listing.parts for item in part.read()]
    assert len({item.path for item in items}) == len(items)
    assert all(printable(item.path) == item.path and str(uri) not in item.path for item in items)
    return found, items


def labels(uri: Path | str, **request: Any) -> dict[str, str | None]:
    return {item.path: item.label for item in opened(uri, **request)[1]}


def splits(found: Opened) -> Counter[str]:
    """Count the images of each split."""
    return Counter(part.split for part in found.listing.parts for _ in part.read())


def listed(output: Path, name: str = "quarantine.jsonl") -> dict[str, str]:
    """Return names and reasons from a list of what jobs/prepare.py left out."""
    entries = [
        json.loads(line) for line in (output / name).read_text().removesuffix("\n").split("\n") if line
    ]
    return {entry["path"]: entry["reason"] for entry in entries}
