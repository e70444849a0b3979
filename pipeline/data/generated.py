"""Reads datasets that jobs/generate.py wrote, and checks that the folder holds exactly the manifest's files."""

import json
from collections.abc import Iterable
from typing import Any

from pipeline import storage
from pipeline.data.manifest import MANIFEST, SAMPLES, SAMPLES_FORMAT
from pipeline.data.sources.parts import IMAGE_FOLDER_TABLE
from pipeline.data.sources.tree import is_hidden
from pipeline.errors import InputError

PARTIAL = ".partial"
_PNG = ".png"


def read_manifest(uri: str, flag: str) -> dict[str, Any] | None:
    """The manifest of a generated dataset; None if the folder holds no generated dataset.

    Args:
        flag: the flag that names the folder, for errors.

    Raises:
        InputError: the manifest is damaged.
    """
    try:
        manifest = json.loads(storage.read_bytes(storage.join(uri, MANIFEST)))
        # Raw data may hold a file of this name too.
        ours = isinstance(manifest, dict) and manifest.get("format") == SAMPLES_FORMAT
        return dict(manifest) if ours else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise InputError(f"{flag} {uri}: damaged {MANIFEST} ({type(error).__name__}: {error})") from None


def sizes(uri: str) -> dict[str, int]:
    """Sizes in bytes of the files in the data folder, by path relative to it."""
    folder = storage.absolute(storage.join(uri, SAMPLES))
    return {file[len(folder) :].lstrip("/"): size for file, size in storage.sizes(folder).items()}


def foreign(paths: Iterable[str], named: Iterable[str]) -> list[str]:
    """The paths in the data folder that a reader would open although they are not in `named`, sorted."""
    strange = {*paths} - {*named, IMAGE_FOLDER_TABLE}
    return sorted(path for path in strange if not is_hidden(path) and not path.endswith(PARTIAL))


def files_of(uri: str, manifest: dict[str, Any], flag: str) -> list[str]:
    """URIs of the sample files, in order. Empty for single PNGs, because their manifest does not list them.

    Raises:
        InputError: a file is lost, cut short or changed, or the folder holds a file that is not in the manifest.
    """
    again = "wait until jobs/generate.py ends, or run the same command again"
    lengths = sizes(uri)
    if manifest["settings"].get("format") == "png":
        found = sum(name.endswith(_PNG) for name in lengths)
        if found != manifest["count"]:
            raise InputError(
                f"{flag} {uri} holds {found} images, but its {MANIFEST} says {manifest['count']}: {again}"
            )
        return []
    named = {entry["file"]: entry["bytes"] for entry in manifest["files"]}
    for name, length in named.items():
        if lengths.get(name) != length:
            state = "cut short or changed" if name in lengths else "lost"
            raise InputError(f"{flag} {uri}: {SAMPLES}/{name} is {state}: {again}")
    if strange := foreign(lengths, named):
        raise InputError(
            f"{flag} {uri} holds {SAMPLES}/{strange[0]}, which is not in its {MANIFEST}: {again}"
        )
    return [storage.join(uri, SAMPLES, name) for name in named]
