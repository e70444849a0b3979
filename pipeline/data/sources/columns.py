"""Finds the columns of images in Parquet and Arrow files: by their types, then by usual names."""

import json
import posixpath
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.formats import told_by_all
from pipeline.data.sources.cells import Columns, check_plain, form_of, is_foreign, one_form
from pipeline.data.sources.label_columns import choose_label, label_column
from pipeline.data.sources.look import Look, check_there, listed
from pipeline.data.sources.parts import IMAGE_FOLDER_TABLE, Request
from pipeline.data.sources.splits import splits_of_files
from pipeline.errors import InputError
from pipeline.redact import printable
from pipeline.storage import StorageError

_IMAGES = ("image", "img", "picture", "photo", "pic", "jpg", "jpeg", "png", "webp")
_PLURAL = ("images", "imgs", "pictures", "photos", "pics")
_OTHERS = ("image_bytes", "img_bytes", "image_data", "bytes", "content", "data")
_PATHS = ("file_name", "filename", "image_path", "img_path", "image_file", "filepath", "file", "path")
_RANKS = {usual: rank for rank, usual in enumerate((*_IMAGES, *_PLURAL, *_OTHERS, *_PATHS))}
NO_ROWS = "holds no rows"
_FILES = 4  # files of one schema to look into at most


def image_columns(look: Look) -> list[str]:
    """The columns that hold images, of the most certain kind that the file has.

    The kinds, from the most certain: columns that `datasets` calls Image; structs of bytes and path; bytes that begin
    like an image; lists of these; paths of files beside the table.

    Raises:
        InputError: the rows to look at can't be read.
    """
    known = Counter(look.schema.names)
    forms = {f.name: form_of(f.type) for f in look.fields if known[f.name] == 1 and not is_foreign(f)}
    kinds = {name: look.kind(name) for name, form in forms.items() if form}
    for lists in (False, True):
        if found := [n for n, kind in kinds.items() if kind == "Image" and (forms[n] == "list") == lists]:
            return found
    # A column that `datasets` calls Audio, Video or ClassLabel holds no images.
    maybe = [name for name, kind in kinds.items() if kind in ("", "Image", "Value")]

    def tells(name: str) -> bool:
        return any(told_by_all(data) if data else look.beside(path or "") for data, path in look.first(name))

    for form in ("struct", "bytes", "list", "text"):
        if found := [name for name in maybe if forms[name] == form and tells(name)]:
            return found
    # A struct with bytes counts as images even if the first images are damaged or missing.
    return [name for name in maybe if one_form(look.type_of(name)) == "struct"]


def holds_source(look: Look, images: list[str]) -> bool:
    """True if a file holds images, or a column that is named like images and must be refused.

    A file with only paths of images, without labels or a split, does not count: the images' own folders say more.

    Args:
        images: the file's columns of images.
    """
    if refused_column(look) or not all(one_form(look.type_of(image)) == "text" for image in images):
        return True
    if not images or posixpath.basename(look.name).lower() == IMAGE_FOLDER_TABLE:  # read as a folder
        return False
    try:
        return bool(label_column(look, images[0]) or splits_of_files([look.name])[look.name])
    except InputError:
        return True


@dataclass(frozen=True)
class Choice:
    """The columns of each file that holds images; their names are the same in all files.

    Attributes:
        columns: columns by file, without class names.
        ignored: files without rows or images, with the reason.
        bad: files that can't be looked into, with the reason.
    """

    columns: dict[str, Columns] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)


def choose(looks: list[Look], request: Request, kind: str) -> Choice:
    """Chooses the columns of images and of labels.

    Args:
        kind: kind of the files, for reasons: Parquet or Arrow.

    Raises:
        InputError: a requested column is missing or holds something else, or several columns may be meant.
    """
    rowless = {look.name: NO_ROWS for look in looks if not look.has_rows()}
    looks = [look for look in looks if look.name not in rowless]
    if not looks:
        return Choice({}, rowless)
    image, without, bad = (
        _named(looks, request.image_column, kind) if request.image_column else _found(looks, kind)
    )
    ignored = rowless | without
    mine = [look for look in looks if look.name not in ignored and look.name not in bad]
    label = choose_label(mine, image, request.label_column)
    columns = {look.name: Columns(image, label if label in look.schema.names else "") for look in mine}
    return Choice(columns, ignored, bad)


def _named(looks: list[Look], wanted: str, kind: str) -> tuple[str, dict[str, str], dict[str, str]]:
    check_there("--image-column", looks, wanted)
    for look in looks:
        if wanted in look.schema.names:
            check_plain(look.name, look.schema, wanted)
            if not form_of(look.type_of(wanted)):
                holds = f"holds {look.type_of(wanted)} in {printable(look.name)}"
                raise InputError(f"--image-column {wanted}: {holds}, not images")
    without = [look.name for look in looks if wanted not in look.schema.names]
    return wanted, dict.fromkeys(without, f"{kind} without the column {printable(wanted)}"), {}


def _found(looks: list[Look], kind: str) -> tuple[str, dict[str, str], dict[str, str]]:
    found, bad = by_schema(looks)
    without = {name: f"{kind} without an image column" for name, names in found.items() if not names}
    if len(without) == len(found):
        for look in looks:
            if refused := refused_column(look):
                check_plain(look.name, look.schema, refused)
        return "", without, bad
    counts = Counter(name for names in found.values() for name in names)
    image = _most_usual([name for name, count in counts.items() if count == max(counts.values())])
    for look in looks:
        if names := found.get(look.name):
            if image not in names:
                words = f"has its images in {listed(names)}, the other files in {printable(image)}"
                without[look.name] = f"{kind} that {words}"
        elif look.name in found and _is_empty(look, image):
            del without[look.name]
    return image, without, bad


def _is_empty(look: Look, image: str) -> bool:
    """True if a file has the column of images but its first rows show no image, because they are damaged or missing."""
    if look.schema.names.count(image) != 1 or not form_of(look.type_of(image)):
        return False
    return not any(path for _, path in look.first(image))


def by_schema(looks: list[Look]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The columns that hold images by file, and the files that can't be looked into, with the reason.

    Files of the same schema are assumed to be alike, so only a few of them are looked into.
    """
    known, tried, failed = dict[Any, list[str]](), Counter[Any](), dict[str, str]()
    keys = dict[str, Any]()
    for look in looks:
        types = tuple((column.name, str(column.type), is_foreign(column)) for column in look.fields)
        key = keys[look.name] = (types, json.dumps(look.features))
        if known.get(key) or tried[key] == _FILES:
            continue
        try:
            known[key] = image_columns(look)
            tried[key] += 1
        except StorageError:
            raise
        except InputError as error:
            failed[look.name] = str(error).removeprefix(f"{printable(look.name)}: ")
    bad = {name: reason for name, reason in failed.items() if not known.get(keys[name])}
    return {name: known.get(key, []) for name, key in keys.items() if name not in bad}, bad


def refused_column(look: Look) -> str:
    """Name of a column that is named like images but has an extension type; "" for none."""
    return next((f.name for f in look.fields if f.name.lower() in (*_IMAGES, *_PLURAL) and is_foreign(f)), "")


def _most_usual(names: list[str]) -> str:
    usual = sorted((name for name in names if name.lower() in _RANKS), key=lambda name: _RANKS[name.lower()])
    if len(names) > 1 and not usual:
        raise InputError(f"columns {listed(names)} hold images: give --image-column")
    return (usual or names)[0]
