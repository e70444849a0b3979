"""Averages of the weights, against explicit sums."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.models import ema, snapshots


def test_averages_that_are_apart_are_of_the_weights_as_they_were() -> None:
    """The averages use copies, so later changes of the weights don't matter."""
    weight = torch.tensor([1.0])
    averages = ema.Averages([weight], 1, apart=True)
    weight.fill_(2.0)
    averages.update_([0.5])
    weight.fill_(100.0)
    assert averages.tensors[0][0].tolist() == [1.5]
    averages.update_([0.5])
    weight.fill_(0.0)
    averages.update_([0.5])
    assert averages.tensors[0][0].tolist() == [(1.5 + 100) / 4]


def test_averages_follow_their_decays() -> None:
    values = np.random.default_rng(0).normal(size=50)
    averages = ema.init([torch.tensor([values[0]])], 2)
    expected = [values[0], values[0]]
    for value in values[1:]:
        ema.update_(averages, [torch.tensor([value])], [0.9, 0.99])
        expected = [0.9 * expected[0] + 0.1 * value, 0.99 * expected[1] + 0.01 * value]
    assert [float(a[0]) for a in averages] == pytest.approx(expected, rel=1e-12)


def test_a_power_average_weighs_the_past_by_its_profile() -> None:
    steps, length = 400, 0.1
    gamma = ema.power_gamma(length)
    values = np.sin(np.arange(1, steps + 1) / 40)
    averages = ema.init([torch.zeros(1, dtype=torch.float64)], 1)
    for step, value in enumerate(values, 1):
        ema.update_(averages, [torch.tensor([value])], [ema.power_decay(length, step)])
    tau = np.arange(1, steps + 1)
    profile = tau ** (gamma + 1.0) - (tau - 1) ** (gamma + 1.0)
    assert float(averages[0][0]) == pytest.approx(float((profile * values).sum() / profile.sum()), rel=1e-9)
    center = (gamma + 1) / (gamma + 2)
    assert length == pytest.approx(np.sqrt((gamma + 1) / (gamma + 3) - center**2), rel=1e-9)


def test_another_length_is_reconstructed_from_snapshots() -> None:
    steps, lengths, wanted = 2000, (0.05, 0.1), 0.075
    averages = ema.init([torch.zeros(1, dtype=torch.float64)], 3)
    stored, at, of = list[float](), list[int](), list[float]()
    for step in range(1, steps + 1):
        value = torch.tensor([np.sin(step / 300) + step / steps])
        ema.update_(averages, [value], [ema.power_decay(r, step) for r in (*lengths, wanted)])
        if step % 200 == 0:
            stored += [float(averages[0][0]), float(averages[1][0])]
            at, of = at + [step] * 2, of + list(lengths)
    weights = ema.reconstruction_weights(at, of, steps, wanted)
    assert float(np.dot(weights, stored)) == pytest.approx(float(averages[2][0]), rel=1e-3)
    assert sum(weights) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("count", [3, 4, 8, 16])
@pytest.mark.parametrize(
    ("lengths", "wanted"), [((0.1,), 0.03), ((0.1,), 0.2), ((0.05, 0.1), 0.03), ((0.05, 0.1), 0.2)]
)
def test_few_snapshots_give_the_average_that_was_tracked_beside_them(
    lengths: tuple[float, ...], wanted: float, count: int
) -> None:
    """The weights move from zero to a target with noise on the way, as in training."""
    generator, steps = torch.Generator().manual_seed(0), 480
    place, weights = torch.randn(64, generator=generator), torch.zeros(64)
    averages = ema.init([weights], len(lengths) + 1)
    stored: dict[snapshots.Snapshot, dict[str, Tensor]] = {}
    for step in range(1, steps + 1):
        weights = weights + 3 / steps * (place - weights) + 0.01 * torch.randn(64, generator=generator)
        ema.update_(averages, [weights], [ema.power_decay(r, step) for r in (*lengths, wanted)])
        if step % (steps // count) == 0:
            for length, (average,) in zip(lengths, averages, strict=False):
                stored[snapshots.Snapshot(step, length)] = {"a": average.clone()}
    at, of = [s.step for s in stored], [s.sigma_rel for s in stored]
    assert sum(ema.reconstruction_weights(at, of, steps, wanted)) == pytest.approx(1, abs=1e-9)
    (made,) = snapshots.mix_snapshots(list(stored), stored.__getitem__, [wanted])
    tracked = averages[-1][0]
    # Without the constraint the error is 0.5 at three snapshots of one length, and still 0.05 at sixteen.
    most = 0.08 / count if len(lengths) == 2 else 0.25 / count
    assert (made["a"] - tracked).norm() < most * tracked.norm()


def test_a_snapshot_length_is_reconstructed_as_it_was_stored() -> None:
    weights = ema.reconstruction_weights([100, 200, 200], [0.1, 0.1, 0.05], 200, 0.05)
    assert weights == pytest.approx([0, 0, 1], abs=1e-9)


def test_reconstruction_reads_each_snapshot_once_and_mixes_every_parameter() -> None:
    stored: dict[snapshots.Snapshot, dict[str, Tensor]] = {}
    steps, lengths, wanted = 1000, (0.05, 0.15), [0.05, 0.1]
    shapes = [torch.zeros(3), torch.zeros(2, 2)]
    averages = ema.init(shapes, 3)
    for step in range(1, steps + 1):
        values = [torch.full_like(p, i + np.cos(step / 200)) for i, p in enumerate(shapes)]
        ema.update_(averages, values, [ema.power_decay(r, step) for r in (*lengths, wanted[1])])
        if step % 100 == 0:
            for length, (a, b) in zip(lengths, averages, strict=False):
                stored[snapshots.Snapshot(step, length)] = {"a": a.clone(), "b": b.clone()}
    reads = list[snapshots.Snapshot]()

    def read(snapshot: snapshots.Snapshot) -> dict[str, Tensor]:
        reads.append(snapshot)
        return stored[snapshot]

    kept, made = snapshots.mix_snapshots(list(stored), read, wanted)
    assert sorted(reads, key=str) == sorted(stored, key=str)
    torch.testing.assert_close(kept, stored[snapshots.Snapshot(steps, 0.05)])
    torch.testing.assert_close(made, {"a": averages[2][0], "b": averages[2][1]}, rtol=2e-3, atol=2e-3)


def test_the_name_of_a_snapshot_tells_its_step_and_length() -> None:
    snapshot = snapshots.Snapshot(12_000, 0.075)
    assert snapshots.parse_snapshot(snapshot.name) == snapshot
    assert snapshots.parse_snapshot(snapshot.name + ".partial") is None


@pytest.mark.parametrize("length", [0.0, -0.1, 0.29, float("nan")])
def test_a_length_that_no_profile_has_is_refused(length: float) -> None:
    with pytest.raises(InputError, match="EMA length"):
        ema.power_gamma(length)
