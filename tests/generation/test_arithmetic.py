"""All samples of a dataset are computed by one kind of machine, unless the user allows others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import load_model
from pipeline.errors import InputError
from pipeline.generation.arithmetic import arithmetic
from pipeline.models.sampling import sample_floats
from tests.generation.common import config, digests, make, manifest


def test_it_names_what_decides_how_numbers_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    mine = arithmetic(cpu, bf16=False)
    assert mine.endswith(f"torch {torch.__version__}, fp32")
    assert mine.replace("fp32", "bf16") == arithmetic(cpu, bf16=True) != mine
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert arithmetic(cpu, bf16=False) != mine


@pytest.mark.slow
def test_fewer_instructions_really_are_another_arithmetic(model: Path, tmp_path: Path) -> None:
    """A CPU without AVX gives other numbers. If this fails, machines agree and the check can be removed."""
    program = (
        "import sys, torch; from pipeline import load_model; from pipeline.models.sampling import sample_floats\n"
        "torch.set_num_threads(1); model, spec = load_model(sys.argv[1])\n"
        "print(sample_floats(model, spec, torch.arange(4), labels=torch.arange(4)).flatten().tolist())"
    )
    limits = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    output = subprocess.run(
        [sys.executable, "-c", program, str(model)], env=os.environ | limits,
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    limited = torch.tensor(json.loads(output))
    torch.set_num_threads(1)
    usual = sample_floats(*load_model(str(model)), torch.arange(4), labels=torch.arange(4)).flatten()
    assert not torch.equal(usual, limited)
    torch.testing.assert_close(usual, limited, atol=0.02, rtol=0)


def test_a_node_of_another_kind_is_refused_unless_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "set"
    make(config(output, count=16), model)
    (begun,) = manifest(output)["arithmetic"]
    before = digests(output)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    for settings in ({"count": 32}, {"count": 16, "verify": True}):
        with pytest.raises(
            InputError, match=r"computed with .*this node computes with .*AVX2.*--mixed-arithmetic"
        ):
            make(config(output, **settings), model)
    assert digests(output) == before

    make(config(output, count=32, mixed_arithmetic=True), model)
    assert len(manifest(output)["arithmetic"]) == 2
    assert begun in manifest(output)["arithmetic"]
    assert digests(output).items() > before.items()
    with pytest.raises(InputError, match="--mixed-arithmetic"):
        make(config(output, count=40), model)


def test_an_output_without_samples_belongs_to_no_arithmetic(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        make(config(output, count=16), model)
    for record in (output / "notes").iterdir():
        record.unlink()
    for file in (output / "data").iterdir():
        file.unlink()
    (output / "manifest.json").unlink()
    make(config(output, count=16), model)
    assert "AVX2" not in manifest(output)["arithmetic"][0]
