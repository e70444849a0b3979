"""Coefficients and steps against diffusers' schedulers, as far as both define the same."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from pipeline.config import DiffusionConfig, Variance
from pipeline.diffusion.process import Process, make_process, posterior_mean_from_eps, q_sample
from pipeline.diffusion.samplers import sample

T = 1000
SHAPE = (4, 3, 4, 4)
TOLERANCE = 1e-5
THEIRS = {"linear": "linear", "quadratic": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def make(schedule: str = "linear", variance: Variance = "fixed_small") -> tuple[Process, dict[str, Any]]:
    """Return our process and diffusers' settings of the same one."""
    process = make_process(DiffusionConfig(schedule=schedule, timesteps=T, variance=variance))
    return process, {
        "num_train_timesteps": T,
        "beta_schedule": THEIRS[schedule],
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "clip_sample": False,
    }


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Assert agreement to 1e-5 of the largest value, since diffusers computes in float32."""
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def curved(x_t: Tensor, t: Tensor | int) -> Tensor:
    """Return a smooth epsilon that is not linear in x_t and differs between steps."""
    time = torch.as_tensor(t).reshape(-1, 1, 1, 1) / T
    return (x_t * (1 - 0.5 * time)).tanh() + 0.1 * x_t


def learned(x_t: Tensor, t: Tensor | int) -> Tensor:
    return torch.cat([curved(x_t, t), x_t.sin()], dim=1)


def noise_of(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def follow(scheduler: Any, model: Any, timesteps: list[int], x: Tensor, **options: Any) -> Tensor:
    """Run diffusers' own loop. Seed i gives the noise of step i."""
    for i, t in enumerate(timesteps):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            x = scheduler.step(model(x, t), t, x, generator=generator, **options).prev_sample
    return x


@pytest.mark.parametrize("schedule", THEIRS)
def test_betas_and_alpha_bars_are_those_of_diffusers(schedule: str) -> None:
    process, settings = make(schedule)
    theirs = DDPMScheduler(**settings)
    assert_close(process.beta, theirs.betas)
    assert_close(process.alpha_bar, theirs.alphas_cumprod)


@pytest.mark.parametrize("schedule", THEIRS)
def test_noised_images_are_those_of_diffusers(schedule: str) -> None:
    process, settings = make(schedule)
    x_0, noise = noise_of(100), noise_of(101)
    t = torch.tensor([0, 1, 500, 999])
    assert_close(q_sample(process, x_0, t, noise), DDPMScheduler(**settings).add_noise(x_0, noise, t))


def test_the_mean_of_one_step_is_that_of_diffusers() -> None:
    process, settings = make()
    x_t = noise_of(100)
    scheduler = DDPMScheduler(**settings)
    # The last step adds no noise, so it returns the mean.
    theirs = scheduler.step(curved(x_t, 0), 0, x_t).prev_sample
    ours = posterior_mean_from_eps(process, x_t, torch.zeros(4, dtype=torch.int64), curved(x_t, 0))
    assert_close(ours, theirs)


@pytest.mark.parametrize("steps", [2, 10, 25])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("clip", [False, True])
def test_ancestral_samples_are_those_of_diffusers(variance: Variance, steps: int, clip: bool) -> None:
    process, settings = make(variance=variance)
    model = learned if variance == "learned_range" else curved
    scheduler = DDPMScheduler(
        **settings | {"clip_sample": clip}, variance_type=variance, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    ours = list[Tensor]()
    sample(
        process,
        lambda x, t, labels: model(x, t),
        noise_of(100),
        noise_of,
        "ancestral",
        steps,
        clip=clip,
        on_step=lambda step, x: ours.append(x),
    )
    # In diffusers the last step of a respaced chain adds noise to the image too, unless its variance is zero.
    same = steps if variance == "fixed_small" else steps - 1
    assert_close(ours[same - 1], follow(scheduler, model, timesteps[:same], noise_of(100)))


@pytest.mark.parametrize("schedule", THEIRS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_samples_are_those_of_diffusers(schedule: str, eta: float, steps: int) -> None:
    process, settings = make(schedule)
    scheduler = DDIMScheduler(**settings, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    theirs = follow(scheduler, curved, scheduler.timesteps.tolist(), noise_of(100), eta=eta)
    ours = sample(
        process,
        lambda x, t, labels: curved(x, t),
        noise_of(100),
        noise_of,
        "ddim",
        steps,
        eta=eta,
        clip=False,
    )
    assert_close(ours, theirs)


@pytest.mark.parametrize("schedule", THEIRS)
@pytest.mark.parametrize("steps", [4, 20, 50])
def test_dpm_solver_samples_are_those_of_diffusers(schedule: str, steps: int) -> None:
    process, settings = make(schedule)
    settings.pop("clip_sample")
    scheduler = DPMSolverMultistepScheduler(
        **settings, timestep_spacing="trailing", final_sigmas_type="zero", solver_order=2
    )
    scheduler.set_timesteps(steps)
    theirs = follow(scheduler, curved, scheduler.timesteps.tolist(), noise_of(100))
    ours = sample(
        process, lambda x, t, labels: curved(x, t), noise_of(100), noise_of, "dpm_solver", steps, clip=False
    )
    assert_close(ours, theirs)
