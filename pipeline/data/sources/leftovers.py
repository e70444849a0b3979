"""Gives each file that a source does not read a reason."""

import posixpath
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from pipeline.config import Source
from pipeline.data.images import sniff
from pipeline.data.manifest import UNFINISHED
from pipeline.data.sources import arrow, cifar, idx, parquet
from pipeline.data.sources.fetch import THREADS, fault_of_file
from pipeline.data.sources.folder import NO_IMAGE
from pipeline.data.sources.parts import SourceListing
from pipeline.data.sources.tree import Tree
from pipeline.redact import printable

# Files that a different source reads, by words for them.
_KINDS: dict[str, Callable[[str], bool]] = {
    "an archive": lambda name: name.endswith((".tar", ".zip", ".npz")),
    "a Parquet file": lambda name: name.endswith(parquet.SUFFIXES),
    "an Arrow file": lambda name: name.endswith(arrow.SUFFIXES),
    "an IDX file": idx.is_idx_name,
    "a CIFAR file": cifar.is_cifar_name,
}
_ABOUT = "not an image: it is about the data"
_DOCUMENT = re.compile(
    r"(readme|licen[cs]e|copying|citation|authors|notice)(\..*)?|.*\.(md|rst|html?|pdf|bib)"
    r"|.*\.(md5|sha(1|256|512))|(md5|sha(1|256|512))sums?(\.txt)?|checksums?(\..*)?"
)


def without_parts(tree: Tree) -> Tree:
    """The tree without the images that jobs/prepare.py keeps beside its shards; the shards hold them too."""
    parts = tuple(
        name.removesuffix("settings.json") for name in tree.files if f"/{name}".endswith(f"/{UNFINISHED}")
    )
    kept = {name: file for name, file in tree.files.items() if not parts or not name.startswith(parts)}
    why = "what jobs/prepare.py keeps for its next run"
    return replace(
        tree, files=kept, ignored=tree.ignored | dict.fromkeys(tree.files.keys() - kept.keys(), why)
    )


def account_for(tree: Tree, source: Source, listing: SourceListing) -> SourceListing:
    """Gives every file that no part reads a reason.

    Raises:
        OSError: the storage fails.
    """
    ignored, bad = {**tree.ignored, **listing.ignored}, {**tree.bad, **listing.bad}
    left = [
        name for name in tree.files if name not in listing.used and name not in ignored and name not in bad
    ]

    def reason(name: str) -> tuple[str, bool]:
        """The reason why a file was not read, and True if it could have been an image."""
        try:
            kind = sniff(tree.head(name))
        except OSError as error:
            return fault_of_file(error, tree.uri(name)), True
        return (f"images beside --source {source}" if kind else NO_IMAGE), False

    with ThreadPoolExecutor(THREADS) as pool:
        for name, (words, may_be_data) in zip(left, pool.map(reason, left), strict=True):
            (bad if may_be_data else ignored)[name] = words
    ignored |= {name: _what_else(tree, name, source) for name, words in ignored.items() if words == NO_IMAGE}
    return replace(listing, ignored=_printable(ignored), bad=_printable(bad))


def _what_else(tree: Tree, name: str, source: Source) -> str:
    """A better reason for a file or archive member that is not an image, from its name."""
    base = posixpath.basename(name).lower()
    kinds = (kind for kind, is_it in _KINDS.items() if name in tree.files and is_it(base))
    if kind := next(kinds, ""):
        return f"{kind} beside --source {source}"
    return _ABOUT if _DOCUMENT.fullmatch(base) else NO_IMAGE


def _printable(reasons: dict[str, str]) -> dict[str, str]:
    return {printable(name): printable(words) for name, words in sorted(reasons.items())}
