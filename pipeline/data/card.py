"""The front matter of a dataset card, by which Hugging Face's `datasets` opens a folder and tells it from others."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import yaml


class SplitSize(NamedTuple):
    """Images of a split, and bytes of their files."""

    rows: int
    bytes: int


def front_matter(
    fingerprint: str,
    classes: tuple[str, ...],
    columns: dict[str, str],
    files: dict[str, list[str]],
    sizes: dict[str, SplitSize],
    tags: Iterable[str] = (),
    described: bool = True,
) -> str:
    """YAML between two lines of dashes.

    `datasets` keeps what it has read under a hash of this: so the fingerprint is in it, and another or a grown dataset
    in a folder of the same name is read anew.

    Args:
        classes: names of the labels; empty = numbers.
        columns: what follows image and label, with their types.
        files: patterns by split; none where `datasets` can't read them.
        described: whether readers find these columns.
        sizes: by split; empty for a dataset that is still growing, since `datasets` refuses other numbers.
    """
    label: Any = (
        {"class_label": {"names": {str(i): name for i, name in enumerate(classes)}}} if classes else "int64"
    )
    types = {"image": "image", "label": label, **columns}
    info: dict[str, Any] = {"description": f"fingerprint {fingerprint}"}
    if described:
        info["features"] = [{"name": name, "dtype": kind} for name, kind in types.items()]
    if sizes:
        total = sum(size.bytes for size in sizes.values())
        info["splits"] = [
            {"name": name, "num_bytes": size.bytes, "num_examples": size.rows} for name, size in sizes.items()
        ]
        info |= {"download_size": total, "dataset_size": total}
    content: dict[str, Any] = {"dataset_info": info}
    if files:
        paths = [{"split": name, "path": paths} for name, paths in files.items()]
        content = {"configs": [{"config_name": "default", "data_files": paths}], **content}
    if tags:
        content["tags"] = list(tags)
    return f"---\n{yaml.safe_dump(content, sort_keys=False, width=10_000)}---\n"
