"""Draws t in training, uniformly or by the losses (Nichol & Dhariwal 2021, section 3.3).

The state is a plain dict of CPU tensors, so that a checkpoint can hold it. It changes only in `update`, as a function
of the arguments. So workers that pass the same gathered losses in the same order keep equal states.
"""

import torch
from torch import Tensor

from pipeline.config import TimestepSampler

State = dict[str, Tensor]

_HISTORY = 10
_UNIFORM_PART = 0.001


def init_state(kind: TimestepSampler, timesteps: int) -> State:
    """The state before the first step. Both kinds begin uniform.

    Returns:
        "probability", float64 [T]. For loss_second_moment also "history", float64 [T, 10], the latest losses at each
        t, and "count", int64 [T], the number of losses so far.
    """
    state = {"probability": torch.full((timesteps,), 1 / timesteps, dtype=torch.float64)}
    if kind == "loss_second_moment":
        state["history"] = torch.zeros(timesteps, _HISTORY, dtype=torch.float64)
        state["count"] = torch.zeros(timesteps, dtype=torch.int64)
    return state


def table(state: State, device: torch.device) -> Tensor:
    """The table that `look_up` uses: cumulative distribution and weights, float64 [2, T], on `device`."""
    probability = state["probability"]
    # The sum is computed on the CPU, so that every device draws the same timesteps.
    cumulative = probability.cumsum(0)
    return torch.stack([cumulative / cumulative[-1], 1 / (len(probability) * probability)]).to(device)


def draw(state: State, u: Tensor) -> tuple[Tensor, Tensor]:
    """Timesteps and weights for a state; see `look_up`."""
    return look_up(table(state, u.device), u)


def look_up(table: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draws timesteps by inverting the cumulative distribution.

    Args:
        table: result of `table`.
        u: uniform numbers in (0, 1), float64, shape [N].

    Returns:
        t, int64 [N], and weight = 1 / (T p_t), float64 [N], both on the device of `u`. The mean of weight * loss is
        an unbiased estimate of the mean loss over uniform t.
    """
    cumulative, weights = table
    t = torch.searchsorted(cumulative, u, right=True).clamp(max=len(weights) - 1)
    return t, weights[t]


def update(state: State, t: Tensor, losses: Tensor) -> State:
    """The state after a step's losses: p_t is proportional to sqrt(E[L_t^2]) over the latest ten losses.

    The distribution stays uniform until every t has ten losses. Then 0.1 % of it stays uniform, so that no weight
    grows without bound. A uniform state is returned unchanged, and losses that are not finite are ignored.

    Args:
        t: timesteps of all workers in a fixed order, int64 [N].
        losses: unweighted loss of each sample, [N], in the same order.
    """
    if "history" not in state:
        return state
    history, count = state["history"].clone(), state["count"].clone()
    finite = losses.isfinite()
    rows, counts = history.numpy(), count.numpy()  # views: element writes are far cheaper than in torch
    for step, loss in zip(t[finite].tolist(), losses[finite].tolist(), strict=True):
        rows[step, counts[step] % _HISTORY] = loss
        counts[step] += 1
    probability = state["probability"]
    moment = history.square().mean(1).sqrt()
    if (count >= _HISTORY).all() and moment.sum() > 0:
        probability = (1 - _UNIFORM_PART) * moment / moment.sum() + _UNIFORM_PART / len(moment)
    return {"probability": probability, "history": history, "count": count}
