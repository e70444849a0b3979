"""The training loop takes the same trajectory for any number of workers, any microbatch, and after a resume."""

import dataclasses
import subprocess
import sys
from collections.abc import Container
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config import OptimizerConfig
from pipeline.data.batch import Batch
from pipeline.errors import InputError
from pipeline.models import ema
from pipeline.training import checkpoint, loop
from pipeline.training.identity import _fixed
from pipeline.training.loop import NonFinite, train
from pipeline.training.meter import Meter, samples_digest
from pipeline.training.network import wrap
from pipeline.training.state import AdamW, TrainState, new_state
from tests.training.common import batches, free_port, problem, start_ranks
from tests.training.digit_runs import assert_same

CPU = torch.device("cpu")


class Recorder(loop.Observer):
    """Keeps the figures and skipped steps, and ends the run before step `stop`."""

    def __init__(self, stop: int = -1) -> None:
        self.figures: dict[int, dict[str, float]] = {}
        self.skipped_steps: list[int] = []
        self._left = stop

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.figures[step] = metrics

    def should_stop(self) -> bool:
        self._left -= 1
        return self._left == -1

    def skipped(self, error: NonFinite) -> None:
        self.skipped_steps.append(error.step)


def run(config, spec, state=None, rank: int = 0, world_size: int = 1, meter=None, device=CPU):  # type: ignore[no-untyped-def]
    """Train to the end, with the model wrapped as for `device`. Return the state and the logged losses by step."""
    state = state or new_state(config, spec, CPU)
    model = wrap(config, state.model, world_size, device)
    stream = batches(config, rank, world_size, state.step)
    observer = Recorder()
    train(config, spec, state, model, stream, meter or Meter(config, world_size, CPU), observer)
    return state, {step: figures["loss"] for step, figures in observer.figures.items()}


def flat(state: TrainState) -> Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


def _one_rank(
    rank: int, world_size: int, port: int, folder: str, changes: dict[str, object], start: str, device: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    config, spec = problem(**changes)
    state, meter = new_state(config, spec, CPU), Meter(config, world_size, CPU)
    if start:
        saved, kept = checkpoint.read(start)
        checkpoint.restore(state, saved)
        meter.restore(kept, rank)
    state, losses = run(config, spec, state, rank, world_size, meter, torch.device(device))
    seen = meter.state()["seen"]
    if rank == 0:
        torch.save(
            {"weights": flat(state), "losses": losses, "sampler": state.timestep_sampler, "seen": seen},
            f"{folder}/{world_size}.pt",
        )
    dist.barrier()  # if one process leaves the group, gloo aborts the others
    dist.destroy_process_group()


def several_workers(  # type: ignore[no-untyped-def]
    world_size: int, folder: Path, changes: dict[str, object], start: str = "", device: str = "cpu"
):
    """Run `world_size` processes and return what rank 0 saved at the end."""
    arguments = (world_size, free_port(), str(folder), changes, start, device)
    start_ranks(_one_rank, arguments, world_size)
    return torch.load(folder / f"{world_size}.pt", weights_only=True)


SAMPLER: dict[str, object] = {"timestep_sampler": "loss_second_moment"}


def epochs_digest(epochs: int, rows: int = 37) -> str:
    """Return the digest of every sample once in each epoch."""
    ids = np.tile(np.arange(rows), epochs)
    return f"{samples_digest(np.repeat(np.arange(epochs), rows), ids):016x}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "microbatch", "device"), [(2, 2, "cpu"), (4, 0, "cpu"), (3, 2, "cuda")]
)
def test_the_steps_of_several_workers_are_those_of_one(
    world_size: int, microbatch: int, device: str, tmp_path: Path
) -> None:
    # With so few timesteps the sampler leaves its uniform start early, which the end of this test checks.
    diffusion: dict[str, object] = {**SAMPLER, "timesteps": 5}
    changes: dict[str, object] = {"microbatch": microbatch, "diffusion": diffusion}
    several = several_workers(world_size, tmp_path, changes, device=device)
    config, spec = problem(diffusion=diffusion)
    meter = Meter(config, 1, CPU)
    one, losses = run(config, spec, meter=meter)
    assert (several["weights"] - flat(one)).norm() < 1e-4 * flat(one).norm()
    assert several["losses"] == pytest.approx(losses, rel=1e-4)
    assert torch.equal(several["sampler"]["count"], one.timestep_sampler["count"])
    assert one.timestep_sampler["probability"].unique().numel() > 1
    assert several["seen"] == meter.state()["seen"]


