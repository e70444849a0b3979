"""Data given by a pattern or as one file is read like its whole folder."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipeline.data.groups import read_rows
from pipeline.data.index import open_splits
from pipeline.data.sources.parts import Request
from pipeline.data.sources.registry import open_source
from pipeline.data.sources.tree import Tree, open_tree
from pipeline.errors import InputError
from tests.data.common import encoded, tar_bytes, write_folder
from tests.data.reading import labels, opened, put
from tests.data.test_binaries import grey, write_pair

Placed = Callable[[Path], str]


@pytest.fixture(params=["local", "memory"])
def placed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Placed]:
    """A function that copies a local folder to the storage and returns its URI."""
    memory = fsspec.filesystem("memory")

    def place(folder: Path) -> str:
        if request.param == "local":
            return str(folder)
        for path in folder.rglob("*"):
            if path.is_file():
                memory.pipe_file(f"/{tmp_path.name}/{path.relative_to(folder)}", path.read_bytes())
        return f"memory://{tmp_path.name}"

    yield place
    if memory.exists(f"/{tmp_path.name}"):
        memory.rm(f"/{tmp_path.name}", recursive=True)


def names(tree: Tree) -> set[str]:
    return {*tree.files, *tree.ignored, *tree.bad}


@pytest.mark.parametrize(
    ("pattern", "classes"),
    [("*", {"cat", "dog", "owl", None}), ("[cd]*", {"cat", "dog"}), ("c*", {"cat"}), ("**", {"cat", "dog", "owl", None})],
)  # fmt: skip
def test_folders_that_a_pattern_matches_are_walked(
    pattern: str, classes: set[str | None], placed: Placed, tmp_path: Path
) -> None:
    folder = put(write_folder(tmp_path / "in", encoded(12)), "stray.png", "cat/.hidden.png", "dog/notes.txt")
    found, items = opened(f"{placed(folder)}/{pattern}")
    assert {item.label for item in items} == classes
    some = {name for name in ("cat", "dog", "owl") if name in classes}
    given = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    given = {
        name for name in given if name.partition("/")[0] in some or (None in classes and "/" not in name)
    }
    assert {*found.listing.used, *found.listing.ignored} == given
    assert sum(index.rows for index in open_splits(f"{placed(folder)}/{pattern}").indexes.values()) == len(
        items
    )


def test_a_pattern_of_folders_of_tars(placed: Placed, tmp_path: Path) -> None:
    for i, name in enumerate(("train", "val")):
        put(tmp_path / "in", f"part-{name}/{name}.tar", data=tar_bytes(encoded(6 - i), 10 * i))
    found, items = opened(f"{placed(tmp_path / 'in')}/part-*")
    assert len(items) == 11 and found.roles == {"train": "train", "validation": "validation"}


def test_links_in_what_a_pattern_matches(tmp_path: Path) -> None:
    put(tmp_path / "in", "cat/1.png", "dog/2.png")
    (tmp_path / "in" / "cat" / "loop").symlink_to("..")
    (tmp_path / "in" / "self").symlink_to(".")
    (tmp_path / "else").mkdir()
    put(tmp_path / "else", "3.png")
    (tmp_path / "in" / "owl").symlink_to(tmp_path / "else")
    for pattern in ("*", "**"):
        tree = open_tree(f"{tmp_path / 'in'}/{pattern}")
        assert tree.files.keys() == {"cat/1.png", "dog/2.png", "owl/3.png"}
        loop = "a link to one of its own parent folders"
        assert tree.ignored == {"cat/loop": loop, "self": loop} and not tree.bad
    # The pattern reaches the same image through the link.
    assert names(open_tree(f"{tmp_path / 'in'}/*/cat/1.png")) == {"self/cat/1.png"}


@pytest.mark.parametrize("pattern", ["*", "**", "**/*.png", "[a-z]*"])
def test_a_closed_folder_that_may_hold_matches_is_named(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = put(tmp_path / "in", "open/1.png", "closed/2.png")
    listdir = os.listdir

    def deny(path: str) -> list[str]:
        if path.endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", deny)
    tree = open_tree(f"{root}/{pattern}")
    assert tree.files.keys() == {"open/1.png"}
    assert tree.bad == {"closed": "the folder can't be read: Permission denied"}


def test_folders_without_files_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "in" / "empty").mkdir(parents=True)
    with pytest.raises(InputError, match="is empty"):
        open_source("auto", f"{tmp_path / 'in'}/*", Request(10))
    with pytest.raises(InputError, match="no such file or folder"):
        open_source("auto", f"{tmp_path / 'in'}/x*", Request(10))


def test_labels_do_not_depend_on_what_else_a_pattern_matches(placed: Placed, tmp_path: Path) -> None:
    uri = placed(put(tmp_path / "in", "a/cat/1.png", "b/dog/1.png"))
    assert labels(f"{uri}/*/cat/1.png") == {"a/cat/1.png": "a/cat"}
    assert labels(f"{uri}/a/c*") == {"cat/1.png": "cat"}


@pytest.mark.parametrize(
    "files",
    [
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz"),
        ("train-images.idx3-ubyte", "train-labels-idx1-ubyte"),
    ],
)
@pytest.mark.parametrize("pattern", [False, True])
def test_one_file_of_idx_images_has_the_labels_beside_it(
    files: tuple[str, str], pattern: bool, placed: Placed, tmp_path: Path
) -> None:
    values, numbers = grey(20), np.arange(20) % 3
    folder = write_pair(tmp_path / "in", files, values, numbers)
    write_pair(folder, ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"), grey(4), np.arange(4))
    uri = f"{placed(folder)}/{'train-images*' if pattern else files[0]}"
    found, items = opened(uri)
    assert [item.label for item in items] == [str(number) for number in numbers]
    assert found.listing.used == set(files) and found.listing.classes == ("0", "1", "2")
    splits = open_splits(uri)
    labels = [
        label
        for index in splits.indexes.values()
        for group in index.groups
        for label in read_rows(group, np.arange(group.rows))["label"].to_pylist()
    ]
    assert sorted(labels) == sorted(numbers.tolist())


def test_damaged_labels_beside_one_file_of_idx_images_are_refused(tmp_path: Path) -> None:
    pair = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    folder = write_pair(tmp_path / "in", pair, grey(5), np.arange(5))
    (folder / pair[1]).unlink()
    assert {item.label for item in opened(folder / pair[0])[1]} == {None}
    (folder / pair[1]).symlink_to("nowhere")
    with pytest.raises(InputError, match="a link to nothing: this file holds labels"):
        opened(folder / pair[0])


@pytest.mark.parametrize(
    ("images", "names"), [("data_batch_1.bin", "batches.meta.txt"), ("train.bin", "fine_label_names.txt")]
)
def test_one_file_of_cifar_has_the_names_of_the_classes_beside_it(
    images: str, names: str, placed: Placed, tmp_path: Path
) -> None:
    count, before = (10, b"") if images.startswith("data") else (100, b"\0")
    put(tmp_path / "in", images, data=b"".join(before + bytes([i]) + bytes(3072) for i in range(6)))
    put(tmp_path / "in", names, data="\n".join(f"class {i}" for i in range(count)).encode())
    found, items = opened(f"{placed(tmp_path / 'in')}/{images}")
    assert [item.label for item in items] == [f"class {i}" for i in range(6)]
    assert found.listing.used == {images, names}
