"""The error for settings that don't fit a model names values that do."""

from dataclasses import replace

import pytest

from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec
from pipeline.errors import InputError
from pipeline.generation.config import GenerateConfig, check

SPEC = ModelSpec(
    ModelConfig(class_conditional=True), ImageConfig(8, 1, ("cat", "dog")), DiffusionConfig(timesteps=20)
)
PLAIN = replace(SPEC, model=ModelConfig())


@pytest.mark.parametrize(
    ("spec", "config", "says"),
    [
        (SPEC, GenerateConfig(sampling_steps=21), "more than the model's T = 20: give 1 to 20, or 0 for 20"),
        (SPEC, GenerateConfig(batch_size=60), "not a multiple of --batch-size 60: give 1020 or 1080"),
        (SPEC, GenerateConfig(batch_size=60, rows_per_file=7), "multiple of --batch-size 60: give 60"),
        (SPEC, GenerateConfig(labels=("cot",)), "classes 0 to 1: cat, dog (did you mean cat?)"),
        (
            PLAIN,
            GenerateConfig(guidance=2.0),
            "this one is not: leave them out, or train one with --class-cond",
        ),
    ],
)
def test_a_setting_that_does_not_fit_is_answered_with_one_that_does(
    spec: ModelSpec, config: GenerateConfig, says: str
) -> None:
    check(replace(config, sampling_steps=0, rows_per_file=1020, batch_size=60, labels=(), guidance=1.0), spec)
    with pytest.raises(InputError) as refused:
        check(config, spec)
    assert says in str(refused.value) and "\n" not in str(refused.value)
