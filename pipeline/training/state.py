"""All that changes while training. Plain torch, no Ray."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import ModelSpec, TrainConfig
from pipeline.diffusion import timesteps
from pipeline.models import ema
from pipeline.models.unet import UNet, build


class AdamW(torch.optim.AdamW):
    """torch's, without its guards against being compiled, which import torch._dynamo: two seconds at every start."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


@dataclass
class TrainState:
    """All that changes while training; a checkpoint holds it.

    Attributes:
        ema: averages of the weights, one for each entry of `ema_decays` and then of `ema_lengths`.
        timestep_sampler: state of the timestep sampler, the same on every worker.
        step: optimizer steps done.
    """

    model: UNet
    optimizer: AdamW
    ema: ema.Averages
    timestep_sampler: timesteps.State
    step: int = 0
    _table: tuple[timesteps.State, Tensor] | None = None

    @property
    def averages(self) -> list[list[Tensor]]:
        """The averaged parameters, one list per average."""
        return self.ema.tensors

    def timestep_table(self, device: torch.device) -> Tensor:
        """The timestep sampler's table (see `timesteps.table`), on the device.

        It is copied only after the sampler has changed, because a GPU waits for a copy.
        """
        if self._table is None or self._table[0] is not self.timestep_sampler:
            self._table = self.timestep_sampler, timesteps.table(self.timestep_sampler, device)
        return self._table[1]


def new_state(config: TrainConfig, spec: ModelSpec, device: torch.device) -> TrainState:
    """Untrained weights, the same for the same seed on every worker."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build(spec)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    options = config.optimizer
    optimizer = AdamW(
        model.parameters(),
        lr=options.learning_rate,
        betas=options.adam_betas,
        weight_decay=options.weight_decay,
        fused=True,
    )
    count = len(options.ema_decays) + len(options.ema_lengths)
    sampler = timesteps.init_state(spec.diffusion.timestep_sampler, spec.diffusion.timesteps)
    apart = options.ema_device == "cpu" and device.type != "cpu"
    return TrainState(model, optimizer, ema.Averages(list(model.parameters()), count, apart), sampler)
