"""Shared by Parquet and Arrow files: finds the files that hold images, and the image files that they name."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from pipeline.data.sources.cells import images_of, name_beside
from pipeline.data.sources.columns import by_schema, holds_source
from pipeline.data.sources.fetch import THREADS
from pipeline.data.sources.look import Look
from pipeline.data.sources.loose import outweigh_images
from pipeline.data.sources.tree import Tree
from pipeline.errors import InputError
from pipeline.storage import StorageError

_FIRST = 32  # files to look into before all others


def look_at_all(
    look_at: Callable[[str], Look | str], names: Iterable[str]
) -> tuple[list[Look], dict[str, str]]:
    """The files that can be opened, and the reason for each file that can't."""
    looks, bad = list[Look](), dict[str, str]()
    with ThreadPoolExecutor(THREADS) as pool:
        for name, look in zip(names := list(names), pool.map(look_at, names), strict=True):
            if isinstance(look, str):
                bad[name] = look
            else:
                looks.append(look)
    return looks, bad


def are_source(tree: Tree, names: list[str], look_at: Callable[[str], Look | str]) -> bool:
    """True if some of these files hold images, or none can be opened, and they are no smaller than the images beside.

    Image files that such a file names belong to it, so they are not compared.
    """
    holding, damaged = list[str](), list[str]()
    for some in filter(None, (names[:_FIRST], names[_FIRST:])):
        opened, bad = look_at_all(look_at, some)
        damaged += bad
        looks = [look for look in opened if look.has_rows()]
        columns = by_schema(looks)[0]
        found = [look for look in looks if holds_source(look, columns.get(look.name, []))]
        holding += [look.name for look in found]
        if holding and outweigh_images(tree, holding):
            return True
        if any(_names_files(look, image) for look in found for image in columns.get(look.name, [])):
            return True
    return bool(names) and len(damaged) == len(names) and outweigh_images(tree, damaged)


def _names_files(look: Look, image: str) -> bool:
    try:
        return any(data is None and path and look.beside(path) for data, path in look.first(image))
    except StorageError:
        raise
    except InputError:  # reading the rows will report the damage
        return False


def names_beside(tree: Tree, file: str, images: pa.Array) -> Iterator[set[str]]:
    """For each row of a column, the files in the tree that it names as its images."""
    for row in images_of(images):
        names = (name_beside(file, path) for data, path in row if data is None and path)
        yield {name for name in names if name in tree.files}
