"""Verifies that a dataset is exactly what its manifest says, and that its samples can be made again.

Verification only reads. It takes no lock, and changes and removes nothing.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.cluster.pool import Pool
from pipeline.config import ModelSpec
from pipeline.data.generated import foreign, sizes
from pipeline.data.manifest import CARD, MANIFEST, SAMPLES_FORMAT
from pipeline.display import Display
from pipeline.errors import InputError
from pipeline.generation import arithmetic, card, ledger, npz
from pipeline.generation.chunks import Chunk, file_name, gaps, parse_name
from pipeline.generation.config import GenerateConfig, check, identity, label_numbers
from pipeline.generation.ledger import ChunkRecord
from pipeline.generation.sampler import Renderer, Setup, places_of, uris_of
from pipeline.generation.writers import SUFFIX
from pipeline.models.export import Packed, model_fingerprint
from pipeline.output import check_claim, read_claim
from pipeline.ranges import check_ranges
from pipeline.redact import one_line
from pipeline.versions import SAMPLING

NAMED = 20
DAMAGED, DIFFERENT = "damaged", "intact, but regenerating it gave different bytes"


def as_written(config: GenerateConfig, spec: ModelSpec) -> tuple[GenerateConfig, dict[str, Any]]:
    """The settings of the dataset in `config.output`, with the flags of the check itself, and its manifest.

    Raises:
        InputError: the folder holds no dataset of jobs/generate.py, or a flag contradicts its settings.
    """
    check_ranges(config)
    output = storage.absolute(config.output)
    claim, manifest = read_claim(output, ledger.SETTINGS), _read_manifest(output)
    if claim is None:
        raise InputError(
            f"--output {config.output}: {ledger.SETTINGS} is lost: run the command that made it without --verify"
        )
    fixed, names = claim["fixed"], spec.image.classes
    made: dict[str, Any] = {field.name: fixed[field.name] for field in fields(config) if field.name in fixed}
    try:
        made |= {
            "labels": tuple(names[label] if label < len(names) else str(label) for label in fixed["labels"])
        }
        made |= {"label_weights": tuple(fixed["label_weights"]), "gpu": fixed["device"] == "gpu"}
    except (KeyError, TypeError):
        raise InputError(
            f"--output {config.output}: {ledger.SETTINGS} is damaged: restore it, or run the command that made the "
            "dataset without --verify"
        ) from None
    made |= {"count": manifest["count"]}
    defaults, asked = GenerateConfig(), config
    if spec.model.class_conditional:  # a class may be given by name or by number
        asked = replace(config, labels=tuple(names[number] for number in label_numbers(config, spec)))
    for key, value in made.items():
        given = getattr(asked, key)
        if given not in (getattr(defaults, key), value):
            flag = "--" + key.replace("_", "-")
            raise InputError(
                f"--output {config.output}: made with {flag} {_shown(value)}, not {_shown(given)}: leave the flag out"
            )
    return replace(config, **made), manifest


def _shown(value: Any) -> str:
    return (" ".join(map(str, value)) or "()") if isinstance(value, tuple) else str(value)


def verify(
    config: GenerateConfig, manifest: dict[str, Any], packed: Packed, spec: ModelSpec, pool: Pool
) -> dict[str, Any]:
    """Checks all files of a dataset, and makes a random share of them again.

    Args:
        config, manifest: results of `as_written`.

    Returns:
        the job's result: how many files were checked, and how many were made again.

    Raises:
        InputError: the dataset is not what its manifest says; the message names the differences.
    """
    check(config, spec)
    output = storage.absolute(config.output)
    wanted, claim = (
        identity(config, spec, model_fingerprint(packed)),
        read_claim(output, ledger.SETTINGS) or {},
    )
    hints = {"model_fingerprint": f" ({claim.get('model')})"}
    check_claim(config.output, claim, wanted, hints=hints, of=SAMPLING)
    setup = Setup(packed, config, output, ledger.digest(wanted))
    listed = _listed(manifest, config)
    different = list(_of_manifest(setup, spec, manifest, listed))
    again = {chunk for chunk in listed if random.random() < config.verify_share}
    again |= {random.choice(list(listed))} if listed else set()
    tasks = [VerifyTask(chunk, str(entry["sha256"]), chunk in again) for chunk, entry in listed.items()]
    checked = 0
    with Display("verify", len(tasks), "files") as display:
        for chunk, how in pool(VerifyWork(setup), tasks):
            checked += 1
            if how:
                different.append(f"{file_name(chunk, SUFFIX[config.format])} is {how}")
            display.update(checked, f"{len(different)} differences")
    if config.format == "npz" and not different:
        different += npz.differences(output, listed, manifest)
    if different:
        named = "; ".join(
            different[:NAMED] + [f"and {len(different) - NAMED} more"] * (len(different) > NAMED)
        )
        raise InputError(
            f"--output {config.output}: {named}. Remove the damaged files, then run the same command without --verify: "
            "it makes the missing files again, and moves aside files that do not belong to the dataset"
        )
    return {
        "output": config.output,
        "count": manifest["count"],
        "metrics": {"verified": checked, "regenerated": len(again)},
    }


def _read_manifest(output: str) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(storage.read_bytes(storage.join(output, MANIFEST)))
        if manifest["format"] == SAMPLES_FORMAT and isinstance(manifest["count"], int):
            return manifest
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"--output {output} has no {MANIFEST}: jobs/generate.py has not finished a dataset there"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--output {output}: {MANIFEST} is damaged: {one_line(error)}") from None
    raise InputError(f"--output {output}: {MANIFEST} was not written by jobs/generate.py")


def _listed(manifest: dict[str, Any], config: GenerateConfig) -> dict[Chunk, dict[str, Any]]:
    """The files of the manifest, by chunk.

    Raises:
        InputError: an entry of the manifest describes no file of a dataset.
    """
    try:
        entries = {parse_name(entry["file"]): entry for entry in manifest["files"]}
        if None in entries or any(entry.keys() < {"rows", "bytes", "sha256"} for entry in entries.values()):
            raise ValueError("an entry is not a file of a dataset")
        return {chunk: entry for chunk, entry in sorted(entries.items()) if chunk}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"--output {config.output}: {MANIFEST} is damaged: {one_line(error)}") from None


def _of_manifest(
    setup: Setup, spec: ModelSpec, manifest: dict[str, Any], listed: dict[Chunk, dict[str, Any]]
) -> Iterator[str]:
    """Describes disagreements between manifest, records and file listing. The content of the files is checked later."""
    config, output = setup.config, setup.output
    places = partial(places_of, config, spec)
    for gap in gaps(config.count, listed):
        yield f"samples {gap.start} to {gap.stop - 1} are missing"
    records, broken = ledger.written(output, config.format, setup.settings, places)
    for chunk in broken:
        yield f"{file_name(chunk, SUFFIX[config.format])} is lost, cut short or covered by another"
    for chunk, entry in listed.items():
        record = records.get(chunk)
        name = file_name(chunk, SUFFIX[config.format])
        if record is None and chunk not in broken:
            yield f"{name} has no record in {ledger.RECORDS}"
        elif record and any(entry[key] != getattr(record, key) for key in ("rows", "bytes", "sha256")):
            yield f"{name} in {MANIFEST} does not match its record"
    for path in foreign(sizes(output), (place for chunk in listed for place in places(chunk))):
        yield f"{ledger.DATA}/{path} does not belong to this dataset"
    yield from _of_what_is_beside(setup, spec, manifest, records)


def _of_what_is_beside(
    setup: Setup, spec: ModelSpec, manifest: dict[str, Any], records: dict[Chunk, ChunkRecord]
) -> Iterator[str]:
    head = card.totals(records)
    for key, value in head.items():
        if manifest.get(key) != value:
            yield f"{MANIFEST} says {key} = {manifest.get(key)}, but its files have {value}"
    expected = {CARD: card.card(manifest, spec, setup.config).encode()}
    if setup.config.format == "png":
        table = card.png_metadata(setup.config, spec, records)
        expected[f"{ledger.DATA}/{ledger.PNG_METADATA}"] = table
    for name, content in expected.items():
        uri = storage.join(setup.output, name)
        if not storage.exists(uri) or storage.read_bytes(uri) != content:
            yield f"{name} is not as it was written"


class VerifyTask(NamedTuple):
    """A chunk to check: the hash in its manifest, and True if it should be made again."""

    chunk: Chunk
    sha256: str
    again: bool


@dataclass(frozen=True)
class VerifyWork:
    """Returns what is wrong with a chunk's file, or ""; see `pool.Work`."""

    setup: Setup

    def start(self, device: str) -> Callable[[VerifyTask], tuple[Chunk, str]]:
        """Loads the model. Raises InputError as `Renderer` and `arithmetic.check`."""
        renderer, output = Renderer(self.setup, device), self.setup.output
        arithmetic.check(output, renderer.arithmetic, self.setup.config.mixed_arithmetic)
        return partial(_check, output, renderer)


def _check(output: str, renderer: Renderer, task: VerifyTask) -> tuple[Chunk, str]:
    chunk = task.chunk
    try:
        stored = _sha256(map(storage.read_bytes, uris_of(renderer.config, renderer.spec, output, chunk)))
    except FileNotFoundError:
        stored = ""
    if stored != task.sha256:
        return chunk, DAMAGED
    if task.again and _sha256(renderer.contents(chunk, renderer.render(chunk))) != stored:
        return chunk, DIFFERENT
    return chunk, ""


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
