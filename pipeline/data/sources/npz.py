"""Reads NumPy's .npz files of images and labels, as guided-diffusion, Keras and MedMNIST write them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pipeline.data.labels import name_classes
from pipeline.data.sources.fetch import THREADS
from pipeline.data.sources.label_columns import NO_LABELS
from pipeline.data.sources.loose import outweigh_images
from pipeline.data.sources.npz_arrays import Array, as_images, list_arrays, read_labels
from pipeline.data.sources.parts import Part, Request, SourceListing
from pipeline.data.sources.records import cut_array
from pipeline.data.sources.splits import split_of_word, splits_of_files
from pipeline.data.sources.tree import Tree
from pipeline.errors import InputError
from pipeline.redact import printable

# Names of arrays of images, each with the names of its labels. A split may stand before or after: x_train,
# test_images.
_NAMES = {
    "arr_0": ("arr_1",),
    "images": ("labels", "label"),
    "image": ("labels", "label"),
    "x": ("y",),
    "data": ("labels", "label", "targets", "y"),
}
_LABELS = ("labels", "label", "targets", "y", "arr_1")


class Pair(NamedTuple):
    """An array of images, its array of labels if there is one, and its split."""

    images: Array
    labels: Array | None
    split: str


def is_npz(tree: Tree) -> bool:
    """True if there are .npz files with images, or damaged ones, no smaller than the image files beside them."""

    def hold_images(names: list[str]) -> Iterator[bool]:
        for arrays in _list_all(tree, names):
            yield isinstance(arrays, str) or any(
                pair.images.dtype.hasobject or len(pair.images.shape) > 2
                for pair in _pairs(arrays, Request(1))
            )

    return outweigh_images(tree, _npz(tree), hold_images)


def list_npz(tree: Tree, request: Request) -> SourceListing:
    """All images in all .npz files of a tree. `image_column` and `label_column` name arrays other than the usual ones.

    Raises:
        InputError: images are not plain uint8, labels are not classes, or their numbers differ.
    """
    names, parts, ignored, bad = _npz(tree), list[Part](), dict[str, str](), dict[str, str]()
    splits, shapes, found = splits_of_files(names), set[tuple[int, int, int]](), set[str]()
    for name, arrays in zip(names, _list_all(tree, names), strict=True):
        uri = tree.uri(name)
        if isinstance(arrays, str):
            bad[name] = arrays
            continue
        pairs, used = list(_pairs(arrays, request)), set[str]()
        if not pairs:
            words = request.image_column or ", ".join(_NAMES)
            ignored[name] = f"holds no array called {words}; it has {printable(', '.join(arrays)) or 'none'}"
            continue
        for pair in pairs:
            count = pair.images.shape[0] if pair.images.shape else 0
            if len(pair.images.shape) < 3 and not pair.images.dtype.hasobject:
                ignored[f"{name}/{pair.images.key}"] = f"{pair.images}, not images"
                continue
            records, shape, planes = as_images(pair.images, uri, tree.files[name].version)
            labels = list[tuple[str | None, str]]([(None, "")] * count)
            if pair.labels is not None:
                labels = read_labels(pair.labels, uri, count)
            elif request.label_column not in ("", NO_LABELS):
                known = printable(", ".join(arrays))
                raise InputError(
                    f"{uri}: --label-column {request.label_column}: no such array; it has {known}"
                )
            found |= {text for text, _ in labels if text is not None}
            used |= {pair.images.key} | ({pair.labels.key} if pair.labels is not None else set())
            shapes.add((shape[1], shape[2], shape[0]) if planes else shape)
            parts += cut_array(
                tree.root, name, records, shape, planes, labels, request.images_per_part,
                pair.split or splits[name], pair.images.key,
            )  # fmt: skip
        if used:
            left = {f"{name}/{key}": "neither images nor labels" for key in arrays.keys() - used}
            ignored = left | ignored
        else:
            ignored[name] = "holds no images"
    if not parts and request.image_column:
        raise InputError(
            f"{tree.root}: --image-column {request.image_column}: no .npz file has such an array of images"
        )
    sides, channels = {side for shape in shapes for side in shape[:2]}, {shape[2] for shape in shapes}
    return SourceListing(
        tuple(parts),
        frozenset(part.names[0] for part in parts),
        sides.pop() if len(sides) == 1 else 0,
        channels.pop() if len(channels) == 1 else 0,
        name_classes(found),
        dict(sorted(ignored.items())),
        bad,
    )


def _npz(tree: Tree) -> list[str]:
    return [name for name in tree.files if name.lower().endswith(".npz")]


def _list_all(tree: Tree, names: list[str]) -> Iterator[dict[str, Array] | str]:
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(lambda name: list_arrays(tree.uri(name)), names)


def _pairs(arrays: dict[str, Array], request: Request) -> Iterator[Pair]:
    """The arrays of images in a file, with their labels and the split in their names."""
    names = {request.image_column.lower(): _LABELS} if request.image_column else _NAMES
    meanings = {_meaning(key): array for key, array in arrays.items()}
    images = {meaning: array for meaning, array in meanings.items() if meaning[1] in names}
    several = any(split for split, _ in images)
    for (split, word), array in images.items():
        wanted = (request.label_column.lower(),) if request.label_column else names[word]
        labels = next((meanings[split, label] for label in wanted if (split, label) in meanings), None)
        if request.label_column == NO_LABELS:
            labels = None
        yield Pair(array, labels, split or ("train" if several else ""))


def _meaning(key: str) -> tuple[str, str]:
    """The split in an array's name, and the name without it."""
    lowered = key.lower()
    first, _, rest = lowered.partition("_")
    if rest and (split := split_of_word(first)):
        return split, rest
    rest, _, last = lowered.rpartition("_")
    if rest and (split := split_of_word(last)):
        return split, rest
    return "", lowered
