"""A mistake on the command line gets one line, which suggests the nearest valid spelling."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.submit import SubmitConfig
from pipeline.commands import cli
from pipeline.commands.__main__ import main
from pipeline.config import ELSEWHERE, TrainConfig, leaf_fields, load_yaml, nearest_name
from pipeline.data.shards import PrepareConfig
from pipeline.errors import InputError
from pipeline.evaluation.config import EvaluateConfig
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
        (TrainConfig, [*GIVEN, "--lr", "1e-4"], "no flag --lr: did you mean --learning-rate?"),
        (TrainConfig, [*GIVEN, "--ema_rate=0.9"], "no flag --ema_rate: did you mean --ema-decays?"),
        (GenerateConfig, ["--num_samples", "9"], "no flag --num_samples: did you mean --count?"),
        (TrainConfig, [*GIVEN, "--class-conditional", "True"], "--class-conditional takes no value"),
        (TrainConfig, [*GIVEN, "--class-conditional=True"], "--class-conditional takes no value"),
        (TrainConfig, [*GIVEN, "--gpu"], "--gpu: a value is missing: {None,True,False}"),
        (TrainConfig, [*GIVEN, "--channel-multipliers", "1,2"], "write spaces between values, no commas"),
        (TrainConfig, [*GIVEN, "--validate-metrics", "bits,cas"], "write spaces between values, no commas"),
        (TrainConfig, ["--data", "d", "--output", ""], "--output is empty"),
        (TrainConfig, ["--data=", "--output", "o"], "--data is empty"),
        (TrainConfig, ["--output", "o"], "required and not given: --data"),
        (TrainConfig, [], "required and not given: --data, --output"),
        (TrainConfig, [*GIVEN, "stray"], "'stray' is not a flag: flags begin with --"),
        (TrainConfig, [*GIVEN, "--steps"], "--steps: a value is missing"),
        (TrainConfig, [*GIVEN, "--steps", "1e4"], "--steps expects INT: no whole number: '1e4'"),
        (TrainConfig, [*GIVEN, "--learning-rate", "x"], "--learning-rate expects FLOAT: no number: 'x'"),
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
        (GenerateConfig, ["--sampler", "DDPM"], "(did you mean ancestral?)"),
        (EvaluateConfig, [*GIVEN, "--metrics", "bits", "fid"], "(did you mean frechet?)"),
        (SubmitConfig, ["train", "--data", "d"], "no flag --data: flags of JOB follow a lone --"),
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


@pytest.mark.parametrize("cls", [TrainConfig, GenerateConfig, EvaluateConfig, PrepareConfig])
def test_the_names_of_other_projects_lead_to_settings(cls: type) -> None:
    leaves = {name.rpartition(".")[2]: name for name in leaf_fields(cls)}
    for name, ours in ELSEWHERE.items():
        assert name not in leaves, name
        assert ours not in leaves or nearest_name(f"--{name.replace('_', '-')}", cls) == leaves[ours]
    known = {name.rpartition(".")[2] for cls in (TrainConfig, GenerateConfig) for name in leaf_fields(cls)}
    assert set(ELSEWHERE.values()) <= known


def test_a_setting_of_a_file_may_not_be_empty_where_it_is_required(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: d\noutput: ''\n")
    with pytest.raises(InputError, match="--output is empty"):
        cli.parse(TrainConfig, ["--config", str(file)], "train", "")
    assert cli.parse(TrainConfig, ["--config", str(file), "--output", "o"], "train", "").output == "o"


def test_a_mistake_in_a_file_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: d\nsteps: 5\nsteps: 6\n")
    with pytest.raises(InputError, match=r"c\.yaml: 'steps' is given a second time at line 3"):
        cli.parse(TrainConfig, ["--config", str(file)], "train", "")
    file.write_text("model: {res_blocks: 1}\noptimizer: &o {learning_rate: 1.0e-3, learning_rate: 1.0e-4}\n")
    with pytest.raises(InputError, match="'learning_rate' is given a second time at line 2"):
        load_yaml(str(file), "--space")
    file.write_text("data: d\n output: o\n")
    with pytest.raises(InputError, match="not allowed here at line 2"):
        load_yaml(str(file))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate"], "generate: required and not given: --model, --output (see ray-ddpm generate --help)"),
        (["generate", "--output", "o"], "not given: --model (see"),
        (
            ["generate", "--model", "m", "--output", "o", "--rows-per-file", "100"],
            "multiple of --batch-size 64: give 64 or 128",
        ),
        (
            ["evaluate", "--model", "m", "--data", "d", "--metrics", "frechet"],
            "--metrics frechet needs --samples",
        ),
    ],
)
def test_settings_that_need_no_data_are_refused_before_ray_starts(
    words: list[str], says: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = list[str]()
    monkeypatch.setattr(cli, "connect_later", lambda *given, **more: None)
    monkeypatch.setattr(cli, "connect_now", lambda: started.append("Ray"))
    assert main(words) == 2
    assert says in capfd.readouterr().err
    assert not started


def test_a_result_is_strict_json(capfd: pytest.CaptureFixture[str]) -> None:
    values = {"metrics": {"a": float("nan"), "b": [float("inf"), 1.5], "c": None}, "count": 3}
    words = ["--data", "d", "--output", "o"]
    assert cli.main("train", "", TrainConfig, lambda config: values, words, ray="never") == 0

    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = json.loads(capfd.readouterr().out, parse_constant=refuse)
    assert found == {"metrics": {"a": None, "b": [None, 1.5], "c": None}, "count": 3}


def test_a_job_searches_for_garbage_rarely_and_its_caller_as_before(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Imports make so many objects that Python would search hundreds of times."""
    before, seen = gc.get_threshold(), list[int]()

    def execute(config: TrainConfig) -> dict[str, Any]:
        seen.append(gc.get_threshold()[0])
        raise InputError("no")

    assert cli.main("train", "", TrainConfig, execute, ["--data", "d", "--output", "o"], ray="never") == 2
    assert seen == [cli.COLLECT_AFTER]
    assert gc.get_threshold() == before
