"""Every numeric setting of a job has a range. `--help` shows it, and a value outside is refused in one line."""

import dataclasses
import math
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from pipeline.cluster.submit import SubmitConfig
from pipeline.commands import __main__, cli, demo, export, plot
from pipeline.config import TrainConfig
from pipeline.data.shards import PrepareConfig
from pipeline.errors import InputError
from pipeline.evaluation.config import EvaluateConfig
from pipeline.generation.config import GenerateConfig
from pipeline.ranges import LARGEST, Range, Seed, check_ranges, range_of
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.space import RESERVED, parse_space

CONFIGS = {
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "tune": TuneConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "plot": plot.PlotConfig,
    "export": export.ExportConfig,
    "submit": SubmitConfig,
    "demo": demo.DemoConfig,
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A number, or a tuple of numbers, in a job's configuration.

    Attributes:
        path: the groups that contain it, then its own name.
        count: how many numbers are given together.
    """

    job: str
    path: tuple[str, ...]
    kind: type
    count: int
    span: Range
    default: Any

    @property
    def flag(self) -> str:
        return f"--{self.path[-1].replace('_', '-')}"

    @property
    def many(self) -> bool:
        return isinstance(self.default, tuple)

    def outside(self) -> list[Any]:
        """Return values that must be refused: just beyond each end, and not finite."""
        span, step = self.span, 1 if self.kind is int else 1e-6
        ends = [span.gt, span.lt]
        ends += [None if span.ge is None else span.ge - step, None if span.le is None else span.le + step]
        values = [self.kind(end) for end in ends if end is not None]
        if self.kind is float:
            return [*values, math.nan, math.inf, -math.inf]
        return values if span.le is not None else [*values, LARGEST + 1]

    def of(self, value: Any) -> Any:
        """Return the setting with this number as a file spells it."""
        return [value] * self.count if self.many else value


def numbers(hint: Any) -> list[type]:
    """Return the numeric types in a type, including those in tuples and unions."""
    if hint in (int, float):
        return [hint]
    return [kind for part in get_args(hint) for kind in numbers(part)]


def settings(job: str, cls: Any, path: tuple[str, ...] = ()) -> Iterator[Setting]:
    whole, plain = get_type_hints(cls, include_extras=True), get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(plain[field.name]):
            yield from settings(job, plain[field.name], (*path, field.name))
        elif kinds := numbers(plain[field.name]):
            span = range_of(whole[field.name])
            assert span, f"{job}: {field.name} has no range"
            yield Setting(job, (*path, field.name), kinds[0], len(kinds), span, field.default)


SETTINGS = [setting for job, cls in CONFIGS.items() for setting in settings(job, cls)]
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda one: f"{one.job} {one.flag}")


def test_every_job_is_here_and_its_numbers_are_found() -> None:
    assert set(CONFIGS) == set(__main__.JOBS)
    assert {one.flag for one in SETTINGS} >= {"--steps", "--adam-betas", "--ema-decays", "--background"}
    assert len(SETTINGS) > 90


def refused(job: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a job that must be refused, and return its one line."""
    assert __main__.main([job, *arguments]) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert shown.out == ""
    return line


def required(job: str) -> dict[str, str]:
    fields = dataclasses.fields(CONFIGS[job])
    names = [one.name for one in fields if one.default is one.default_factory is dataclasses.MISSING]
    return {name: "train" if name == "job" else "there" for name in names}


def replaced(config: Any, path: tuple[str, ...], value: Any) -> Any:
    name, *inner = path
    new = replaced(getattr(config, name), tuple(inner), value) if inner else value
    return dataclasses.replace(config, **{name: new})


@each_setting
def test_a_number_outside_of_its_range_is_refused_and_the_default_and_the_ends_are_not(
    setting: Setting,
) -> None:
    config = CONFIGS[setting.job](**required(setting.job))
    check_ranges(config)
    ends = [setting.kind(end) for end in (setting.span.ge, setting.span.le) if end is not None]
    for value in ends:
        check_ranges(replaced(config, setting.path, (value,) * setting.count if setting.many else value))
    for value in setting.outside():
        with pytest.raises(InputError) as error:
            check_ranges(replaced(config, setting.path, (value,) * setting.count if setting.many else value))
        assert str(error.value).startswith(f"{setting.flag} {value}: must be ")


@each_setting
def test_the_line_names_the_flag_on_a_command_line_and_in_a_file(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, value = required(setting.job), setting.outside()[-1]
    says = f"{setting.job}: {setting.flag} {value}: must be "
    words = [
        word for name, text in given.items() for word in ([text] if name == "job" else [f"--{name}", text])
    ]
    line = refused(setting.job, [*words, setting.flag, *[str(value)] * setting.count], capsys)
    assert line.startswith(says)
    file, positional = tmp_path / "c.yaml", [text for name, text in given.items() if name == "job"]

    def refused_in_file(value: float) -> str:
        content = reduce(lambda inner, name: {name: inner}, reversed(setting.path), setting.of(value))
        file.write_text(yaml.safe_dump({**given, **content}))
        return refused(setting.job, [*positional, "--config", str(file)], capsys)

    assert refused_in_file(value).startswith(says)
    if setting.kind is int:
        for value in (math.nan, math.inf, -math.inf, 1.5):
            assert f"{setting.flag}: expected int, got {value}" in refused_in_file(value)


@pytest.mark.parametrize("job", CONFIGS)
def test_help_shows_the_ranges_behind_the_defaults(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main([job, "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for setting in SETTINGS:
        if (
            setting.job == job and setting.span.ends and setting.span != range_of(Seed)
        ):  # too long for the help
            assert f"; {setting.span.ends})" in shown
    if job == "train":
        assert "0 = the worker's part of the batch at once. (default: 0; at least 0)" in shown
        assert "Adam's moment decay rates. (default: 0.9 0.999; at least 0 and less than 1)" in shown


SEARCHED = [one for one in SETTINGS if one.job == "train" and one.path[0] not in {*RESERVED, "image_size"}]


@pytest.mark.parametrize("setting", SEARCHED, ids=lambda one: one.flag)
def test_a_search_space_with_a_number_outside_is_refused(setting: Setting) -> None:
    name, inside = ".".join(setting.path), list(setting.default) if setting.many else setting.default
    for value in setting.outside():
        wrong = setting.of(value)
        spaces: list[dict[str, Any]] = [
            {name: [inside, wrong]},
            {"x": [{name: inside}, {name: wrong}]},
            {name: [wrong], "compile": [True, False]},
        ]
        if not setting.many and math.isfinite(value):
            low, high = sorted((inside, value))
            spaces.append({name: {"low": low, "high": high}})
        for space in spaces:
            with pytest.raises(InputError) as error:
                parse_space(space, "--space s")
            assert str(error.value).startswith(f"--space s: {setting.flag} {value}: must be ")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("optimizer: {adam_betas: [0.9]}", "--adam-betas: expected 2 values, got 1"),
        ("optimizer: {learning_rate: 1" + "0" * 400 + "}", "--learning-rate inf: must be a finite number"),
        ("steps: 1" + "0" * 5000, "--config"),
        ("steps: .nan", "--steps: expected int, got nan"),
        ("steps: true", "--steps: expected int, got True"),
    ],
    ids=range(5),
)
def test_numbers_that_only_a_file_can_hold_are_refused_in_one_line(
    content: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(f"data: d\noutput: o\n{content}\n")
    assert says in refused("train", ["--config", str(tmp_path / "c.yaml")], capsys)


def test_what_is_inside_is_read_as_before() -> None:
    words = [
        "--data",
        "d",
        "--output",
        "o",
        "--adam-betas",
        "0.5",
        "0.6",
        "--ema-decays",
        "0.9",
        "--seed",
        "-3",
    ]
    config = cli.parse(TrainConfig, words, "train", "")
    assert (config.optimizer.adam_betas, config.optimizer.ema_decays, config.seed) == ((0.5, 0.6), (0.9,), -3)
