"""bf16 is used only if hardware multiplies it. bf16 and compiled models train and resume as fp32 does."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.training import checkpoint
from pipeline.training.network import uses_bf16
from pipeline.training.state import new_state
from tests.training.common import problem
from tests.training.test_loop import CPU, flat, run


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_f": True}, False),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_f": True, "amx_bf16": True}, True),
        ({"architecture": "aarch64", "neon": True}, False),
    ],
)
def test_auto_is_bf16_on_a_cpu_that_multiplies_it(
    capabilities: dict[str, object], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    config, _ = problem(precision="auto")
    assert uses_bf16(config, CPU) is expected
    assert uses_bf16(dataclasses.replace(config, precision="bf16"), CPU)
    assert not uses_bf16(dataclasses.replace(config, precision="fp32"), CPU)


def test_bf16_follows_fp32_and_keeps_weights_in_fp32() -> None:
    single, exact = run(*problem(precision="fp32", steps=10))
    half, rough = run(*problem(precision="bf16", steps=10))
    assert rough == pytest.approx(exact, rel=0.02)
    assert rough != exact
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    moved = (flat(single) - flat(new_state(*problem(), CPU))).norm()
    assert (flat(half) - flat(single)).norm() < 0.2 * moved


def test_a_resume_in_bf16_is_bitwise_the_uninterrupted_run() -> None:
    config, spec = problem(precision="bf16", steps=6)
    straight, _ = run(config, spec)
    half, _ = run(dataclasses.replace(config, steps=3), spec)
    resumed = new_state(config, spec, CPU)
    checkpoint.restore(resumed, checkpoint.capture(half))
    resumed, _ = run(config, spec, resumed)
    assert torch.equal(flat(straight), flat(resumed))


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of compiled programs. torch forgets its own compiled programs before and after."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "programs"))
    torch._dynamo.reset()
    yield tmp_path / "programs"
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_steps_are_the_eager_ones_and_leave_programs_for_the_next_start(compiler: Path) -> None:
    config, spec = problem(steps=3)
    # The smallest possible network, since compilation takes most of the time.
    small = ModelConfig(model_channels=32, channel_multipliers=(1,), res_blocks=1, attention_resolutions=())
    spec = dataclasses.replace(spec, model=small)
    eager, losses = run(dataclasses.replace(config, log_every=1), spec)
    compiled, compiled_losses = run(dataclasses.replace(config, log_every=1, compile=True), spec)
    assert compiled_losses == pytest.approx(losses, rel=1e-4)
    assert (flat(compiled) - flat(eager)).norm() < 1e-4 * flat(eager).norm()
    # Compiling changes no name, so a checkpoint fits both models.
    assert compiled.model.state_dict().keys() == eager.model.state_dict().keys()
    programs = sorted(compiler.rglob("*.so"))
    assert programs
    torch._dynamo.reset()  # as in a restarted worker, which has only the disk
    again, _ = run(dataclasses.replace(config, compile=True), spec)
    assert sorted(compiler.rglob("*.so")) == programs
    assert torch.equal(flat(again), flat(compiled))
