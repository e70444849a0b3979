"""Arithmetic: bf16 is chosen only where hardware multiplies it, and trains and resumes as fp32 does."""

import dataclasses

import pytest
import torch

from pipeline.training import checkpoint
from pipeline.training.loop import new_state, uses_bf16
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
    config, _ = problem()
    assert uses_bf16(config, CPU) is expected
    assert uses_bf16(dataclasses.replace(config, precision="bf16"), CPU)
    assert not uses_bf16(dataclasses.replace(config, precision="fp32"), CPU)


def test_bf16_follows_fp32_and_keeps_weights_in_fp32() -> None:
    single, exact = run(*problem(precision="fp32"))
    half, rough = run(*problem(precision="bf16"))
    assert rough == pytest.approx(exact, rel=0.02)
    assert rough != exact
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    moved = (flat(single) - flat(new_state(*problem(), CPU))).norm()
    assert (flat(half) - flat(single)).norm() < 0.2 * moved


def test_a_resume_in_bf16_is_bitwise_the_uninterrupted_run() -> None:
    config, spec = problem(precision="bf16")
    straight, _ = run(config, spec)
    half, _ = run(dataclasses.replace(config, steps=10), spec)
    resumed = new_state(config, spec, CPU)
    checkpoint.restore(resumed, checkpoint.capture(half))
    resumed, _ = run(config, spec, resumed)
    assert torch.equal(flat(straight), flat(resumed))
