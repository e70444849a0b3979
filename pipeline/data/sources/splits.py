"""Finds a source's own splits by the names of its files and folders, with the names that `datasets` knows."""

import re
from collections import Counter
from collections.abc import Iterable

from pipeline.errors import InputError

# Usual names of splits, and our names for them.
_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "t10k": "test",  # MNIST's
}
_WORD = re.compile(
    rf"(?<![a-zA-Z0-9])({'|'.join(sorted(_NAMES, key=len, reverse=True))})(?![a-zA-Z])", re.IGNORECASE
)
_FOLDER = re.compile(r"(t10k|[a-z]+)(?:[-_. ]?\d+)?")
VALIDATION_FRACTION = 0.1
BESIDE = "lies beside the splits {}, in none of them"


def split_of_word(word: str) -> str:
    """The split that a folder name such as train or val2017 stands for; "" for none."""
    found = _FOLDER.fullmatch(word.lower())
    return _NAMES.get(found[1], "") if found else ""


def splits_of_files(names: Iterable[str]) -> dict[str, str]:
    """The split of each file that holds many images, such as test-00000-of-00001.parquet or val/0003.tar.

    The file's own name decides or, if it names no split, the innermost folder that does. Files without a split count
    as training data if no other file does.

    Returns:
        split by name; "" for none.
    """
    found = {name: _split_of_file(name) for name in names}
    if any(found.values()) and "train" not in found.values():
        return {name: split or "train" for name, split in found.items()}
    return found


def _split_of_file(name: str) -> str:
    for part in reversed(name.split("/")):
        if words := _WORD.findall(part):
            return _NAMES[words[-1].lower()]
    return ""


def split_folders(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """The folders that are splits in a tree such as train/CLASS and test/CLASS.

    Folders count as splits if all folders on one level have names of splits, or if one is the training split and
    another is held out. One folder called train among others may be a class. A minority of files outside the folders
    does not matter.

    Returns:
        the folder above them ("" for the root, else ending in /), and the split of each folder; empty if there are no
        splits.
    """
    names = list(names)
    level, inside = "", [name.split("/") for name in names]
    best = "", dict[str, str]()
    while True:
        deeper = [parts for parts in inside if len(parts) > 1]
        folders, few = {parts[0] for parts in deeper}, is_most(len(deeper), len(inside))
        found = _splits(folders)
        kinds = set(found.values())
        # A single folder with the name of a split gives way to several such folders inside it.
        if (len(kinds) > 1 and (few or "train" in kinds)) or (found and few and not best[1]):
            best = level, found
        if not few or len(folders) != 1:
            return best if best[1] else _only_splits(names)
        level += folders.pop() + "/"
        inside = [parts[1:] for parts in deeper]


def is_most(count: int, all_of_them: int) -> bool:
    """True if `count` is more than half of all."""
    return 2 * count > all_of_them


def _only_splits(names: list[str]) -> tuple[str, dict[str, str]]:
    """The only folder anywhere that holds the training split beside another; nothing if several such folders exist."""
    inside: dict[str, set[str]] = {}
    for name in names:
        *folders, _ = name.split("/")
        for depth, folder in enumerate(folders):
            inside.setdefault("".join(f"{above}/" for above in folders[:depth]), set()).add(folder)
    found = [
        (level, splits)
        for level, folders in inside.items()
        if "train" in (splits := _splits(folders)).values()
    ]
    several = [(level, splits) for level, splits in found if len(set(splits.values())) > 1]
    return several[0] if len(several) == 1 else ("", {})


def splits_in_classes(names: Iterable[str]) -> int:
    """The depth of the split folders in a tree such as CLASS/train and CLASS/test; 0 if the tree is not like that.

    A minority of images outside these folders does not matter.
    """
    folders = [name.split("/")[:-1] for name in names]
    for depth in range(1, max(map(len, folders), default=0)):
        splits = [split_of_word(above[depth]) for above in folders if len(above) > depth]
        kinds = Counter(filter(None, splits))
        if "train" in kinds and len(kinds) > 1 and is_most(kinds.total(), len(folders)):
            return depth
    return 0


def _splits(folders: set[str]) -> dict[str, str]:
    found = {folder: split for folder in folders if (split := split_of_word(folder))}
    kinds = set(found.values())
    whole = found and len(found) == len(folders)
    return found if whole or ("train" in kinds and len(kinds) > 1) else {}


def roles_of(own: Iterable[str], wanted: tuple[str, ...] = ()) -> dict[str, str]:
    """The use of each of a source's own splits.

    The training split trains. The validation split is held out, or the test split if there is no validation split. A
    test split beside both is left alone, and so are images in none of several splits. A single split is divided: some
    images are held out by a hash of their content.

    Args:
        own: the source's splits; "" stands for images without one.
        wanted: splits to use; empty = all except a test split beside the other two; ("all",) = that one too.

    Returns:
        for each split in use: "train", "validation", "test", or "" (divided by content).

    Raises:
        InputError: a wanted split does not exist, or none of several splits is for training.
    """
    there = set(own)
    if wanted == ("all",):
        wanted = tuple(there)
    if missing := sorted(set(wanted) - there):
        known = ", ".join(sorted(there - {""})) or "no splits of its own"
        raise InputError(f"--split {missing[0]}: the data has no such split; it has {known}")
    used = set(wanted) or (there - {"test"} if {"train", "validation"} <= there else there)
    if not wanted and "train" in used and len(used) > 1:
        used -= {""}  # images in none of the splits
    if len(used) == 1:
        return {used.pop(): ""}
    if "train" not in used:
        named = " and ".join(sorted(used))
        raise InputError(f"the data has the splits {named}, none for training: choose one with --split")
    test = "test" if "validation" in used else "validation"
    return {split: {"": "train", "test": test}.get(split, split) for split in used}


def held_out(digest: bytes, fraction: float) -> bool:
    """True if an image belongs to the validation split.

    Args:
        digest: SHA-256 of its encoded content.
        fraction: share of the images to hold out.
    """
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
