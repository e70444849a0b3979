"""The counter-based generator against Random123's published vectors and the distributions it claims."""

import pytest
import torch
from scipy import stats

from pipeline.rng import Purpose, bits, normal, philox4x32, uniform

# Random123 (Salmon et al. 2011), examples/kat_vectors, philox4x32 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_published_vectors(counter: str, key: str, result: str) -> None:
    words = tuple(torch.tensor([int(word, 16)]) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in philox4x32(words, (k0, k1))] == result.split()


def test_a_sample_draws_the_same_numbers_in_any_batch() -> None:
    ids = torch.tensor([7, 2**40 + 3, 0, 99])
    whole = normal(5, 2, ids, Purpose.NOISE, (3, 4, 4))
    alone = normal(5, 2, ids[1:2], Purpose.NOISE, (3, 4, 4))
    assert torch.equal(whole[1:2], alone)


def test_seed_epoch_id_and_purpose_each_change_every_number() -> None:
    ids = torch.arange(64)
    base = bits(1, 1, ids, Purpose.NOISE, 8)
    others = [
        bits(2, 1, ids, Purpose.NOISE, 8),
        bits(1 + 2**32, 1, ids, Purpose.NOISE, 8),
        bits(1, 2, ids, Purpose.NOISE, 8),
        bits(1, 1, ids + 2**32, Purpose.NOISE, 8),
        bits(1, 1, ids, Purpose.TIMESTEP, 8),
    ]
    for other in others:
        assert (base == other).float().mean() < 0.01


def test_epoch_may_differ_by_sample() -> None:
    ids = torch.tensor([4, 5])
    mixed = uniform(3, torch.tensor([1, 2]), ids, Purpose.FLIP)
    assert mixed[0] == uniform(3, 1, ids[:1], Purpose.FLIP)
    assert mixed[1] == uniform(3, 2, ids[1:], Purpose.FLIP)


def test_uniform_and_normal_have_their_distributions() -> None:
    ids = torch.arange(500)
    assert stats.kstest(uniform(0, 0, ids, Purpose.NOISE, 200).flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal(0, 0, ids, Purpose.NOISE, (200,)).flatten().numpy(), "norm").pvalue > 1e-3
