"""The search space takes every training flag by any of its names, and is checked before anything runs."""

import json
import random
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution

from pipeline.commands import cli
from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, OptimizerConfig, TrainConfig
from pipeline.diffusion.losses import check_loss
from pipeline.diffusion.schedules import make_betas
from pipeline.errors import InputError
from pipeline.models.unet import check_model
from pipeline.tuning.space import (
    RESERVED,
    apply,
    fitted,
    load_space,
    parse_space,
    resolve_flag,
    train_command,
)

BASE = TrainConfig(data="d", output="o")


def test_every_flag_of_training_can_be_searched_by_its_dotted_its_bare_and_its_command_line_name() -> None:
    for field in fields(TrainConfig):
        value = getattr(BASE, field.name)
        leaves = [(f"{field.name}.{f.name}", f.name) for f in fields(value)] if is_dataclass(value) else []
        for dotted, bare in leaves or [(field.name, field.name)]:
            if dotted in RESERVED:
                with pytest.raises(InputError, match="set by the search"):
                    resolve_flag(dotted)
                continue
            for name in (dotted, bare, f"--{bare.replace('_', '-')}"):
                assert resolve_flag(name) == dotted


@pytest.mark.parametrize("size", [1, 7, 8, 12, 28, 32, 64, 96, 256])
@pytest.mark.parametrize("classes", [(), ("one",), ("cat", "dog")])
def test_the_default_space_fits_images_of_any_size_and_classes(size: int, classes: tuple[str, ...]) -> None:
    image = ImageConfig(size, 3, classes)
    space = load_space(flags=fitted(image, 1000))
    chance = random.Random(0)
    for _ in range(50):
        chosen = {
            name: chance.choice(entry.choices if isinstance(entry, CategoricalDistribution) else [entry.low])  # type: ignore[attr-defined]
            for name, entry in space.entries.items()
        }
        trial = apply(BASE, space.decode(chosen))
        check_model(trial.model, image)
        assert trial.model.class_conditional == (len(classes) > 1)
        levels = [size // 2**k for k in range(len(trial.model.channel_multipliers))]
        assert set(trial.model.attention_resolutions) <= set(levels)
    assert ("label_dropout" in space.entries) == (len(classes) > 1)


@pytest.mark.parametrize(
    ("size", "rows", "expected"),
    [
        (8, 1620, (128, [1, 2], [4], [32, 64])),
        (28, 60_000, (128, [1, 2, 2], [14, 7], [64, 128])),
        (32, 100, (100, [1, 2, 2], [16, 8], [64, 128])),
        (64, 10_000, (64, [1, 2, 2, 2], [16, 8], [64, 128])),
    ],
)
def test_the_default_space_for_common_sizes(size: int, rows: int, expected: tuple[Any, ...]) -> None:
    flags = fitted(ImageConfig(size, 3), rows)
    found = (
        flags["batch_size"],
        *flags["model.channel_multipliers"],
        *flags["model.attention_resolutions"],
        flags["model.model_channels"],
    )
    assert found == expected


def test_the_default_space_searches_what_a_user_expects_and_all_its_choices_can_be_trained() -> None:
    space = load_space(flags=fitted(ImageConfig(8, 1), 1620))
    found = set(space.entries) - space.together
    groups = [json.loads(value) for name in space.together for value in space.entries[name].choices]  # type: ignore[attr-defined]
    found |= {flag for group in groups for flag in group}
    assert found >= {
        "diffusion.schedule",
        "diffusion.beta_end",
        "diffusion.cosine_offset",
        "diffusion.timesteps",
        "diffusion.variance",
        "diffusion.loss",
        "optimizer.learning_rate",
        "model.model_channels",
        "optimizer.ema_decays",
    }
    for group in groups:
        config = apply(BASE, group)
        check_loss(config.diffusion)
        make_betas(config.diffusion)


def test_a_choice_becomes_the_training_run_that_it_names() -> None:
    space = parse_space(
        {
            "batch-size": 64,
            "timesteps": {"low": 10, "high": 100},
            "ema_decays": [[0.9], [0.99, 0.5]],
            "noise": [{"schedule": "linear", "beta_end": 0.01}, {"schedule": "cosine"}],
            "compile": [True, False],
        }
    )
    choices = {name: entry.choices for name, entry in space.entries.items() if hasattr(entry, "choices")}
    flags = space.decode(
        {
            "diffusion.timesteps": 50,
            "optimizer.ema_decays": choices["optimizer.ema_decays"][1],
            "noise": choices["noise"][0],
            "compile": choices["compile"][0],
        }
    )
    diffusion = DiffusionConfig(schedule="linear", beta_end=0.01, timesteps=50)
    expected = replace(
        BASE,
        batch_size=64,
        diffusion=diffusion,
        compile=True,
        optimizer=OptimizerConfig(ema_decays=(0.99, 0.5)),
    )
    assert apply(BASE, flags) == expected


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"shedule": ["linear"]}, "'shedule' is not a flag of the train job: did you mean schedule?"),
        (
            {"diffusion": {"timesteps": [5, 9]}},
            "write its flags as diffusion.NAME, each on a line of its own",
        ),
        ({"channel_multipliers": [1, 2]}, "one value is a list itself: write [[1, 2]]"),
        ({"lr": [0.1, 0.2]}, "'lr' is not a flag of the train job: did you mean learning_rate?"),
        ({"steps": [10, 20]}, "'steps'"),
        ({"diffusion.variance": ["fixed"]}, "fixed_large"),
        ({"timesteps": [100, "many"]}, "'many'"),
        ({"timesteps": {"low": 10}}, "'high'"),
        ({"timesteps": {"low": 10, "high": 5}}, "timesteps"),
        ({"timesteps": {"low": 1, "hihg": 5}}, "'hihg'"),
        ({"learning_rate": {"low": 0.0, "high": 1.0, "log": True}}, "learning_rate"),
        ({"schedule": {"low": 1, "high": 2}}, "list of values"),
        ({"schedule": []}, "empty"),
        ({"timesteps": [5, 5]}, "twice"),
        ({"x": [{"schedule": "linear"}], "schedule": ["cosine"]}, "twice"),
        ({"x": [{"bogus": 1}]}, "'bogus'"),
        ({"batch_size": 64}, "nothing to search"),
        ({"image_size": [16, 32]}, "image_size"),
        ({"x": [{"image_size": 16}, {"image_size": 32}]}, "image_size"),
        ({"learning_rate": {"low": 0.1, "high": 0.2, "log": "false"}}, "'false' is neither true nor false"),
        ({"learning_rate": {"low": "0.1", "high": 0.2}}, "'0.1' is not a finite number"),
        ({"learning_rate": [0.1, "0.2"]}, "'0.2'"),
    ],
)
def test_a_space_that_cannot_be_is_refused_in_one_line(values: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match="--space") as refused:
        parse_space(values)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_space_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--space .*none.yaml"):
        load_space(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("text", "low"),
    [
        ("learning_rate: {low: 1e-3, high: 1E-2, log: true}", 1e-3),
        ('{"learning_rate": {"low": 1e-05, "high": 1e-02}}', 1e-5),
        ("learning_rate: {low: 5.e-4, high: +1e+0}", 5e-4),
    ],
)
def test_numbers_with_an_exponent_are_numbers(text: str, low: float, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(text)
    entry = load_space(str(tmp_path / "space.yaml")).entries["optimizer.learning_rate"]
    assert entry.low == low  # type: ignore[attr-defined]
    (tmp_path / "config.yaml").write_text("optimizer: {learning_rate: 1e-3}")
    flags = ["--config", str(tmp_path / "config.yaml"), "--data", "d", "--output", "o"]
    assert cli.parse(TrainConfig, flags, "train", "").optimizer.learning_rate == 1e-3


def test_the_printed_command_gives_the_same_configuration_back() -> None:
    config = TrainConfig(
        data="/some where/d",
        output="o",
        steps=77,
        random_flip=True,
        gpu=False,
        seed=3,
        model=ModelConfig(model_channels=32, channel_multipliers=(1, 2), attention_resolutions=()),
        diffusion=DiffusionConfig(schedule="sigmoid", sigmoid_temperature=0.7, timesteps=123),
        optimizer=OptimizerConfig(learning_rate=0.00123456789, ema_decays=(0.5, 0.9)),
    )
    import shlex

    words = shlex.split(train_command(config))
    assert words[:2] == ["python", "jobs/train.py"]
    assert cli.parse(TrainConfig, words[2:], "train", "") == config
