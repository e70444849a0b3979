"""The sources that images are read from, by name.

A source is cut into parts, small descriptions that any node can read alone, in an order that does not depend
on the machine.
"""

import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline import storage
from pipeline.data.images import encode_png
from pipeline.data.labels import label_text
from pipeline.data.sources.folder import IMAGE_FOLDER_TABLE, list_folder
from pipeline.data.sources.idx import is_idx, list_idx
from pipeline.data.sources.parquet import list_parquet
from pipeline.data.sources.parts import IMAGE_SUFFIXES, Item, Part, Source, SourceListing
from pipeline.data.sources.tars import list_tars
from pipeline.errors import InputError


@dataclass(frozen=True)
class DigitsPart(Part):
    """The handwritten digits that come with scikit-learn."""

    def read(self) -> Iterator[Item]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            pixels = np.minimum(np.round(image * (255 / 16)), 255).astype(np.uint8)[..., None]
            yield Item(f"digits/{i:04d}.png", encode_png(pixels), label_text(int(label)))


def list_digits(uri: str, files: list[str], images_per_part: int) -> SourceListing:
    return SourceListing((DigitsPart("digits"),), 8, 1, tuple(map(str, range(10))))


# By source: the function that lists it (from its URI, its files and the images in a part), and the test that tells its
# files by their lower-case names. A folder belongs to the first source whose test accepts one of its files.
_SOURCES: dict[
    Source, tuple[Callable[[str, list[str], int], SourceListing], Callable[[str], bool] | None]
] = {
    "huggingface": (list_parquet, lambda name: name.endswith(".parquet") and name != IMAGE_FOLDER_TABLE),
    "webdataset": (list_tars, lambda name: name.endswith(".tar")),
    "idx": (list_idx, is_idx),
    "folder": (list_folder, lambda name: name.endswith(IMAGE_SUFFIXES)),
    "digits": (list_digits, None),
}


def list_source(source: Source | Literal["auto"], uri: str, images_per_part: int) -> SourceListing:
    """Cuts a source into parts of about `images_per_part` images.

    Args:
        source: auto = by the names of the files.

    Raises:
        InputError: nothing of that kind is there.
    """
    if source == "digits":
        files = []
    elif uri:
        uri = storage.absolute(uri)
        files = storage.list_files(uri)
    else:
        raise InputError(f"--source {source} needs --input")
    lister, _ = _SOURCES[find_source(uri, files) if source == "auto" else source]
    return lister(uri, files, images_per_part)


def find_source(uri: str, files: list[str]) -> Source:
    """What kind of source these files are, by their names.

    Raises:
        InputError: there are none, or none that could be read.
    """
    if not files:
        raise InputError(f"--data {uri}: is empty: write shards with jobs/prepare.py first")
    names = [posixpath.basename(file).lower() for file in files]
    for source, (_, is_its) in _SOURCES.items():
        if is_its and any(map(is_its, names)):
            return source
    raise InputError(f"--data {uri}: holds no prepared images, nor Parquet, tar, IDX or image files")
