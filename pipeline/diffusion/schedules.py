"""Beta schedules, which set how much noise each step of the forward chain adds.

Every named schedule is defined for any T. Schedules given by their betas (linear, quadratic) are rescaled by 1000 /
T, so that the whole chain adds about as much noise as the published one of 1000 steps.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import DiffusionConfig
from pipeline.errors import InputError
from pipeline.ranges import check_ranges

_MAX_BETA = 0.999
_BETA_START, _BETA_END = 1e-4, 0.02
_EXPLICIT = "explicit"


def linear(timesteps: int, beta_start: float = _BETA_START, beta_end: float = _BETA_END) -> Tensor:
    """Betas in equal steps between two ends, by default 1e-4 and 0.02 (Ho et al. 2020, section 4). float64 [T]."""
    scale = 1000 / timesteps
    return torch.linspace(scale * beta_start, scale * beta_end, timesteps, dtype=torch.float64)


def quadratic(timesteps: int, beta_start: float = _BETA_START, beta_end: float = _BETA_END) -> Tensor:
    """Betas whose square roots are linear ("scaled linear"; Ho et al. 2020, section 4). float64 [T]."""
    scale = 1000 / timesteps
    ends = math.sqrt(scale * beta_start), math.sqrt(scale * beta_end)
    return torch.linspace(*ends, timesteps, dtype=torch.float64) ** 2


def constant(timesteps: int, beta_start: float = _BETA_START, beta_end: float = _BETA_END) -> Tensor:
    """The same beta for all steps, chosen so that alpha_bar_T is about that of `linear` with 1000 steps. float64 [T]."""
    beta = -math.expm1(-1000 * (beta_start + beta_end) / 2 / timesteps)
    return torch.full((timesteps,), beta, dtype=torch.float64)


def cosine(timesteps: int, offset: float = 0.008) -> Tensor:
    """alpha_bar falls as a squared cosine (Nichol & Dhariwal 2021, equation 17, s = `offset`). Betas, float64 [T]."""
    u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    return _from_alpha_bar(torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2)


def sigmoid(timesteps: int, temperature: float = 1.0) -> Tensor:
    """alpha_bar falls as a sigmoid from -3 to 3 (Jabri et al. 2022; Chen 2023, section 2). Betas, float64 [T]."""
    level = torch.sigmoid(torch.linspace(-3, 3, timesteps + 1, dtype=torch.float64) / temperature)
    return _from_alpha_bar((level[-1] - level) / (level[-1] - level[0]))


def log_snr(timesteps: int, first: float = 10.0, last: float = -10.0) -> Tensor:
    """log(alpha_bar / (1 - alpha_bar)) falls linearly between two ends (Kingma et al. 2021, section 3.1).

    With `first` = 10 the standard deviation of the first step's noise is 0.86 grey levels of 8 bits; with the
    published 13.3 it is 0.16. Betas, float64 [T].
    """
    alpha_bar = torch.sigmoid(torch.linspace(first, last, timesteps, dtype=torch.float64))
    return _from_alpha_bar(torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar]))


def _from_alpha_bar(alpha_bar: Tensor) -> Tensor:
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "linear": linear,
    "quadratic": quadratic,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "constant": constant,
    "log_snr": log_snr,
}


def make_betas(config: DiffusionConfig) -> Tensor:
    """The betas of `config`, checked. Those of a named schedule are limited to 0.999.

    Returns:
        float64, shape [T], on the CPU, each in (0, 1).

    Raises:
        InputError: the schedule is unknown, a setting is out of range, or no chain can use the betas.
    """
    check_ranges(dataclasses.replace(config, betas=()))  # `_checked` checks the betas and names the bad one
    if config.schedule == _EXPLICIT:
        if len(config.betas) != config.timesteps:
            raise InputError(
                f"betas: {len(config.betas)} given for {config.timesteps} timesteps; give one for each"
            )
        return _checked(torch.tensor(config.betas, dtype=torch.float64))
    if config.betas:
        raise InputError(
            f"betas: given together with the schedule {config.schedule!r}; leave one of the two out"
        )
    if config.schedule not in SCHEDULES:
        raise InputError(_unknown(config.schedule))
    named = SCHEDULES[config.schedule]
    return _checked(named(config.timesteps, *_parameters(config)).clamp(max=_MAX_BETA))


def resolve(config: DiffusionConfig) -> DiffusionConfig:
    """`config` with its betas read from a file, if its schedule is the path of a file.

    The file is text: a JSON list, or numbers separated by commas, spaces or line ends. The result has the schedule
    "explicit" and as many timesteps as betas. A named schedule is returned unchanged.

    Raises:
        InputError: there is no such schedule or file, or the file is not a list of betas in (0, 1).
    """
    if config.schedule in SCHEDULES or config.schedule == _EXPLICIT:
        return config
    try:
        text = Path(config.schedule).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise InputError(_unknown(config.schedule)) from None
    except (OSError, ValueError) as error:
        raise InputError(f"schedule {config.schedule!r}: can't be read: {error}") from None
    try:
        values = json.loads(text) if text.startswith(("[", "{")) else text.replace(",", " ").split()
        if not isinstance(values, list):
            raise TypeError
        betas = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise InputError(
            f"schedule {config.schedule!r}: expected a list of numbers, one for each step"
        ) from None
    resolved = dataclasses.replace(config, schedule=_EXPLICIT, betas=betas, timesteps=len(betas))
    try:
        make_betas(resolved)
    except InputError as error:
        raise InputError(f"schedule {config.schedule!r}: {error}") from None
    return resolved


def _parameters(config: DiffusionConfig) -> tuple[float, ...]:
    """The parameters of the named schedule other than T."""
    if config.schedule == "cosine":
        return (config.cosine_offset,)
    if config.schedule == "sigmoid":
        return (config.sigmoid_temperature,)
    if config.schedule == "log_snr":
        if config.log_snr_first <= config.log_snr_last:
            raise InputError(
                f"--log-snr-first {config.log_snr_first:g}: expected more than --log-snr-last {config.log_snr_last:g}, "
                "since noise grows"
            )
        return config.log_snr_first, config.log_snr_last
    return config.beta_start, config.beta_end


def _checked(betas: Tensor) -> Tensor:
    bad = ~((betas > 0) & (betas < 1))  # true for NaN too
    if bad.any():
        step = int(bad.nonzero()[0])
        raise InputError(f"betas: number {step + 1} is {betas[step].item():g}; each must lie between 0 and 1")
    alpha_bar = torch.cumprod(1 - betas, 0)
    if alpha_bar[-1] < torch.finfo(torch.float32).tiny:
        raise InputError("betas: too large, the chain's signal underflows; use smaller or fewer betas")
    if alpha_bar[0] == 1:
        raise InputError(
            f"betas: number 1 is {betas[0].item():g}, so small that the first step adds no noise"
        )
    return betas


def _unknown(schedule: str) -> str:
    near = difflib.get_close_matches(schedule, SCHEDULES, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"schedule {schedule!r}: neither a file nor one of {', '.join(SCHEDULES)}{hint}"
