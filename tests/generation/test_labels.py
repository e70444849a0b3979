"""Labels follow the given distribution. Each is a function of (seed, index)."""

import dataclasses

import pytest
import torch
from scipy import stats

from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec
from pipeline.generation.sampler import sample_labels
from tests.generation.common import config

SPEC = ModelSpec(
    ModelConfig(class_conditional=True), ImageConfig(8, 1, tuple("abcde")), DiffusionConfig(timesteps=4)
)


@pytest.mark.parametrize(
    ("labels", "weights", "expected"),
    [
        ((), (), (0.2, 0.2, 0.2, 0.2, 0.2)),
        ((), (1.0, 0.0, 2.0, 3.0, 4.0), (0.1, 0.0, 0.2, 0.3, 0.4)),
        ((4, 1), (3.0, 1.0), (0.0, 0.25, 0.0, 0.0, 0.75)),
        ((2,), (), (0.0, 0.0, 1.0, 0.0, 0.0)),
    ],
)
def test_labels_follow_their_weights(
    labels: tuple[int, ...], weights: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    count = 20_000
    drawn = sample_labels(config("o", labels=labels, label_weights=weights), SPEC, torch.arange(count))
    assert drawn is not None
    counts = drawn.bincount(minlength=5).numpy()
    wanted = [share * count for share in expected]
    assert all(got == 0 for got, want in zip(counts, wanted, strict=True) if want == 0)
    possible = [i for i, want in enumerate(wanted) if want]
    assert counts[possible].sum() == count
    if len(possible) > 1:
        assert stats.chisquare(counts[possible], [wanted[i] for i in possible]).pvalue > 1e-4


def test_a_label_depends_on_seed_and_index_alone() -> None:
    settings = config("o", label_weights=(1.0, 2.0, 3.0, 4.0, 5.0))
    ids = torch.arange(1000)
    together = sample_labels(settings, SPEC, ids)
    assert together is not None
    assert torch.equal(together[ids.flip(0)], sample_labels(settings, SPEC, ids.flip(0)))  # type: ignore[arg-type]
    other = sample_labels(dataclasses.replace(settings, seed=4), SPEC, ids)
    assert not torch.equal(together, other)  # type: ignore[arg-type]
