"""Files behind a folder, a name or a pattern, and names that are splits."""

import os
from collections import Counter
from pathlib import Path

import pytest

from pipeline.data.sources.splits import split_folders, split_of_word, splits_of_files
from pipeline.data.sources.tree import is_hidden, open_tree
from pipeline.errors import InputError
from pipeline.redact import printable
from tests.data.reading import put


def mixed(root: Path) -> Path:
    """Make files, links and other things, all named .png."""
    put(root / "else", "real", "folder/x.png")
    put(root / "in", "a.png", ".hidden.png", "sub/b.png")
    (root / "in" / "link.png").symlink_to(root / "else" / "real")
    (root / "in" / "gone.png").symlink_to("nothing")
    (root / "in" / "loop.png").symlink_to("loop.png")
    (root / "in" / "linked").symlink_to(root / "else" / "folder")
    os.mkfifo(root / "in" / "pipe.png")
    return root / "in"


LOOP = "can't be read: Too many levels of symbolic links"


@pytest.mark.parametrize("pattern", ["", "/*.png", "/**/*.png"])
def test_links_are_followed_and_what_is_no_file_is_named(pattern: str, tmp_path: Path) -> None:
    tree = open_tree(f"{mixed(tmp_path)}{pattern}")
    deep = {"sub/b.png", "linked/x.png"} if pattern != "/*.png" else set()
    assert tree.root == str(tmp_path / "in") and tree.files.keys() == {"a.png", "link.png"} | deep
    assert tree.bad == {"gone.png": "a link to nothing", "loop.png": LOOP}
    assert tree.ignored == {".hidden.png": "hidden", "pipe.png": "a named pipe"}


@pytest.mark.parametrize(
    "name, files, ignored, bad",
    [
        ("a.png", ["a.png"], {}, {}),
        ("link.png", ["link.png"], {}, {}),
        ("pipe.png", [], {"pipe.png": "a named pipe"}, {}),
        ("gone.png", [], {}, {"gone.png": "a link to nothing"}),
        ("loop.png", [], {}, {"loop.png": LOOP}),
        ("linked", ["x.png"], {}, {}),
    ],
)
def test_one_name(
    name: str, files: list[str], ignored: dict[str, str], bad: dict[str, str], tmp_path: Path
) -> None:
    tree = open_tree(str(mixed(tmp_path) / name))
    assert (list(tree.files), tree.ignored, tree.bad) == (files, ignored, bad)


@pytest.mark.parametrize("name", ["[a]", "a*", "what?", "[!a]*"])
def test_what_is_there_is_no_pattern(name: str, tmp_path: Path) -> None:
    put(tmp_path, f"{name}/1.png", f"{name}/{name}.png", "ab/2.png", "b/3.png")
    assert list(open_tree(str(tmp_path / name)).files) == sorted(["1.png", f"{name}.png"])
    assert list(open_tree(str(tmp_path / name / "?.png")).files) == ["1.png"]
    assert list(open_tree(str(tmp_path / name / f"{name}.png")).files) == [f"{name}.png"]


@pytest.mark.parametrize("name", ["none", "none*", "sub/none.png", "a.png/x", "[z]"])
def test_what_is_not_there_says_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        open_tree(str(put(tmp_path, "a.png", "sub/b.png") / name))


def test_a_changed_file_has_another_version(tmp_path: Path) -> None:
    before = open_tree(str(put(tmp_path, "a", "b"))).files
    put(tmp_path, "a", data=b"other")
    for given in (tmp_path, tmp_path / "*", tmp_path / "a"):
        after = open_tree(str(given)).files
        assert after["a"].version != before["a"].version
        assert "b" not in after or after["b"] == before["b"]


@pytest.mark.parametrize(
    "name", [".a", ".git/x", "__MACOSX/._a", "a/.cache/b", "Thumbs.db", "x/DESKTOP.INI", "__x/y"]
)
def test_hidden_names(name: str) -> None:
    assert is_hidden(name) and is_hidden(f"deep/{name}")