@pytest.mark.slow
def test_another_number_of_workers_goes_on_with_the_same_run(tmp_path: Path) -> None:
    # 37 steps of 10 rows are ten whole epochs of 37 rows. Step 18 lies inside a logging interval.
    config, spec = problem(steps=37)
    straight, losses = run(config, spec)
    meter, half = Meter(config, 1, CPU), new_state(config, spec, CPU)
    train(config, spec, half, half.model, batches(config), meter, Recorder(stop=18))
    checkpoint.write(str(tmp_path / "c"), checkpoint.capture(half), meter.state())
    several = several_workers(2, tmp_path, {"steps": 37}, str(tmp_path / "c"))
    assert (several["weights"] - flat(straight)).norm() < 1e-4 * flat(straight).norm()
    assert several["losses"] == pytest.approx({s: v for s, v in losses.items() if s > 18}, rel=1e-4)
    assert several["seen"] == {"samples": 370, "digest": epochs_digest(10), "undecodable": 0}


def test_microbatches_accumulate_to_the_same_step() -> None:
    whole, _ = run(*problem(steps=10))
    pieces, _ = run(*problem(steps=10, microbatch=3))
    assert (flat(whole) - flat(pieces)).norm() < 1e-4 * flat(whole).norm()


@pytest.mark.parametrize("sampler", ["uniform", "loss_second_moment"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(sampler: str, tmp_path: Path) -> None:
    config, spec = problem(diffusion={"timestep_sampler": sampler})
    straight, losses = run(config, spec)
    half, _ = run(dataclasses.replace(config, steps=10), spec)
    checkpoint.write(str(tmp_path), checkpoint.capture(half), {})
    torch.randn(100)  # the global generator differs after a restart, and nothing may depend on it
    resumed = new_state(config, spec, CPU)
    checkpoint.restore(resumed, checkpoint.read(str(tmp_path))[0])
    resumed, tail = run(config, spec, resumed)
    assert torch.equal(flat(straight), flat(resumed))
    assert all(
        torch.equal(a, b)
        for x, y in zip(straight.averages, resumed.averages, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert tail == {step: loss for step, loss in losses.items() if step > 10}


def test_training_lowers_the_loss() -> None:
    _, losses = run(*problem(steps=60))
    assert losses[60] < 0.8 * losses[5]


class _Poisoned:
    """A stream in which the batches numbered `bad`, counted from 1, give a loss that isn't finite."""

    def __init__(self, config, bad: Container[int] = (3,), **part: int) -> None:  # type: ignore[no-untyped-def]
        self._batches, self._bad, self._count = batches(config, **part), bad, part.get("start", 0)

    def __next__(self) -> Batch:
        batch, self._count = next(self._batches), self._count + 1
        return (
            dataclasses.replace(batch, weights=batch.weights * float("nan"))
            if self._count in self._bad
            else batch
        )

    def __iter__(self) -> "_Poisoned":
        return self


def test_a_non_finite_step_is_named_and_leaves_everything_as_it_was() -> None:
    config, spec = problem(diffusion=dict(SAMPLER))
    state = new_state(config, spec, CPU)
    with pytest.raises(NonFinite, match=r"step 3: .*samples \d+") as caught:
        train(config, spec, state, state.model, _Poisoned(config), Meter(config, 1, CPU), loop.Observer())
    before, _ = run(dataclasses.replace(config, steps=2), spec)
    assert torch.equal(flat(state), flat(before))
    assert all(
        torch.equal(state.timestep_sampler[name], before.timestep_sampler[name])
        for name in before.timestep_sampler
    )
    *_, third = (batch for batch, _ in zip(batches(config), range(3), strict=False))
    assert [sample["id"] for sample in caught.value.samples] == sorted(third.ids.tolist())


def test_a_non_finite_step_is_skipped_on_request() -> None:
    config, spec = problem(skip_nonfinite=True, diffusion=dict(SAMPLER))
    state, observer = new_state(config, spec, CPU), Recorder()
    train(config, spec, state, state.model, _Poisoned(config), Meter(config, 1, CPU), observer)
    assert (state.step, observer.skipped_steps) == (config.steps, [3])
    assert bool(flat(state).isfinite().all())
    assert observer.figures[5]["skipped_steps"] == 1
    assert np.isfinite(observer.figures[5]["loss"])


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_dropout_has_masks_for_any_seed(seed: int) -> None:
    config, spec = problem(steps=1, seed=seed)
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, dropout=0.5))
    first, again = (flat(run(config, spec)[0]) for _ in range(2))
    assert torch.equal(first, again)
    assert bool(first.isfinite().all())


def test_a_run_that_only_skips_ends_whatever_comes_between(tmp_path: Path) -> None:
    """Five skipped steps in a row end the run, the last three after a resume. Four and then a good one don't."""
    config, spec = problem(skip_nonfinite=True, max_skipped_in_a_row=5)
    bad = [1, 2, 3, 4, *range(8, 99)]
    half, meter = new_state(config, spec, CPU), Meter(config, 1, CPU)
    train(config, spec, half, half.model, _Poisoned(config, bad), meter, Recorder(stop=9))
    before = flat(half)
    checkpoint.write(str(tmp_path), checkpoint.capture(half), meter.state())
    saved, kept = checkpoint.read(str(tmp_path))
    state, meter = new_state(config, spec, CPU), Meter(config, 1, CPU)
    checkpoint.restore(state, saved)
    meter.restore(kept, 0)
    stream = _Poisoned(config, bad, start=9)
    with pytest.raises(
        InputError, match=r"^step 12: .*5 steps in a row.*--max-skipped-in-a-row.*--learning-rate"
    ):
        train(config, spec, state, state.model, stream, meter, loop.Observer())
    assert torch.equal(flat(state), before)


def _skip_all(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    config, spec = problem(skip_nonfinite=True, max_skipped_in_a_row=3)
    state, bad = (
        new_state(config, spec, CPU),
        range(5, 99) if rank == 0 else (),
    )  # bad images on one worker suffice
    stream = _Poisoned(config, bad, rank=rank, world_size=2)
    with pytest.raises(InputError, match=r"^step 7: .*3 steps in a row"):
        train(
            config, spec, state, wrap(config, state.model, 2, CPU), stream, Meter(config, 2, CPU), Recorder()
        )
    dist.barrier()
    (Path(folder) / str(rank)).touch()
    dist.destroy_process_group()


def test_all_workers_end_a_run_that_only_skips_at_the_same_step(tmp_path: Path) -> None:
    start_ranks(_skip_all, (free_port(), str(tmp_path)), 2)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_averages_in_main_memory_are_those_beside_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Averages are copied one step late, as on a GPU. Checkpoints in mid-run agree too."""
    averages = OptimizerConfig(ema_decays=(0.9, 0.99), ema_lengths=(0.1,), warmup_steps=5)
    config, spec = problem()
    config = dataclasses.replace(config, optimizer=averages)

    def ends(apart: bool) -> list[checkpoint.Saved]:
        state, saved = new_state(config, spec, CPU), list[checkpoint.Saved]()
        state.ema = ema.Averages(list(state.model.parameters()), 3, apart)

        class Keep(Recorder):
            def save(self) -> None:
                saved.append(checkpoint.capture(state))

        every = dataclasses.replace(config, checkpoint_every=7)
        train(every, spec, state, state.model, batches(config), Meter(config, 1, CPU), Keep())
        return saved

    beside, apart = ends(False), ends(True)
    assert [saved.step for saved in apart] == [7, 14, 20]
    for one, other in zip(beside, apart, strict=True):
        assert_same(one, other)


def test_where_averages_are_kept_is_no_part_of_what_a_resume_compares() -> None:
    config, spec = problem()
    index = SimpleNamespace(fingerprint="f", plan=lambda seed, batch_size: SimpleNamespace(lanes=1))
    moved = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema_device="cpu"))
    assert _fixed(config, spec, index) == _fixed(moved, spec, index)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_worker_by_itself_does_without_what_compiles(digits: Path) -> None:
    """Importing torch._dynamo takes two seconds at every start; AdamW's own methods would do it."""
    program = f"""
import sys
from tests.training.runs import undisturbed
from pipeline.config import ModelConfig, TrainConfig
model = ModelConfig(model_channels=32, channel_multipliers=(1,), res_blocks=1, attention_resolutions=(8,))
undisturbed(TrainConfig({str(digits)!r}, "o", steps=2, batch_size=8, model=model, checkpoint_every=1))
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_optimizer_makes_the_steps_of_torchs() -> None:
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    options = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1, "fused": True}
    pairs = [(ours, AdamW([ours], **options)), (theirs, torch.optim.AdamW([theirs], **options))]
    for _ in range(3):
        for parameter, optimizer in pairs:
            (parameter**3).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert parameter.grad is None and parameter.requires_grad
    assert torch.equal(ours, theirs)
