"""Generates a dataset: keeps the samples that exist and makes each missing one exactly once."""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.cluster.pool import MOST_BLOCKS, ActorPool, Pool
from pipeline.config import ModelSpec
from pipeline.display import Display
from pipeline.errors import InputError
from pipeline.generation import arithmetic, ledger
from pipeline.generation.card import describe, mark_growing
from pipeline.generation.chunks import Chunk, gaps, tasks
from pipeline.generation.config import GenerateConfig, check, identity
from pipeline.generation.ledger import ChunkRecord
from pipeline.generation.sampler import SampleWork, Setup, places_of, writing_to
from pipeline.generation.verify import as_written, verify
from pipeline.lock import locked
from pipeline.models.export import Packed, model_fingerprint, pack_model, read_spec


def model_to_use(config: GenerateConfig) -> str:
    """The name of the model to load. An alias keeps the version that it had when the output was begun.

    Raises:
        InputError: --output is missing, or --model is missing and not known from the output.
    """
    if not config.output:
        raise InputError("--output is missing: the folder of the dataset")
    before = ledger.saved_settings(storage.absolute(config.output)) or {}
    asked = str(before.get("model_asked", ""))
    model = config.model or (asked if config.verify else "")
    if not model:
        raise InputError("--model is missing: the exported model to sample from")
    return str(before["model"]) if model.startswith("models:/") and model == asked else model


def actor_pool(config: GenerateConfig) -> ActorPool:
    """The actor pool that the flags ask for, with one CPU an actor. Results come in the order in which they finish."""
    least, most = (0, config.actors) if config.actors else (config.min_actors, config.max_actors)
    return ActorPool(most, config.gpu, least, cpus=1, ordered=False)


def generate(
    config: GenerateConfig, model_folder: str | Path | Packed, model_name: str, pool: Pool | None = None
) -> dict[str, Any]:
    """Makes the missing samples of a dataset, or verifies it.

    Args:
        model_folder: an exported model (path, URI, or packed).
        model_name: the model's name for the manifest, with its version resolved.
        pool: pool that makes the samples; None = `actor_pool`.

    Raises:
        InputError: the settings don't fit the model; the output holds something else, is being written by another
            driver or can't be written; too many images are blank; or the dataset does not pass verification.
    """
    packed = pack_model(model_folder)
    spec = read_spec(packed)
    if config.verify:
        made, manifest = as_written(config, spec)
        return verify(made, manifest, packed, spec, pool or actor_pool(made))
    check(config, spec)
    storage.check_writable(config.output)
    output = storage.absolute(config.output)
    wanted = identity(config, spec, model_fingerprint(packed))
    model = {"model": model_name, "model_asked": config.model}
    setup = Setup(packed, config, output, ledger.digest(wanted))
    places, pool = partial(places_of, config, spec), pool or actor_pool(config)
    with writing_to(config.output), locked(output):
        ledger.claim(output, wanted, model)
        whole = ledger.finished(output, config.format, setup.settings, places)
        if not whole:
            arithmetic.forget(output)
        metrics = _make(setup, spec, whole, pool)
        whole = ledger.finished(output, config.format, setup.settings, places)
        _finish(config, output, whole, places)
        saved = ledger.saved_settings(output) or model
        about = {key: saved[key] for key in model} | {"settings": wanted}
        describe(config, output, spec, about, whole)
    return _result(config, whole, metrics)


def _result(
    config: GenerateConfig, whole: dict[Chunk, ChunkRecord], metrics: dict[str, float]
) -> dict[str, Any]:
    return {
        "output": config.output,
        "count": sum(record.rows for record in whole.values()),
        "metrics": metrics
        | {
            "blank": sum(record.blank for record in whole.values()),
            "nonfinite": sum(record.nonfinite for record in whole.values()),
        },
    }


def _make(setup: Setup, spec: ModelSpec, whole: dict[Chunk, ChunkRecord], pool: Pool) -> dict[str, float]:
    """Makes the missing samples with the pool. Returns the numbers of images made and kept, and images per second."""
    config = setup.config
    kept = sum(record.rows for record in whole.values())
    bad = sum(record.blank + record.nonfinite for record in whole.values())
    spans = list(gaps(config.count, whole))
    total = sum(span.stop - span.start for span in spans)
    done, made, began = 0, 0, time.monotonic()
    _refuse_bad(bad, kept + total, config)
    if spans:
        mark_growing(setup.output, spec, config)
        with Display("generate", total, "images") as display:
            if config.gpu and not config.bf16 and not whole:
                display.note("samples are computed in fp32 without TF32; --precision auto (bf16) is faster")
            for span in pool(SampleWork(setup), tasks(spans, config.rows_per_file, MOST_BLOCKS)):
                done, made, bad = done + span.rows, made + span.made, bad + span.bad
                _refuse_bad(bad, kept + total, config)
                display.update(done, f"{made / (time.monotonic() - began):.1f} images/s")
    seconds = time.monotonic() - began
    return {
        "generated": made,
        "kept": kept + total - made,
        "images_per_second": made / seconds if made else 0.0,
    }


def _refuse_bad(bad: int, total: int, config: GenerateConfig) -> None:
    """Raises InputError as soon as too many samples are certain to be bad: `total` is the final number of images."""
    if bad > config.max_blank_fraction * total:
        raise InputError(
            f"{bad} of {total} samples are blank or not finite, more than --max-blank-fraction "
            f"{config.max_blank_fraction:g} allows: the model is not trained enough, or --guidance too high"
        )


def _finish(
    config: GenerateConfig, output: str, whole: dict[Chunk, ChunkRecord], places: ledger.Places
) -> None:
    """Checks that all samples are there, and moves files of other origin aside so that nobody reads them as samples."""
    if gap := next(gaps(config.count, whole), None):
        raise InputError(
            f"--output {output}: samples {gap.start} to {gap.stop - 1} were lost while the job ran: does "
            "another program write there? Run the same command again"
        )
    if moved := ledger.set_aside(output, whole, places):
        print(
            f"generate: {moved} files that do not belong to this dataset were moved to {output}/foreign",
            file=sys.stderr,
        )
