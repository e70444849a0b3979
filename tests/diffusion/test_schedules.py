import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import DiffusionConfig
from pipeline.diffusion.process import make_process, snr
from pipeline.diffusion.schedules import SCHEDULES, make_betas, resolve
from pipeline.errors import InputError


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [1, 2, 3, 20, 1000, 10_000])
def test_any_schedule_makes_a_usable_chain_of_any_length(schedule: str, timesteps: int) -> None:
    process = make_process(DiffusionConfig(schedule=schedule, timesteps=timesteps))
    assert process.beta.dtype == torch.float64
    assert process.beta.shape == (timesteps,)
    assert ((process.beta > 0) & (process.beta < 1)).all()
    assert (snr(process).diff() < 0).all()
    for name in ("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"):
        assert getattr(process, name).isfinite().all()
    # Little of the image is left at the end for any T, so N(0, I) is close to q(x_T).
    if timesteps >= 20:
        assert process.alpha_bar[-1] < 1e-3


def test_named_schedules_are_those_of_their_papers() -> None:
    betas = {name: make_betas(DiffusionConfig(schedule=name, timesteps=1000)).numpy() for name in SCHEDULES}
    np.testing.assert_allclose(betas["linear"], np.linspace(1e-4, 0.02, 1000), rtol=1e-12)
    np.testing.assert_allclose(betas["quadratic"], np.linspace(0.01, math.sqrt(0.02), 1000) ** 2, rtol=1e-12)
    assert len(set(betas["constant"])) == 1
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas["cosine"])[:-1], (f / f[0])[1:-1], rtol=1e-9)
    assert betas["cosine"].max() == 0.999
    level = 1 / (1 + np.exp(-np.linspace(-3, 3, 1001)))
    alpha_bar = (level[-1] - level) / (level[-1] - level[0])
    np.testing.assert_allclose(np.cumprod(1 - betas["sigmoid"])[:-1], alpha_bar[1:-1], rtol=1e-9)
    alpha_bar = np.cumprod(1 - betas["log_snr"])
    np.testing.assert_allclose(np.log(alpha_bar / (1 - alpha_bar)), np.linspace(10, -10, 1000), atol=1e-8)


def test_both_ends_of_log_snr_are_settings() -> None:
    config = DiffusionConfig(schedule="log_snr", timesteps=100, log_snr_first=13.3, log_snr_last=-5)
    alpha_bar = np.cumprod(1 - make_betas(config).numpy())
    np.testing.assert_allclose(np.log(alpha_bar / (1 - alpha_bar))[[0, -1]], [13.3, -5], atol=1e-6)
    with pytest.raises(InputError, match="--log-snr-first 0: expected more than --log-snr-last 0"):
        make_betas(DiffusionConfig(schedule="log_snr", log_snr_first=0, log_snr_last=0))


@pytest.mark.parametrize("text", ["[0.1, 0.2, 0.3]", "0.1, 0.2, 0.3", "0.1\n0.2\n0.3\n", "1e-1 2e-1 3e-1"])
def test_a_file_of_betas_is_the_schedule_of_as_many_steps(text: str, tmp_path: Path) -> None:
    file = tmp_path / "betas.txt"
    file.write_text(text)
    config = resolve(DiffusionConfig(schedule=str(file), timesteps=1000))
    assert (config.timesteps, config.betas) == (3, (0.1, 0.2, 0.3))
    # The resolved configuration holds the betas and doesn't need the file.
    file.unlink()
    torch.testing.assert_close(
        make_process(config).alpha_bar, torch.tensor([0.9, 0.72, 0.504], dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0.1 0.2 1.0", "number 3 is 1; each must lie between 0 and 1"),
        ("0.1 0 0.2", "number 2 is 0"),
        ("0.1 -0.2", "number 2 is -0.2"),
        ("[0.1, NaN]", "number 2 is nan"),
        ("[0.1, Infinity]", "number 2 is inf"),
        ("", "--timesteps 0: must be at least 1"),
        ("0.1 much", "expected a list of numbers"),
        ('{"betas": [0.1]}', "expected a list of numbers"),
        ("0.9 " * 100, "underflows"),
    ],
)
def test_a_file_that_is_no_schedule_is_refused_in_one_line(text: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "betas.txt"
    file.write_text(text)
    with pytest.raises(InputError, match=reason) as error:
        resolve(DiffusionConfig(schedule=str(file)))
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (DiffusionConfig(timesteps=0), "--timesteps 0: must be at least 1 and at most 10000"),
        (DiffusionConfig(timesteps=10_001), "--timesteps 10001: must be at least 1"),
        (DiffusionConfig(schedule="cubic"), "neither a file nor one of linear"),
        (DiffusionConfig(betas=(0.1,), timesteps=1), "leave one of the two out"),
        (DiffusionConfig(schedule="explicit", betas=(0.1,), timesteps=2), "give one for each"),
    ],
)
def test_settings_that_make_no_chain_are_refused(config: DiffusionConfig, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        make_betas(config)


def test_an_unknown_schedule_is_refused_before_it_is_read_as_a_file() -> None:
    with pytest.raises(InputError, match="neither a file nor one of"):
        resolve(DiffusionConfig(schedule="cubic"))
