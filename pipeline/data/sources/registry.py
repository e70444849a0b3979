"""The sources of images, by name, and how to find out which of them a folder is.

A source is cut into parts: small descriptions that any node can read alone, in an order that is the same on every
machine. Every given file is in a part, or named with the reason why it is not.
"""

import contextlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import storage
from pipeline.config import Source
from pipeline.data.labels import label_text
from pipeline.data.sources import arrow, cifar, folder, idx, npz, parquet, tars, zips
from pipeline.data.sources.columns import NO_ROWS
from pipeline.data.sources.leftovers import account_for, without_parts
from pipeline.data.sources.parquet_files import forget_files
from pipeline.data.sources.parts import Item, Part, Request, SourceListing, pick
from pipeline.data.sources.splits import roles_of
from pipeline.data.sources.tree import Tree, open_tree
from pipeline.errors import InputError
from pipeline.redact import printable

SHOWN = 5  # classes and reasons to show in the line that describes a source
# Formats of other tools that are not read, and what to do with them.
_ELSEWHERE = {
    ".tar.gz": "compressed tar files: unpack them with `gunzip`, or their images into folders",
    ".tgz": "compressed tar files: unpack them with `gunzip`, or their images into folders",
    ".tar.xz": "compressed tar files: unpack them with `unxz`, or their images into folders",
    ".tar.bz2": "compressed tar files: unpack them with `bunzip2`, or their images into folders",
    ".tar.zst": "compressed tar files: unpack them with `unzstd`, or their images into folders",
    ".mdb": "an LMDB database: export its images into folders or tar files first",
    ".pkl": "pickle files, which run code when they are opened: export the images into folders or .npz files first",
    ".pickle": "pickle files, which run code when they are opened: export the images into folders or .npz files first",
    ".npy": "NumPy files: save the images as `arr_0` of an .npz file",
    ".h5": "HDF5 files: export the images into folders or .npz files first",
    ".hdf5": "HDF5 files: export the images into folders or .npz files first",
    ".mat": "MATLAB files: export the images into folders or .npz files first",
    ".tfrecord": "TFRecord files: export the images into folders or tar files first",
    ".7z": "archives: unpack them first",
    ".rar": "archives: unpack them first",
    ".mp4": "videos: export their frames into folders first",
}
_CIFAR_PICKLES = ("data_batch_1", "test_batch", "batches.meta")


@dataclass(frozen=True)
class DigitsPart(Part):
    """The handwritten digits that come with scikit-learn."""

    def read(self, rows: Sequence[int] | None = None) -> Iterator[Item]:
        # Its file, since `sklearn.datasets` takes seconds to import. A row holds 64 values from 0 to 16, then the digit.
        package = importlib.util.find_spec("sklearn")
        if not (package and package.origin):
            raise InputError("--source digits needs scikit-learn: pip install scikit-learn")
        table = np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")

        def items() -> Iterator[Item]:
            for i, (*image, label) in enumerate(table):
                pixels = np.round(np.reshape(image, (8, 8, 1)) * (255 / 16)).astype(np.uint8)
                yield Item(f"digits/{i:04d}.png", pixels, label_text(int(label)))

        yield from pick(items(), rows)


# The order in which a folder is tested for each source.
_SOURCES: dict[Source, tuple[Callable[[Tree], bool], Callable[[Tree, Request], SourceListing]]] = {
    "arrow": (arrow.is_arrow, arrow.list_arrow),
    "huggingface": (parquet.is_parquet, parquet.list_parquet),
    "webdataset": (tars.is_tars, tars.list_tars),
    "idx": (idx.is_idx, idx.list_idx),
    "cifar": (cifar.is_cifar, cifar.list_cifar),
    "npz": (npz.is_npz, npz.list_npz),
    "zip": (zips.is_zip, zips.list_zip),
    "folder": (folder.is_folder, folder.list_folder),
}


