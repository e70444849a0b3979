"""A space with a value that no trial can use is refused before any trial runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.data.index import Splits, open_splits
from pipeline.errors import InputError
from pipeline.tuning import choices
from pipeline.tuning.choices import check_choices
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.proposals import Proposals
from pipeline.tuning.search import check_search
from pipeline.tuning.space import fitted, load_space, parse_space

CONFIG = TuneConfig("d", "o", images=3000, space="space.yaml")


@pytest.fixture(scope="module")
def data(digits: Path) -> Splits:
    return open_splits(str(digits))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"batch_size": [64, 100_000]}, "batch_size 100000: .*more than the 1620 images"),
        ({"batch_size": {"low": 32, "high": 4096}}, "batch_size 4096: .*more than the 1620 images"),
        ({"ema_decays": [[0.9], []]}, r"optimizer.ema_decays \[\]: .*at least one value"),
        (
            {
                "x": [
                    {"variance": "learned_range", "loss": "simple"},
                    {"loss": "vlb", "variance": "learned_range"},
                ]
            },
            'x .*"diffusion.loss": "simple".*: --loss simple does not train',
        ),
        (
            {"variance": ["learned_range", "fixed_small"], "loss": ["simple", "min_snr"]},
            'variance "learned_range": .* does not train --variance',
        ),
        ({"batch_size": 100_000, "compile": [True, False]}, "no trial could be run: --batch-size 100000"),
        (
            {"batch_size": [64, 1600]},
            "batch_size 1600: .*too large to tell the rungs at 334, 1002, 3000 images apart",
        ),
        ({"schedule": ["cosine", "cosin"]}, 'diffusion.schedule "cosin": .*cosin'),
        ({"head_channels": [32, 24]}, "model.head_channels 24: .*does not divide"),
        ({"head_channels": {"low": 24, "high": 32, "step": 8}}, "model.head_channels 24: .*does not divide"),
        ({"channel_multipliers": [[1], [1, 1, 1, 1, 1]]}, r"\[1, 1, 1, 1, 1\]: .*halved 4 times"),
        ({"beta_start": [1e-4, 1e-18], "schedule": "linear"}, "diffusion.beta_start 1e-18: .*small"),
    ],
)
def test_a_value_that_goes_with_no_other_is_named(values: dict[str, Any], says: str, data: Splits) -> None:
    with pytest.raises(InputError, match=f"^--space: .*{says}"):
        check_choices(CONFIG, parse_space({"attention_resolutions": [[]]} | values), data)


@pytest.mark.parametrize("values", [{"timesteps": [0, 100]}, {"timesteps": {"low": 100, "high": 20_000}}])
def test_a_number_of_steps_that_no_schedule_has_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"--timesteps (0|20000): must be at least 1 and at most 10000"):
        parse_space(values)


def test_values_that_go_with_some_others_can_be_searched(data: Splits) -> None:
    train = data["train"]
    check_choices(CONFIG, load_space(flags=fitted(train.image, train.rows)), data)
    mixed = parse_space({"variance": ["learned_range", "fixed_small"], "loss": ["simple", "hybrid"]})
    check_choices(CONFIG, mixed, data)
    check_choices(CONFIG, parse_space({"model_channels": [32, 24], "head_channels": [32, 24]}), data)


@pytest.mark.slow
def test_a_value_of_a_space_too_large_to_try_all_of_it_is_named(
    data: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "MOST_COMBINATIONS", 700)
    monkeypatch.setattr(choices, "TRIED", 70)
    decays = [[k / 1000] for k in range(10)]
    values = {"ema_decays": decays, "readers": list(range(1, 41)), "batch_size": [64, 128]}
    check_choices(CONFIG, parse_space(values), data)
    with pytest.raises(InputError, match="batch_size 100000: no trial could be run with it"):
        check_choices(CONFIG, parse_space(values | {"batch_size": [64, 100_000]}), data)


def test_a_file_of_betas_is_found_from_any_folder(
    data: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.json").write_text("[0.1, 0.2, 0.3]")
    space = parse_space({"schedule": ["cosine", "my.json"]})
    monkeypatch.chdir("/")
    check_choices(CONFIG, space, data)
    assert space.schedule_files == [str(tmp_path / "my.json")]


def test_a_search_is_refused_before_its_output_is_begun(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"batch_size": [64, 100_000]}))
    config = TuneConfig(str(digits), str(tmp_path / "out"), space=str(tmp_path / "space.yaml"))
    with pytest.raises(InputError, match="batch_size 100000"):
        check_search(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [-(2**63), -1, 42_950, 2**63 - 1])
@pytest.mark.parametrize("searcher", ["tpe", "random"])
def test_a_search_proposes_with_any_seed(seed: int, searcher: Any, tmp_path: Path) -> None:
    config = TuneConfig("d", str(tmp_path), seed=seed, searcher=searcher)
    assert isinstance(Proposals(config, load_space(), []).suggest("a"), dict)
