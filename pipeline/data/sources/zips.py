"""Reads zip archives of image files. Classes are named by folders, or by metadata in the archive."""

import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from pipeline.data.sources.fetch import THREADS, in_order
from pipeline.data.sources.folder import (
    NO_IMAGE,
    Arranged,
    arrange,
    buckets,
    classes_of,
    folder_label,
)
from pipeline.data.sources.loose import outweigh_images
from pipeline.data.sources.parts import Given, Item, Part, Request, SourceListing
from pipeline.data.sources.sidecar import is_sidecar
from pipeline.data.sources.splits import is_most, splits_of_files
from pipeline.data.sources.tree import Tree
from pipeline.data.sources.zip_members import Archive, Member, open_archive, read_member
from pipeline.redact import printable


@dataclass(frozen=True)
class ZipPart(Part):
    """Some images of an archive.

    Attributes:
        members: places of the images.
        labels: label of each image.
        bucket: first binary digits of the hashes of their names.
    """

    members: tuple[Member, ...]
    labels: tuple[str | None, ...]
    bucket: str = ""

    @property
    def slot(self) -> str:
        return f"{self.split}|{self.names[0]}|{self.bucket}"

    def read(self, rows: Sequence[int] | None = None) -> Iterator[Item]:
        def item(place: int) -> Item:
            member = self.members[place]
            data, reason = read_member(self.uri, member)
            path = f"{printable(self.names[0])}/{printable(member.name)}"
            return Item(path, b"" if reason else data, self.labels[place], reason)

        yield from in_order(item, range(len(self.members)) if rows is None else rows, self.root)


def is_zip(tree: Tree) -> bool:
    """True if there are zip files with images, or damaged ones, no smaller than the image files beside them."""

    def hold_images(names: list[str]) -> Iterator[bool]:
        for archive in _open_all(tree, names):
            yield isinstance(archive, str) or bool(archive.images)

    return outweigh_images(tree, _zips(tree), hold_images)


def list_zip(tree: Tree, request: Request) -> SourceListing:
    """All images in all zip files of a tree, spread over parts by hashes of their names within each archive.

    Folders in an archive are splits if there are several such folders; else the archive's own name may give the
    split. Other folders are classes, without the folders that all images of an archive share.

    Raises:
        InputError: a file with labels can't be read, or contradicts another.
    """
    names, parts = _zips(tree), list[Part]()
    ignored, bad, found = dict[str, str](), dict[str, str](), list[Arranged]()
    splits = splits_of_files(names)
    for name, archive in zip(names, _open_all(tree, names), strict=True):
        if isinstance(archive, str):
            bad[name] = archive
            continue
        if not archive.images:
            ignored[name] = "holds no images"
            continue
        arranged = _arrange(tree, name, archive, splits[name], request)
        found.append(arranged)
        for split, bits, some in buckets(arranged.splits, request.images_per_part):
            labels = tuple(arranged.labels[member] for member in some)
            members = tuple(archive.members[member] for member in some)
            parts.append(ZipPart(tree.root, (name,), members, labels, bits, split=split))
        mine = {*arranged.labels, *arranged.used, *arranged.bad}
        others = {member: NO_IMAGE for member in archive.members if member not in mine}
        ignored |= _inside(name, others | archive.ignored | arranged.ignored)
        bad |= _inside(name, arranged.bad)
    ignored |= {name: "lies beside the archives, not in one" for name in tree.files if is_sidecar(name)}
    used = {part.names[0] for part in parts}
    return SourceListing(tuple(parts), frozenset(used), classes=classes_of(found), ignored=ignored, bad=bad)


def _zips(tree: Tree) -> list[str]:
    return [name for name in tree.files if name.lower().endswith(".zip")]


def _open_all(tree: Tree, names: list[str]) -> Iterator[Archive | str]:
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(lambda name: open_archive(tree.uri(name)), names)


def _inside(name: str, reasons: dict[str, str]) -> dict[str, str]:
    return {f"{name}/{member}": reason for member, reason in reasons.items()}


def _arrange(tree: Tree, name: str, archive: Archive, split: str, request: Request) -> Arranged:
    given = Given(
        archive.members,
        archive.ignored,
        lambda member: read_member(tree.uri(name), archive.members[member]),
        request,
        printable(f"{tree.root}/{name}"),
    )
    folders = [folder for image in archive.images if (folder := posixpath.dirname(image))]
    wrapping = posixpath.commonpath(folders) if is_most(len(folders), len(archive.images)) else ""
    if set(folders) == {wrapping}:
        # A single folder is a class, unless its name gives the archive's own split: train2017.zip holds train2017/.
        alone = posixpath.basename(wrapping)
        wrapping = (
            wrapping if split and splits_of_files([alone]) == {alone: split} else posixpath.dirname(wrapping)
        )
    arranged = arrange(archive.images, given, lambda image: folder_label(image.removeprefix(f"{wrapping}/")))
    if not split or len(set(arranged.splits.values())) > 1:
        return arranged
    return replace(arranged, splits=dict.fromkeys(arranged.splits, split))
