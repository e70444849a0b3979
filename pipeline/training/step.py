"""One optimizer step. Plain torch, no Ray.

Timesteps, noise, label drops and flips come from counters of (seed, epoch, sample id), not from a generator's hidden
state. So they do not depend on the rank, on the number of workers or on earlier work of the process.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import ModelSpec, TrainConfig
from pipeline.data.batch import Batch
from pipeline.diffusion import timesteps
from pipeline.diffusion.losses import training_loss
from pipeline.diffusion.process import Process, make_process
from pipeline.gpu.graph import Graphed
from pipeline.models import ema
from pipeline.models.sampling import from_pixels
from pipeline.rng import Purpose, generator_seed, normal, uniforms
from pipeline.training.network import uses_bf16
from pipeline.training.state import TrainState


@dataclass(frozen=True)
class Prepared:
    """A batch on the device, with all its random numbers drawn.

    Attributes:
        x_0: images in [-1, 1], float32 [N, C, H, W], channels_last.
        t: timesteps from 0, int64 [N].
        noise: standard normal, float32 [N, C, H, W].
        labels: classes, int64 [N], with the number of classes for "no class"; None for an unconditional model.
        weights: weight of each sample's loss, float32 [N].
    """

    x_0: Tensor
    t: Tensor
    noise: Tensor
    labels: Tensor | None
    weights: Tensor


@dataclass(frozen=True)
class Outcome:
    """The result of a step, on the device. Nothing has waited for it yet.

    Attributes:
        step: number of the step, counted from 1.
        batch: this worker's part of the batch.
        loss: this worker's part of the global mean loss; 0 if the step was skipped.
        norm: global gradient norm before clipping; 0 if the step was skipped.
        finite: bool; False if the step was skipped. Equal on all workers.
        t: timestep of each local sample, int64 [N].
        losses: loss of each local sample, [N].
    """

    step: int
    batch: Batch
    loss: Tensor
    norm: Tensor
    finite: Tensor
    t: Tensor
    losses: Tensor


def prepare(
    config: TrainConfig, spec: ModelSpec, table: Tensor, batch: Batch, device: torch.device
) -> Prepared:
    """Draws timesteps, noise, label drops and flips from each sample's own counters.

    Args:
        table: table of the timestep sampler (see `timesteps.table`), on the device.
        batch: images as uint8 [N, C, H, W].
    """
    ids, epochs = (values.to(device, non_blocking=True) for values in (batch.ids, batch.epochs))
    u = uniforms(config.seed, epochs, ids, (Purpose.TIMESTEP, Purpose.FLIP, Purpose.LABEL_DROP))
    x_0 = from_pixels(batch.images.to(device, non_blocking=True))
    if config.random_flip:
        x_0 = torch.where((u[Purpose.FLIP] < 0.5)[:, None, None, None], x_0.flip(-1), x_0)
    t, weight = timesteps.look_up(table, u[Purpose.TIMESTEP])
    labels = None
    if spec.model.class_conditional:
        null = len(spec.image.classes)
        labels = batch.labels.to(device, non_blocking=True)
        hidden = (u[Purpose.LABEL_DROP] < config.label_dropout) | (labels < 0)
        labels = torch.where(hidden, null, labels)
    return Prepared(
        x_0=x_0.contiguous(memory_format=torch.channels_last),
        t=t,
        noise=normal(config.seed, epochs, ids, Purpose.NOISE, tuple(x_0.shape[1:])),
        labels=labels,
        weights=weight.float() * batch.weights.to(device, non_blocking=True),
    )


def backward(
    config: TrainConfig,
    spec: ModelSpec,
    process: Process,
    model: nn.Module,
    data: Prepared,
    averaged: int = 1,
) -> Tensor:
    """Accumulates the samples' part of the gradient of the global batch's mean loss.

    Args:
        averaged: number of workers over which `model` averages its gradients, as DDP does.

    Returns:
        the loss of each local sample, [N].
    """
    size, device = len(data.t), data.x_0.device
    bf16 = uses_bf16(config, device)
    pieces = torch.arange(size).split(config.microbatch or max(size, 1))
    losses = []
    for i, piece in enumerate(pieces):
        last = i == len(pieces) - 1
        quiet = isinstance(model, DistributedDataParallel) and not last
        context: AbstractContextManager[None] = model.no_sync() if quiet else nullcontext()  # type: ignore[operator]
        part = slice(int(piece[0]), int(piece[-1]) + 1)
        labels = None if data.labels is None else data.labels[part]
        with context:
            with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                loss = training_loss(
                    process, spec.diffusion, model, data.x_0[part], data.t[part], data.noise[part], labels
                )
            # The global batch size divides the sum, so uneven parts get their proper weight. DDP averages over the
            # workers, so their number turns its mean into a sum.
            ((loss * data.weights[part]).sum() * (averaged / config.batch_size)).backward()
        losses.append(loss.detach())
    return torch.cat(losses)


def make_backward(
    config: TrainConfig, spec: ModelSpec, model: nn.Module, device: torch.device, world_size: int = 1
) -> Callable[[Prepared], Tensor]:
    """Makes the function that computes a step's gradients over all workers.

    On a GPU it replays `backward` as a CUDA graph and then sums the workers' gradients.

    Args:
        model: the model in the form that a step calls; see `network.wrap`.

    Returns:
        a function that sets the gradients and returns the loss of each local sample, [N].
    """
    process, parameters = make_process(spec.diffusion).to(device), list(model.parameters())
    averaged = world_size if isinstance(model, DistributedDataParallel) else 1

    def run(x_0: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None, weights: Tensor) -> Tensor:
        return backward(config, spec, process, model, Prepared(x_0, t, noise, labels, weights), averaged)

    # Dropout draws from torch's generator, which every step seeds again. A graph would replay a single draw.
    graphed = device.type == "cuda" and not spec.model.dropout
    compute = Graphed(run, parameters) if graphed else run

    def compute_all(data: Prepared) -> Tensor:
        losses = compute(data.x_0, data.t, data.noise, data.labels, data.weights)
        if averaged < world_size:
            _add_up(parameters)
        return losses

    return compute_all


def _add_up(parameters: list[nn.Parameter]) -> None:
    """Replaces every gradient by its sum over the workers, in one message."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [_channels_last(cast(Tensor, parameter.grad)) for parameter in trained]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for parameter, gradient, part in zip(trained, gradients, parts, strict=True):
        summed = part.view(gradient.shape)
        parameter.grad = summed.movedim(-1, 1) if summed.dim() == 4 else summed


