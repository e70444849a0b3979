"""Measures microseconds per image on one core: this project's decoder, and usual code with Pillow.

    python -m benchmarks.decode [--smoke]

The figures are CPU time, the least of several rounds in which the two take turns.
"""

import io
import json
import sys
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from pipeline.data.images import decode

KINDS = (("JPEG", 32), ("JPEG", 64), ("JPEG", 256), ("PNG", 32), ("PNG", 64), ("PNG", 256))


def files(kind: str, size: int, count: int) -> list[bytes]:
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        pixels = rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        options = {"quality": 90} if kind == "JPEG" else {}
        Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(buffer, kind, **options)
        found.append(buffer.getvalue())
    return found


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def microseconds(work: Callable[[bytes], np.ndarray], images: list[bytes]) -> float:
    began = time.process_time()
    for data in images:
        work(data)
    return (time.process_time() - began) / len(images) * 1e6


def main(smoke: bool) -> None:
    """Prints one JSON line."""
    result = {}
    for kind, size in KINDS:
        images = files(kind, size, 10 if smoke else 200)
        rounds = [
            (
                microseconds(lambda data, size=size: decode(data, size, 3), images),
                microseconds(pillow, images),
            )
            for _ in range(2 if smoke else 20)
        ]
        ours, theirs = (min(times) for times in zip(*rounds, strict=True))
        result[f"{kind} {size}x{size}"] = {"ours": round(ours, 1), "pillow": round(theirs, 1)}
    print(json.dumps({"microseconds": result}))


if __name__ == "__main__":
    main("--smoke" in sys.argv)
