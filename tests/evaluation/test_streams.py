"""No random number is used for two purposes. Training, validation, evaluation, generation and pictures really run."""

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import pipeline
from pipeline import rng
from pipeline.config import DiffusionConfig, ModelConfig, TrainConfig
from pipeline.data.index import DatasetIndex
from pipeline.evaluation.bits import held_out_bits
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.work import choose
from pipeline.generation.config import GenerateConfig
from pipeline.generation.sampler import sample_labels
from pipeline.models.export import save_model
from pipeline.models.sampling import preview
from pipeline.pictures import make
from pipeline.rng import Choice, Purpose, normal
from tests.evaluation.common import small_model, write_samples
from tests.training.runs import undisturbed

SOURCE = Path(pipeline.__file__).parent
# Pictures show samples and terms of the bound, so they use the same noise.
SHOWN = (
    {"pipeline.models.sampling", "pipeline.pictures.make"},
    {"pipeline.evaluation.bits", "pipeline.pictures.make"},
)


class Draws:
    """Records the lines of code that drew each (seed, epoch, sample id, purpose)."""

    def __init__(self) -> None:
        self.lines: dict[tuple[int, ...], set[tuple[str, int]]] = defaultdict(set)
        self._draw = rng._words

    def __call__(
        self, seed: int, epoch: int | Tensor, ids: Tensor, purposes: tuple[Purpose, ...], count: int
    ) -> Tensor:
        frame = sys._getframe(1)
        while frame.f_globals["__name__"] == rng.__name__ and frame.f_back is not None:
            frame = frame.f_back
        line = (frame.f_globals["__name__"], frame.f_lineno)
        for one, at in zip(ids.tolist(), rng._epochs(epoch, ids).tolist(), strict=True):
            for purpose in purposes:
                self.lines[seed, at, one, purpose].add(line)
        return self._draw(seed, epoch, ids, purposes, count)


@pytest.mark.usefixtures("evaluated_here")
def test_no_number_is_drawn_for_two_ends(
    digits: Path, held_out: DatasetIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = Draws()
    monkeypatch.setattr(rng, "_words", draws)
    model, spec = small_model(timesteps=4)
    folder = save_model(tmp_path / "model", model.state_dict(), spec)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    samples = write_samples(tmp_path / "samples", pixels, np.arange(60) % 10)

    undisturbed(
        TrainConfig(
            data=str(digits), output=str(tmp_path / "run"), steps=3, batch_size=8, random_flip=True, label_dropout=0.1,
            model=ModelConfig(32, (1,), 1, (), dropout=0.1, class_conditional=True),
            diffusion=DiffusionConfig(timesteps=4),
        )
    )  # fmt: skip
    evaluate(
        EvaluateConfig(
            model="", data=str(digits), samples=str(samples), max_images=8, terms=2, classifier_steps=3,
            max_features=50, batch_size=8,
        ),
        str(folder),
    )  # fmt: skip
    held_out_bits(model, spec, held_out, choose(held_out.rows, 8, 0, Choice.BOUND))
    preview(model, spec, 8, steps=4)
    sample_labels(GenerateConfig(model="", output="", count=8), spec, torch.arange(8))
    make.process_strip(model, spec, held_out, tmp_path / "strip.png")
    make.bound_terms(model, spec, held_out, tmp_path / "terms.png")

    assert {purpose for _, _, _, purpose in draws.lines} == set(Purpose)
    shared = {
        counter: {f"{name}:{number}" for name, number in lines}
        for counter, lines in draws.lines.items()
        if len({name for name, _ in lines}) > 1 and {name for name, _ in lines} not in SHOWN
    }
    assert not shared, dict(list(shared.items())[:3])


def test_each_purpose_is_drawn_in_one_module_and_no_generator_stands_beside() -> None:
    places = defaultdict(set)
    for file in sorted(SOURCE.rglob("*.py")):
        text = file.read_text()
        if not re.search(r"Purpose|random|manual_seed", text):
            continue
        for node in ast.walk(ast.parse(text)):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if re.fullmatch(r"Purpose\.\w+|(np\.|torch\.)?random\.\w+|torch\.\w*manual_seed", name):
                places[name].add(str(file.relative_to(SOURCE)))
    drawn = {name: files for name, files in places.items() if name.startswith("Purpose.")}
    assert {name.removeprefix("Purpose.") for name in drawn} == {purpose.name for purpose in Purpose}
    for name in ("Purpose.SAMPLING", "Purpose.BOUND"):
        drawn[name].remove("pictures/make.py")  # pictures show samples and terms of the bound
    assert all(len(files) == 1 for files in drawn.values()), drawn
    # Each of these generators has a key of its own, explained in its file.
    others = {name: files for name, files in places.items() if not name.startswith("Purpose.")}
    assert others == {
        "np.random.SeedSequence": {"data/order.py"},
        "random.Random": {"tuning/choices.py"},  # chooses the combinations of a space to check
        "np.random.Generator": {"data/order.py"},
        "np.random.Philox": {"data/order.py"},
        "np.random.default_rng": {
            "tuning/report.py"
        },  # random orders, the baseline of a setting's importance
        "torch.random.fork_rng": {"evaluation/classifier.py", "training/state.py"},
        "random.choice": {"generation/verify.py"},  # chooses files to check, unpredictable on purpose
        "random.random": {"generation/verify.py"},
        "torch.manual_seed": {"evaluation/classifier.py", "training/state.py", "training/step.py"},
    }


def test_the_noise_of_chosen_images_is_standard_normal() -> None:
    """If the numbers that choose images were also their noise, the chosen images would have extreme noise."""
    chosen = torch.from_numpy(choose(20_000, 400, 0, Choice.BOUND))
    for t in (0, 1):
        noise = normal(0, t, chosen, Purpose.BOUND, (2,)).double()
        # The mean of 800 squares has a standard error of sqrt(2 / 800) = 0.05.
        assert noise.square().mean().item() == pytest.approx(1, abs=0.2)


def test_images_are_chosen_anew_for_each_use() -> None:
    """Otherwise features would be compared on the images that the classifier has seen most."""
    chosen = [set(choose(10_000, 1000, 0, use).tolist()) for use in Choice]
    for i, one in enumerate(chosen):
        for other in chosen[i + 1 :]:
            # Two independent choices share 100 of 1,000, with a standard deviation of 9.
            assert abs(len(one & other) - 100) < 50


def test_dropout_of_a_step_is_that_of_no_other_step_rank_or_seed() -> None:
    seeds = {
        rng.generator_seed(seed, 0, step << 32 | rank, Purpose.DROPOUT)
        for seed in (0, 1, 2)
        for step in (0, 1, 1_000_003)
        for rank in (0, 1, 4096)
    }
    assert len(seeds) == 27
    # The user's own small seeds are used for initial weights.
    assert min(seeds) > 2**32
