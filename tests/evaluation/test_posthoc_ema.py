"""Post-hoc EMA: a run's snapshots give averages of other lengths, and each gets its bits/dim."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import DiffusionConfig, ModelConfig, OptimizerConfig, TrainConfig
from pipeline.data.index import DatasetIndex
from pipeline.errors import InputError
from pipeline.evaluation.bits import held_out_bits
from pipeline.evaluation.config import EvaluateConfig, check
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.work import choose
from pipeline.models.export import load_model, save_model
from pipeline.models.snapshots import Snapshot, parse_snapshot, posthoc_ema
from pipeline.rng import Choice
from pipeline.training.worker import keep_snapshots
from tests.evaluation.common import small_model
from tests.training.runs import undisturbed

LENGTHS = (0.05, 0.15)


@pytest.mark.usefixtures("evaluated_here")
def test_a_runs_snapshots_are_swept_over_lengths(
    digits: Path, held_out: DatasetIndex, tmp_path: Path
) -> None:
    """tests/training/test_trainer.py shows that snapshots outlive checkpoints."""
    config = TrainConfig(
        data=str(digits),
        output=str(tmp_path / "run"),
        steps=8,
        batch_size=16,
        model=ModelConfig(32, (1,), res_blocks=1, attention_resolutions=()),
        diffusion=DiffusionConfig(timesteps=20),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, ema_decays=(0.5,), ema_lengths=LENGTHS),
        checkpoint_every=2,
    )
    snapshots = tmp_path / "run" / "snapshots"
    run = undisturbed(config, lambda saved: keep_snapshots(str(snapshots), config, saved))
    folder = save_model(tmp_path / "run" / "model", run.end.weights, run.spec)
    kept = {parse_snapshot(file.name): file for file in snapshots.iterdir()}
    assert set(kept) == {Snapshot(step, length) for step in (2, 4, 6, 8) for length in LENGTHS}

    output = tmp_path / "evaluation"
    settings = EvaluateConfig(
        model="", data=str(digits), output=str(output), metrics=("bits",), max_images=4, terms=4, actors=1,
        snapshots=str(snapshots), ema_lengths=(0.05, 0.1),
    )  # fmt: skip
    metrics = evaluate(settings, str(folder)).metrics
    # A stored length is reconstructed as it was stored.
    weights = load_model(output / "ema-0.05")[0].state_dict()
    torch.testing.assert_close(weights, load_file(kept[Snapshot(8, 0.05)]), rtol=1e-4, atol=1e-5)
    _, spec = load_model(output / "ema-0.1")
    assert spec.provenance["ema_length"] == 0.1
    for length in ("0.05", "0.1"):
        model, spec = load_model(output / f"ema-{length}")
        alone = held_out_bits(
            model, spec, held_out, choose(held_out.rows, 4, 0, Choice.BOUND), terms=4
        ).bits_per_dim
        assert metrics[f"bits_per_dim_ema_{length}"] == pytest.approx(alone, rel=1e-5)
    assert metrics["bits_per_dim_ema_0.05"] != pytest.approx(metrics["bits_per_dim_ema_0.1"], rel=1e-6)


def test_snapshots_that_cannot_be_used_are_refused_in_one_line(tmp_path: Path) -> None:
    model, _ = small_model()
    with pytest.raises(InputError, match="no such file or folder"):
        posthoc_ema(model, str(tmp_path / "nowhere"), (0.1,))
    (tmp_path / "notes.txt").write_text("not a snapshot")
    with pytest.raises(InputError, match="train with --ema-lengths"):
        posthoc_ema(model, str(tmp_path), (0.1,))
    file = tmp_path / Snapshot(3, 0.05).name
    file.write_bytes(b"torn")
    with pytest.raises(InputError, match="damaged"):
        posthoc_ema(model, str(tmp_path), (0.1,))
    save_file({"other": torch.zeros(2)}, file)
    with pytest.raises(InputError, match="does not belong to --model"):
        posthoc_ema(model, str(tmp_path), (0.1,))
    with pytest.raises(InputError, match="EMA length"):
        posthoc_ema(model, str(tmp_path), (0.4,))


def test_lengths_need_snapshots_and_bits() -> None:
    for options in ({"ema_lengths": (0.1,)}, {"snapshots": "there"}):
        with pytest.raises(InputError, match="go together"):
            check(EvaluateConfig(model="", data="", **options))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="add bits"):
        check(EvaluateConfig("", "", "samples", metrics=("knn",), ema_lengths=(0.1,), snapshots="there"))
