"""The front matter of a dataset card. Hugging Face's `datasets` uses it to open a folder and to key its cache."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import yaml


class SplitSize(NamedTuple):
    """Number of images in a split, and size of its files in bytes."""

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

    `datasets` caches what it read under a hash of this text. The text includes the fingerprint, so a dataset that
    grew, or another one in a folder of the same name, is read anew.
    Args:
        fingerprint: hash of the dataset's content, hexadecimal.
        classes: names of the labels; empty = the labels are plain numbers.
        columns: types of the columns after image and label, by name.
        files: file patterns by split; empty if `datasets` can't read the files.
        sizes: sizes by split; empty for a dataset that still grows, because `datasets` refuses data of other sizes.
        tags: tags of the card, such as "synthetic".
        described: True if readers of the files find these columns.
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
