"""The splits that a source has of its own, by the names of its files and folders, as `datasets` knows them."""

import re
from collections import Counter
from collections.abc import Iterable

from pipeline.errors import InputError

# Usual names of splits, and what they are called here.
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
BESIDE = "lies beside the splits {}, and in none of them"


def split_of_word(word: str) -> str:
    """The split that a folder of this name is, such as train or val2017; "" for none."""
    found = _FOLDER.fullmatch(word.lower())
    return _NAMES.get(found[1], "") if found else ""


def splits_of_files(names: Iterable[str]) -> dict[str, str]:
    """The split of each file that holds many images, such as test-00000-of-00001.parquet or val/0003.tar.

    A split stands in the file's own name or, where that has none, in the innermost folder that has one. Files without
    one are the training split, where no other file is it.

    Returns:
        the split by name, "" where nothing names one.
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
    """The folders that are splits, in a tree whose other folders are classes, such as train/CLASS and test/CLASS.

    Folders are splits where all beside each other have names of splits, or where one is the training split and
    another is held out: a class may be called train, among others. Fewer files beside folders than in them hide none.

    Returns:
        the folder above them ("" for the root, else with a / at its end), and the split of each; none where there are
        none.
    """
    names = list(names)
    level, inside = "", [name.split("/") for name in names]
    best = "", dict[str, str]()
    while True:
        deeper = [parts for parts in inside if len(parts) > 1]
        folders, few = {parts[0] for parts in deeper}, is_most(len(deeper), len(inside))
        found = _splits(folders)
        kinds = set(found.values())
        # Of several inside of each other, one that is called as a split is gives way to those that are several.
        if (len(kinds) > 1 and (few or "train" in kinds)) or (found and few and not best[1]):
            best = level, found
        if not few or len(folders) != 1:
            return best if best[1] else _only_splits(names)
        level += folders.pop() + "/"
        inside = [parts[1:] for parts in deeper]


def is_most(count: int, all_of_them: int) -> bool:
    """Whether these are more than the others."""
    return 2 * count > all_of_them


def _only_splits(names: list[str]) -> tuple[str, dict[str, str]]:
    """The one folder, wherever it is, that holds the training split beside another; nothing where there are several."""
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
    """How deep the folders of splits lie in a tree like CLASS/train and CLASS/test; 0 where it is no such tree.

    Fewer images that lie elsewhere than in these folders hide none.
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
    """What each of a source's own splits is used for.

    The training split trains. The validation split is held out, or the test split where that is all there is; a test
    split beside both is left alone, and so is what is in none of several. A single split is cut: some images are held
    out by their content.

    Args:
        own: the source's splits, "" among them where it has none.
        wanted: those to use; none = all but a test split beside the other two; "all" = that one as well.

    Returns:
        train, validation, test or "" (cut by content) for each split that is used.

    Raises:
        InputError: a split is wanted that is not there, or none of several is to train on.
    """
    there = set(own)
    if wanted == ("all",):
        wanted = tuple(there)
    if missing := sorted(set(wanted) - there):
        known = ", ".join(sorted(there - {""})) or "no splits of its own"
        raise InputError(f"--split {missing[0]}: the data has no such split; it has {known}")
    used = set(wanted) or (there - {"test"} if {"train", "validation"} <= there else there)
    if not wanted and "train" in used and len(used) > 1:
        used -= {""}  # in none of the splits
    if len(used) == 1:
        return {used.pop(): ""}
    if "train" not in used:
        named = " and ".join(sorted(used))
        raise InputError(
            f"the data has the splits {named}, and none to train on: name the one to use with --split"
        )
    test = "test" if "validation" in used else "validation"
    return {split: {"": "train", "test": test}.get(split, split) for split in used}


def held_out(digest: bytes, fraction: float) -> bool:
    """Whether an image belongs to the validation split, by a hash of its content."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