def _channels_last(gradient: Tensor) -> Tensor:
    """Views a kernel's gradient in the order of its memory, which is channels_last."""
    return gradient.movedim(1, -1) if gradient.dim() == 4 else gradient


def train_step(
    config: TrainConfig,
    spec: ModelSpec,
    state: TrainState,
    run_backward: Callable[[Prepared], Tensor],
    batch: Batch,
    device: torch.device,
    world_size: int = 1,
) -> Outcome:
    """Makes one optimizer step in place. If its gradient is not finite, weights and optimizer stay unchanged.

    On a GPU nothing waits for the result, unless the timestep sampler learns from the losses.

    Args:
        run_backward: result of `make_backward`.
        batch: this worker's part of the global batch.
    """
    options = config.optimizer
    if spec.model.dropout:
        # torch's dropout draws only from the global generator, so the step and the rank seed it.
        rank = dist.get_rank() if world_size > 1 else 0
        torch.manual_seed(generator_seed(config.seed, 0, state.step << 32 | rank, Purpose.DROPOUT))
    data = prepare(config, spec, state.timestep_table(device), batch, device)
    losses = run_backward(data)
    limit = options.clip_norm or math.inf
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), limit)
    # Every worker has the same summed gradient, so all decide the same.
    finite = norm.isfinite()
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    # A fused optimizer skips its step if found_inf is 1. torch's GradScaler uses the same attribute.
    state.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update_(decays(config, state.step + 1))
    if spec.diffusion.timestep_sampler != "uniform" and bool(finite):
        _, _, t, all_losses = gather_by_id(batch.ids, batch.epochs, data.t, losses, world_size)
        state.timestep_sampler = timesteps.update(state.timestep_sampler, t, all_losses)
    state.step += 1
    loss = (losses * data.weights).sum() / config.batch_size
    return Outcome(
        state.step,
        batch,
        torch.where(finite, loss, 0.0),
        torch.where(finite, norm, 0.0),
        finite,
        data.t,
        losses,
    )


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step: a linear warm-up to a constant. `step` counts from 0."""
    options = config.optimizer
    return options.learning_rate * min(1.0, (step + 1) / max(options.warmup_steps, 1))


def decays(config: TrainConfig, step: int) -> list[float]:
    """The decay of each average at optimizer step `step`, counted from 1.

    Power-function averages follow Karras et al. 2024 (EDM2), see `ema.power_decay`.
    """
    options = config.optimizer
    # With a constant decay, an early average would consist mostly of the initial weights. So the decay first rises as
    # (1 + step) / (10 + step).
    standard = [min(decay, (1 + step) / (10 + step)) for decay in options.ema_decays]
    return standard + [ema.power_decay(length, step) for length in options.ema_lengths]


def gather_by_id(
    ids: Tensor, epochs: Tensor, t: Tensor, losses: Tensor, world_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gathers all workers' samples in the order of their ids, equal on all workers. A collective call.

    Args:
        ids: sample ids of this worker, int64 [N].
        epochs: epoch of each sample, int64 [N].
        t: timestep of each sample, int64 [N].
        losses: loss of each sample, [N].

    Returns:
        the same four columns for the global batch, losses as float32.
    """
    columns = (ids.to(losses.device), epochs.to(losses.device), t, losses)
    rows = torch.stack([column.double() for column in columns])
    if world_size > 1:
        size = torch.tensor(rows.shape[1], device=rows.device)
        sizes = [torch.zeros_like(size) for _ in range(world_size)]
        dist.all_gather(sizes, size)
        longest = int(max(int(s) for s in sizes))
        padded = rows.new_zeros(len(rows), longest)
        padded[:, : rows.shape[1]] = rows
        parts = [torch.empty_like(padded) for _ in range(world_size)]
        dist.all_gather(parts, padded)
        rows = torch.cat([p[:, : int(s)] for p, s in zip(parts, sizes, strict=True)], dim=1)
    # On a small dataset, one batch can hold the same sample from two epochs: sort by epoch within an id.
    rows = rows[:, rows[1].argsort(stable=True)]
    rows = rows[:, rows[0].argsort(stable=True)]
    return rows[0].long(), rows[1].long(), rows[2].long(), rows[3].float()
