"""Image files by their names: which files are meant to be images, and whether others outweigh them."""

import posixpath
from collections.abc import Callable, Iterable

from pipeline.data.sources.tree import Tree

# Files with these names are meant to be images; of others, the first bytes tell.
_SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
    ".pbm", ".pnm", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".tga",
)  # fmt: skip


def is_image_name(name: str) -> bool:
    """Whether a file is meant to be an image, by its suffix."""
    return posixpath.splitext(name)[1].lower() in _SUFFIXES


def outweigh_images(
    tree: Tree,
    names: list[str],
    hold_images: Callable[[list[str]], Iterable[bool]] = lambda names: [True] * len(names),
) -> bool:
    """Whether files that hold images are, together, no smaller than the image files beside them.

    Args:
        hold_images: says of each name, in order, whether there are images in it; is asked only where it matters.
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