@pytest.mark.parametrize(
    "name", ["a.b", "a__b/c", "__init__.py", "thumbs.db.png", "thumbs.db/1.png", "_a/b", "~"]
)
def test_names_that_are_not_hidden(name: str) -> None:
    assert not is_hidden(name) and not is_hidden(f"deep/{name}")


@pytest.mark.parametrize(
    "name, shown",
    [
        ("plain name.png", "plain name.png"),
        ("ÄÖ😀", "ÄÖ😀"),
        (os.fsdecode(b"caf\xe9"), "caf\\xe9"),
        ("a\nb", "a\\nb"),
        ("\x1b[0m", "\\x1b[0m"),
    ],
)
def test_names_as_text(name: str, shown: str) -> None:
    assert printable(name) == shown == printable(shown) and shown.encode()


# Splits.


@pytest.mark.parametrize(
    "word, split",
    [
        ("train", "train"), ("Training", "train"), ("val2017", "validation"), ("test_1", "test"), ("t10k", "test"),
        ("DEV", "validation"), ("train-2017", "train"), ("trainer", ""), ("test tube", ""), ("2017", ""),
        ("trainval", ""), ("steam_train", ""), ("", ""), ("train2017b", ""),
    ],
)  # fmt: skip
def test_folders_that_are_called_as_splits(word: str, split: str) -> None:
    assert split_of_word(word) == split


@pytest.mark.parametrize(
    "folders, level, found",
    [
        (["train", "test"], "", {"train": "train", "test": "test"}),
        (["w/train", "w/val"], "w/", {"train": "train", "val": "validation"}),
        (["w/train", "w/test", "w/extra"], "w/", {"train": "train", "test": "test"}),
        (["train/train", "train/test"], "train/", {"train": "train", "test": "test"}),
        (["a/train/x/train", "a/train/x/val"], "a/train/x/", {"train": "train", "val": "validation"}),
        (["val", "test"], "", {"val": "validation", "test": "test"}),
        (["train/cat", "train/dog"], "", {"train": "train"}),
        (["train/train/cat", "train/train/dog"], "", {"train": "train"}),
        (["train", "cat", "dog"], "", {}),
        (["test", "val", "cat"], "", {}),
        (["cat/train", "dog/test"], "", {}),
    ],
    ids=str,
)
def test_folders_that_are_splits(folders: list[str], level: str, found: dict[str, str]) -> None:
    assert split_folders(f"{folder}/{i}.png" for folder in folders for i in range(2)) == (level, found)


def test_files_beside_folders_that_are_splits() -> None:
    assert split_folders(["1.png", "train/2.png", "test/3.png"]) == ("", {"train": "train", "test": "test"})
    assert (
        split_folders(["1.png", "train/2.png"]) == ("", {}) == split_folders(["1.png", "2.png", "val/3.png"])
    )
    assert split_folders(["1.png", "train/2.png", "train/3.png"]) == ("", {"train": "train"})
    assert split_folders(["1.png", "val/2.png", "test/3.png"])[1] == {"val": "validation", "test": "test"}
    assert split_folders([]) == ("", {}) == split_folders(["1.png"])
    assert split_folders([f"{'a/' * 1500}train/1.png", f"{'a/' * 1500}test/1.png"])[1] == {
        "train": "train",
        "test": "test",
    }


@pytest.mark.parametrize(
    "names, counts",
    [
        (["train-0.tar", "train-1.tar", "test-0.tar"], {"train": 2, "test": 1}),
        (["0.tar", "1.tar", "val/2.tar"], {"train": 2, "validation": 1}),
        (["0.tar", "train.tar", "test.tar"], {"": 1, "train": 1, "test": 1}),
        (["0.tar", "trains.tar", "contest.tar"], {"": 3}),
        (["emnist-letters-train-images.gz", "t10k-images.gz"], {"train": 1, "test": 1}),
    ],
    ids=str,
)
def test_files_that_are_splits(names: list[str], counts: dict[str, int]) -> None:
    assert Counter(splits_of_files(names).values()) == counts
