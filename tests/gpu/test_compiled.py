"""Triton's kernels compiled for a GPU, in a process where they are not interpreted."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipeline.gpu import bias, norm, philox

def compile(kernel, pointers, constants):
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[i,] = "constexpr", constants[name]
        else:
            signature[name] = pointers.get(name, "i32")
            attributes[i,] = [["tt.divisibility", 16]] if name in pointers or name in ("channels", "stride") else []
    source = ASTSource(kernel, signature, values, {k: v for k, v in attributes.items() if v})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

result = []
integers = {"ids": "*i64", "epochs": "*i64", "key_low": "i64", "key_high": "i64"}
compile(philox._words_kernel, integers | {"out": "*i64", "purposes": "*i64"}, {"BLOCK": 256})
compile(philox._normal_kernel, integers | {"out": "*fp32"}, {"BLOCK": 256})
for channels, groups, size in ((128, 32, 32), (384, 32, 16), (192, 16, 8)):
    images = {name: "*bf16" for name in ("x", "y", "dy", "dx", "scale", "shift")}
    floats = {n: "*fp32" for n in ("before", "weight", "bias", "means", "rstds", "of_parameters")} | {"eps": "fp32"}
    x = torch.empty(1, channels, size, size, dtype=torch.bfloat16)
    for kernel, tiling in ((norm._forward_kernel, norm._forward_tile), (norm._backward_kernel, norm._backward_tile)):
        tile = tiling(x, groups)
        tile.pop("num_warps")
        code = compile(kernel, images | floats, tile | {"BEFORE": True, "MODULATED": True, "SILU": True})
        # 16 bytes a load: a warp reads whole lines of memory.
        result.append((channels, "ld.global.v4" in code))
sums = images | {"bias": "*fp32", "residual": "*bf16"}
compile(bias._add_kernel, sums, {"RESIDUAL": True, "BLOCK": 2048})
constants = {"PER_PART": 512, "COLUMNS": bias.COLUMNS, "ROWS": bias.ROWS}
compile(bias._sum_kernel, images | {"sums": "*fp32"}, constants)
print(json.dumps(result))
"""


def test_every_kernel_compiles_and_loads_sixteen_bytes_at_once() -> None:
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, env=compiled
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert len(result) == 6
    assert all(wide for *_, wide in result), result
