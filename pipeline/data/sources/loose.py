"""Recognises image files by name, and compares their size with that of files such as archives beside them."""

import posixpath
from collections.abc import Callable, Iterable

from pipeline.data.sources.tree import Tree

# Files with these suffixes are meant to be images. Other files are judged by their first bytes.
_SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
    ".pbm", ".pnm", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".tga",
)  # fmt: skip


def is_image_name(name: str) -> bool:
    """True if a file is meant to be an image, by its suffix."""
    return posixpath.splitext(name)[1].lower() in _SUFFIXES


def outweigh_images(
    tree: Tree,
    names: list[str],
    hold_images: Callable[[list[str]], Iterable[bool]] = lambda names: [True] * len(names),
) -> bool:
    """True if files that hold images are, together, no smaller than the image files beside them.

    Args:
        names: names of the files.
        hold_images: tells for each name, in order, whether there are images in it; called only if it matters.
    """
    beside = sum(file.size for name, file in tree.files.items() if is_image_name(name))
    if sum(tree.files[name].size for name in names) < beside:
        return False
    holding = 0
    for name, holds in zip(names, hold_images(names), strict=True):
        if holds:
            holding += tree.files[name].size
            if holding >= beside:
                return True
    return False
