"""A mistake on the command line gets one line, which suggests the nearest valid spelling."""

import json

import pytest

from pipeline.cluster.submit import SubmitConfig
from pipeline.commands import cli
from pipeline.config import TrainConfig
from pipeline.data.shards import PrepareConfig
from pipeline.errors import InputError
from pipeline.generation.config import GenerateConfig

GIVEN = ["--data", "d", "--output", "o"]


@pytest.mark.parametrize(
    ("cls", "words", "says"),
    [
        (TrainConfig, [*GIVEN, "--stepz", "3"], "no flag --stepz: did you mean --steps? (see"),
        (TrainConfig, [*GIVEN, "--stepz=3"], "no flag --stepz: did you mean --steps?"),
        (
            TrainConfig,
            [*GIVEN, "--learning_rte", "3"],
            "no flag --learning_rte: did you mean --learning-rate?",
        ),
        (TrainConfig, ["--bogus", "1"], "no flag --bogus (see"),
        (TrainConfig, ["--output", "o"], "required and not given: --data"),
        (TrainConfig, [], "required and not given: --data, --output"),
        (TrainConfig, [*GIVEN, "stray"], "'stray' is not a flag: flags begin with --"),
        (TrainConfig, [*GIVEN, "--steps"], "--steps: a value is missing"),
        (TrainConfig, [*GIVEN, "--steps", "x"], "--steps expects INT: "),
        (TrainConfig, [*GIVEN, "--variance", "fixed_smal"], "did you mean fixed_small?"),
        (
            TrainConfig,
            [*GIVEN, "--variance", "x"],
            "--variance x: give one of fixed_large, fixed_small, learned_range",
        ),
        (PrepareConfig, ["--output", "o", "--background", "1", "2"], "--background: a value is missing"),
        (
            GenerateConfig,
            ["--model", "m", "--output", "o", "--label-weights", "a"],
            "--label-weights expects",
        ),
        (SubmitConfig, [], "required and not given: JOB"),
        (SubmitConfig, ["trian"], "JOB trian: give one of prepare, train, "),
    ],
)
def test_a_mistake_is_told_in_one_line(cls: type, words: list[str], says: str) -> None:
    with pytest.raises(InputError) as caught:
        cli.parse(cls, words, "train", "")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value) and "│" not in str(caught.value)
    assert str(caught.value).endswith("(see ray-ddpm train --help)")


def test_a_result_is_strict_json(capfd: pytest.CaptureFixture[str]) -> None:
    values = {"metrics": {"a": float("nan"), "b": [float("inf"), 1.5], "c": None}, "count": 3}
    words = ["--data", "d", "--output", "o"]
    assert cli.main("train", "", TrainConfig, lambda config: values, words, ray="never") == 0

    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = json.loads(capfd.readouterr().out, parse_constant=refuse)
    assert found == {"metrics": {"a": None, "b": [None, 1.5], "c": None}, "count": 3}
