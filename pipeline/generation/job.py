"""Generating a dataset exactly once: what is there is kept, what is missing is made, nothing is made twice."""

import sys
import time
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.display import Display
from pipeline.errors import InputError
from pipeline.generation import ledger
from pipeline.generation.card import describe
from pipeline.generation.chunks import Chunk, gaps, tasks
from pipeline.generation.config import GenerateConfig, check, identity
from pipeline.generation.ledger import ChunkRecord
from pipeline.generation.pool import MOST_TASKS, Pool, actor_pool
from pipeline.generation.quality import RunningDistance, open_reference
from pipeline.generation.sampler import SamplerActor, Setup, unwritable
from pipeline.generation.verify import verify
from pipeline.lock import locked
from pipeline.models.export import model_fingerprint, pack_model, unpack_model


def model_to_use(config: GenerateConfig) -> str:
    """The model to resolve: an alias that an output was begun with goes on meaning the version that it meant then."""
    before = ledger.saved_settings(storage.absolute(config.output)) or {}
    if config.model.startswith("models:/") and before.get("model_asked") == config.model:
        return str(before["model"])
    return config.model


def generate(
    config: GenerateConfig, model_folder: str, model_name: str, pool: Pool = actor_pool
) -> dict[str, Any]:
    """Makes what is missing of a dataset, or verifies one.

    Args:
        model_folder: an exported model on this machine.
        model_name: how the manifest names it, with its version pinned.

    Raises:
        InputError: settings that don't fit the model, an output that holds something else, is being written by
            another driver or can't be written, too many blank images, a dataset that can't be verified.
    """
    packed = pack_model(Path(model_folder))
    _, spec = unpack_model(packed, model_folder)
    check(config, spec)
    storage.check_writable(config.output)
    output = storage.absolute(config.output)
    reference = open_reference(config.reference, config.features, spec.image) if config.reference else None
    wanted = identity(config, spec, model_fingerprint(Path(model_folder)))
    model = {"model": model_name, "model_asked": config.model}
    setup = Setup(packed, config, output, ledger.digest(wanted), reference.extractor if reference else None)
    try:
        with locked(output):
            ledger.claim(output, wanted, model)
            whole = ledger.finished(output, config.format, setup.settings)
            if config.verify:
                return _result(config, whole, verify(setup, whole, pool))
            distance = RunningDistance(reference.moments) if reference else None
            metrics = _make(setup, whole, distance, pool)
            whole = ledger.finished(output, config.format, setup.settings)
            _finish(config, output, whole)
            saved = ledger.saved_settings(output) or model
            about = {key: saved[key] for key in model} | {"settings": wanted}
            describe(config, output, spec, about, whole)
    except OSError as error:
        raise InputError(unwritable(config.output, error)) from None
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


def _make(
    setup: Setup, whole: dict[Chunk, ChunkRecord], distance: RunningDistance | None, pool: Pool
) -> dict[str, float]:
    """Runs the actor pool over what is missing; says what was made."""
    config = setup.config
    kept = sum(record.rows for record in whole.values())
    bad = sum(record.blank + record.nonfinite for record in whole.values())
    spans = list(gaps(config.count, whole))
    total = sum(span.stop - span.start for span in spans)
    done, made, began = 0, 0, time.monotonic()
    _refuse_bad(bad, kept + total, config)
    if spans:
        rows = [span._asdict() for span in tasks(spans, config.rows_per_file, MOST_TASKS)]
        display = Display("generate", total, "images")
        try:
            for row in pool(SamplerActor, rows, setup):
                done, made, bad = done + row["stop"] - row["start"], made + row["made"], bad + row["bad"]
                _refuse_bad(bad, kept + total, config)
                note = f"{made / (time.monotonic() - began):.1f} images/s"
                if distance:
                    distance.add(row["moments"])
                    note += distance.shown()
                display.update(done, note)
        finally:
            display.close()
    seconds = time.monotonic() - began
    metrics: dict[str, float] = {"generated": made, "kept": kept + total - made}
    metrics["images_per_second"] = made / seconds if made else 0.0
    if distance and (value := distance.value()) is not None:
        metrics["frechet_distance"] = value
    return metrics


def _refuse_bad(bad: int, total: int, config: GenerateConfig) -> None:
    """As soon as it is certain: `total` images are more than there are yet."""
    if bad > config.max_blank_fraction * total:
        raise InputError(
            f"{bad} of {total} samples are blank or not finite, more than --max-blank-fraction "
            f"{config.max_blank_fraction:g} allows: the model is not trained enough, or --guidance too high"
        )


def _finish(config: GenerateConfig, output: str, whole: dict[Chunk, ChunkRecord]) -> None:
    """Whether all is there now; what is not of this dataset is moved aside, so that nobody reads it as samples."""
    if gap := next(gaps(config.count, whole), None):
        raise InputError(
            f"--output {output}: samples {gap.start} to {gap.stop - 1} were lost again while the job ran: does "
            "something else write there? Run the same command again"
        )
    if moved := ledger.set_aside(output, config.format, whole):
        print(
            f"generate: {moved} files that are not of this dataset are now in {output}/foreign",
            file=sys.stderr,
        )
