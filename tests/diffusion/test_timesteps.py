"""Drawing t: the loss is unbiased for any distribution, and has less variance if that follows the losses."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config import DiffusionConfig
from pipeline.diffusion.losses import training_loss
from pipeline.diffusion.timesteps import State, draw, init_state, update
from tests.diffusion.common import process_of

EVEN = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


def fed(losses: Tensor) -> State:
    """Return the state after ten losses around the given one for every t."""
    state = init_state("loss_second_moment", len(losses))
    steps = torch.arange(len(losses))
    for i in range(10):
        state = update(state, steps, losses * (0.5 + i / 9))
    return state


def test_the_weighted_mean_over_drawn_steps_is_the_mean_over_uniform_ones() -> None:
    losses = torch.logspace(2, -3, 30, dtype=torch.float64)
    for state in (init_state("uniform", 30), init_state("loss_second_moment", 30), fed(losses)):
        t, weight = draw(state, EVEN)
        assert (weight * losses[t]).mean().item() == pytest.approx(losses.mean().item(), rel=1e-3)
        assert weight.mean().item() == pytest.approx(1, rel=1e-3)


def test_steps_are_drawn_as_often_as_the_root_of_their_second_moment() -> None:
    losses = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    t, _ = draw(fed(losses), EVEN)
    share = torch.bincount(t, minlength=4) / len(EVEN)
    np.testing.assert_allclose(share, 0.999 * losses / 8 + 0.001 / 4, atol=1e-4)


def test_it_stays_uniform_until_every_step_has_ten_losses() -> None:
    state = init_state("loss_second_moment", 3)
    for _ in range(20):
        state = update(state, torch.tensor([0, 1]), torch.tensor([9.0, 1.0]))
    assert (state["probability"] == 1 / 3).all()
    state = update(state, torch.full((10,), 2), torch.ones(10))
    assert state["probability"][0] > 0.8


def test_only_the_latest_ten_losses_count_and_none_that_is_not_finite() -> None:
    state = fed(torch.tensor([100.0, 1.0]))
    for loss in [1.0] * 10 + [math.inf, math.nan]:
        state = update(state, torch.tensor([0]), torch.tensor([loss]))
    moment = np.sqrt(np.mean((0.5 + np.arange(10) / 9) ** 2))
    assert state["probability"][0].item() == pytest.approx(1 / (1 + moment), rel=2e-3)


def test_losses_change_nothing_where_steps_are_uniform() -> None:
    state = init_state("uniform", 5)
    assert update(state, torch.tensor([1]), torch.tensor([7.0])) is state


class Net(nn.Module):
    """A small network with the same weights for all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 32), nn.SiLU(), nn.Linear(32, 8))

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        time = torch.stack([t / 100, (t + 1.0).log() / 5], dim=1).to(x_t.dtype)
        eps: Tensor = self.layers(torch.cat([x_t.flatten(1), time], dim=1))
        return eps[:, :, None, None]


def test_drawing_by_the_second_moment_lowers_the_variance_of_the_bounds_gradient() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    process, config = process_of(timesteps=100, schedule="cosine"), DiffusionConfig(loss="vlb")
    model = Net()
    images = torch.randint(0, 256, (64, 1, 1, 1), generator=generator).expand(-1, 8, -1, -1) / 127.5 - 1

    def losses(t: Tensor, kind: DiffusionConfig = config) -> Tensor:
        rows = torch.randint(0, len(images), t.shape, generator=generator)
        noise = torch.randn(len(t), 8, 1, 1, generator=generator)
        return training_loss(process, kind, model, images[rows], t, noise)

    # Train for a while: gradients of untrained or finished weights aren't typical.
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        losses(torch.randint(0, 100, (64,), generator=generator), DiffusionConfig()).mean().backward()
        optimizer.step()
    state = init_state("loss_second_moment", 100)
    for _ in range(10):
        with torch.no_grad():
            state = update(state, torch.arange(100), losses(torch.arange(100)))

    def gradients(state: State) -> Tensor:
        """Return 200 estimates of the gradient, each from 16 images, [200, weights]."""
        rows = []
        for _ in range(200):
            t, weight = draw(state, torch.rand(16, generator=generator, dtype=torch.float64))
            loss = (weight.float() * losses(t)).mean()
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        return torch.stack(rows)

    uniform, weighted = gradients(init_state("uniform", 100)), gradients(state)
    variances = [g.var(dim=0).sum().item() for g in (uniform, weighted)]
    ratio = variances[0] / variances[1]
    print(f"variance of the gradient of L_vlb, uniform over loss-second-moment: {ratio:.2f}")
    assert ratio > 1.5
    # Both estimate the same gradient.
    difference = uniform.mean(0) - weighted.mean(0)
    assert difference.norm().item() < 4 * math.sqrt(sum(variances) / 200)