@dataclass(frozen=True)
class Opened:
    """A source after it was opened.

    Attributes:
        source: the kind of source, never "auto".
        listing: its parts; `ignored` and `bad` account for every file in `tree` that no part reads.
        roles: use of each of its own splits; see `splits.roles_of`.
    """

    source: Source
    uri: str
    tree: Tree
    listing: SourceListing
    roles: dict[str, str]

    def size_of(self, parts: Iterable[Part]) -> int:
        """Bytes of the files that parts are in, each file counted once."""
        names = {name for part in parts for name in part.names}
        return sum(self.tree.files[name].size for name in names if name in self.tree.files)

    def describe(self, splits: dict[str, int], classes: Sequence[str], bad: Sequence[dict[str, str]]) -> str:
        """One line with the kind of source, the images in each split, the classes, and what was left out and why.

        Args:
            splits: images in use, by split.
            classes: names of the classes.
            bad: path and reason of each image that can't be used.
        """
        cut = ", held out by content" if "" in self.roles.values() and "validation" in splits else ""
        some = [printable(name) for name in classes[:SHOWN]]
        shown = ", ".join([*some, "…"] if len(classes) > SHOWN else some)
        left = [
            f"{count} file{'s' * (count > 1)} ignored: {words}"
            for words, count in _tally(self.listing.ignored)
        ]
        left += [
            f"{count} can't be used: {words}"
            for words, count in _tally({e["path"]: printable(e["reason"]) for e in bad})
        ]
        alone = {part.split for part in self.listing.parts} - self.roles.keys()
        if named := sorted(alone - {""}):
            left.append(f"split {', '.join(named)} not used (--split NAME uses it)")
        if "" in alone:
            left.append("images in none of the splits not used (--split all uses them)")
        counts = ", ".join(f"{count:,} {name}" for name, count in splits.items())
        words = [
            f"{printable(self.uri) or self.source} is {self.source}: {sum(splits.values()):,} images ({counts}{cut})",
            f"{len(classes)} classes ({shown})" if classes else "no classes",
        ]
        return "; ".join([*words, *left])


def _tally(reasons: dict[str, str]) -> list[tuple[str, int]]:
    """Reasons, each with the name of one file, and the number of files with that reason; the most frequent first."""
    example = {reason: name for name, reason in reversed(reasons.items())}
    most = Counter(reasons.values()).most_common()
    named = [(f"{reason} ({example[reason]}{', …' * (count > 1)})", count) for reason, count in most[:SHOWN]]
    rest = sum(count for _, count in most[SHOWN:])
    return [*named, ("for other reasons", rest)] if rest else named


def open_source(source: Source, uri: str, request: Request, flag: str = "--input") -> Opened:
    """Opens a source and cuts it into parts of about `request.images_per_part` images.

    Args:
        source: kind of source; auto = found by names and content of the files.
        flag: flag that the URI was given with, for errors.

    Raises:
        InputError: the URI is missing, or holds nothing of that kind.
    """
    if source == "digits":
        listing = SourceListing((DigitsPart("", ("digits",)),), frozenset(), 8, 1, tuple(map(str, range(10))))
        return Opened("digits", "", Tree("", {}), listing, {"": ""})
    if not uri:
        raise InputError(
            f"{flag} is missing: give the folder of images (or --source digits, which needs none)"
        )
    forget_files()
    tree = without_parts(open_tree(storage.absolute(uri)))
    found = _find_source(tree, uri, flag, request) if source == "auto" else source
    listing = _SOURCES[found][1](tree, request)
    if not listing.parts:
        raise InputError(f"{flag} {uri}: {_nothing(tree, listing, source)}")
    roles = roles_of((part.split for part in listing.parts), request.split)
    return Opened(found, uri, tree, account_for(tree, found, listing), roles)


def _find_source(tree: Tree, uri: str, flag: str, request: Request) -> Source:
    for source, (is_it, _) in _SOURCES.items():
        if is_it(tree):
            return source
    listing = None
    for list_tables in (arrow.list_arrow, parquet.list_parquet):
        with contextlib.suppress(InputError):
            if (tables := list_tables(tree, request)).ignored:
                listing = tables
    raise InputError(f"{flag} {uri}: {_nothing(tree, listing)}")


def _nothing(tree: Tree, listing: SourceListing | None = None, source: Source = "auto") -> str:
    """The reason why there is nothing to read, with advice for formats that are not read."""
    names = [name.lower() for name in tree.files]
    for suffix, words in _ELSEWHERE.items():
        if any(name.endswith(suffix) for name in names):
            return f"holds {words}"
    if any(name.rpartition("/")[2] in _CIFAR_PICKLES for name in names):
        return (
            "holds CIFAR's Python version, pickles that run code when they are opened: "
            "use its binary version (data_batch_1.bin), or export the images into folders"
        )
    if listing and set(listing.ignored.values()) == {NO_ROWS}:
        return f"{printable(next(iter(listing.ignored)))} {NO_ROWS}, nor does any other file"
    if source in ("auto", "huggingface") and any(name.endswith(".parquet") for name in names):
        return "holds Parquet files, none with a column of images: name it with --image-column"
    reasons = {**tree.bad, **(listing.bad if listing else {})}
    if reasons:
        name, reason = next(iter(reasons.items()))
        return f"nothing in it can be read: {printable(name)}: {reason}"
    if not names:
        hidden = f" ({len(tree.ignored)} hidden or special files are not data)" if tree.ignored else ""
        return f"is empty{hidden}: give a folder of images, or shards that jobs/prepare.py wrote"
    if source != "auto":
        return f"holds nothing that --source {source} reads"
    return "holds no images, nor Parquet, Arrow, tar, zip, npz, IDX or CIFAR files with images"
