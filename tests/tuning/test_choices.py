"""A space with a value that no trial could be run with is refused before any is."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import InputError
from pipeline.tuning.choices import MOST_COMBINATIONS, check_choices
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.proposals import Proposals
from pipeline.tuning.search import check_search
from pipeline.tuning.space import load_space, parse_space

ROWS = 1620


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
    ],
)
def test_a_value_that_goes_with_no_other_is_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=f"^--space: .*{says}"):
        check_choices(TuneConfig("d", "o"), parse_space(values), ROWS)


def test_values_that_go_with_some_others_can_be_searched() -> None:
    check_choices(TuneConfig("d", "o"), load_space(), ROWS)
    mixed = parse_space({"variance": ["learned_range", "fixed_small"], "loss": ["simple", "hybrid"]})
    check_choices(TuneConfig("d", "o"), mixed, ROWS)
    decays = [[k / 1000] for k in range(MOST_COMBINATIONS // 20)]
    large = parse_space({"ema_decays": decays, "readers": list(range(1, 41)), "batch_size": [64, 100_000]})
    check_choices(TuneConfig("d", "o"), large, ROWS)  # each trial says what is wrong with its own


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
