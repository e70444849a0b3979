"""Generated images/s: against the forward passes they need, against diffusers, and from one actor to two.

    python benchmarks/generate.py [--smoke]

32x32x3 images, DDIM, 10 steps, one thread an actor. The job's rate is that between its first file and its last; the
other sides run before and after it in turn, in this process, on one thread.

    of_forward          one actor's images/s over those of bare forward passes: 1 is the limit
    to_diffusers        the same over diffusers' DDIMPipeline with a UNet2DModel of the same structure
    two_actors_to_one   two actors over one
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Before torch and Ray are imported: one thread.
os.environ["OMP_NUM_THREADS"] = "1"

import ray
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from pipeline.cluster import connect
from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec, Precision
from pipeline.generation import pool
from pipeline.generation.config import GenerateConfig
from pipeline.generation.plan import Piece, tasks
from pipeline.generation.sampler import Sampler, Setup
from pipeline.models.diffusers import unet_config
from pipeline.models.export import load_model, pack_model, save_model
from pipeline.models.unet import build

SPEC = ModelSpec(ModelConfig(), ImageConfig(32, 3), DiffusionConfig())


def forward_rate(folder: Path, batch: int, steps: int, batches: int, precision: Precision) -> float:
    """Images/s of nothing but the network's forward passes."""
    model, _ = load_model(folder)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    t = torch.randint(0, 1000, (batch,))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(x, t)
        began = time.perf_counter()
        for _ in range(steps * batches):
            model(x, t)
    return batch * batches / (time.perf_counter() - began)


def diffusers_rate(batch: int, steps: int, batches: int, precision: Precision) -> float:
    """Images/s of diffusers' pipeline, with its fastest way to the precision."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    network = UNet2DModel.from_config(unet_config(SPEC)).to(dtype).eval()
    pipe = DDIMPipeline(network, DDIMScheduler(1000))
    pipe.set_progress_bar_config(disable=True)
    pipe(batch, num_inference_steps=1)
    began = time.perf_counter()
    for _ in range(batches):
        pipe(batch, num_inference_steps=steps, output_type="pil")
    return batch * batches / (time.perf_counter() - began)


def job_rate(folder: Path, batch: int, steps: int, batches: int, precision: Precision, actors: int) -> float:
    """Images/s of the job's actor pool, Parquet files written; its start is left out."""
    with tempfile.TemporaryDirectory() as output:
        config = GenerateConfig(
            "", output, count=(batches + 1) * actors * batch, batch_size=batch, rows_per_file=batch,
            sampler="ddim", sampling_steps=steps, actors=actors, precision=precision,
        )  # fmt: skip
        setup = Setup(pack_model(folder), config, output, "", None)
        rows = [piece._asdict() for piece in tasks([Piece(0, config.count)], batch, pool.MOST_TASKS)]
        done = [time.perf_counter() for _ in pool.run(Sampler, rows, setup)]
    return batch * batches * actors / (done[-1] - done[actors - 1])


def main(smoke: bool) -> None:
    """Prints one JSON line."""
    batch, steps, batches = (2, 2, 2) if smoke else (16, 10, 4)
    torch.set_num_threads(1)
    connect()
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as home:
        folder = save_model(Path(home) / "model", build(SPEC).state_dict(), SPEC)
        # bf16 only where the CPU computes in it: elsewhere it is emulated, and slow.
        bf16 = not smoke and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        precisions: list[Precision] = ["fp32", "bf16"] if bf16 else ["fp32"]
        for precision in precisions:
            sides: dict[str, Callable[[], float]] = {
                "forward": lambda p=precision: forward_rate(folder, batch, steps, batches, p),
                "diffusers": lambda p=precision: diffusers_rate(batch, steps, batches, p),
            }
            rates = {name: [side()] for name, side in sides.items()}
            one, two = (job_rate(folder, batch, steps, batches, precision, actors) for actors in (1, 2))
            for name, side in sides.items():
                rates[name].append(side())
            forward, theirs = (statistics.mean(rates[name]) for name in sides)
            result |= {
                f"images_per_second_{precision}": round(one, 3),
                f"forward_images_per_second_{precision}": round(forward, 3),
                f"diffusers_images_per_second_{precision}": round(theirs, 3),
                f"of_forward_{precision}": round(one / forward, 3),
                f"to_diffusers_{precision}": round(one / theirs, 3),
                f"two_actors_to_one_{precision}": round(two / one, 3),
            }
    ray.shutdown()
    print(json.dumps(result))


if __name__ == "__main__":
    main("--smoke" in sys.argv)
