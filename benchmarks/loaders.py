"""Other libraries' loaders for benchmarks/ingest.py, each used as its documentation says, in a process without Ray.

    PYTHON -m benchmarks.loaders

answers requests, one line of JSON each. Every request gets its own process, forked after the libraries are imported.
Only the loop that measures the decoders imports this project, so another Python environment can run the rest.
"""

import io
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

PROCESSES = 2
BATCH = 128
AHEAD = 4  # batches that each process prefetches
EPOCH = 400_000  # images in an endless epoch, for libraries that need a number
BUFFER = 1024  # rows in the shuffle buffer of `datasets`


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB")))


class Files(Dataset[torch.Tensor]):
    """A folder of image files."""

    def __init__(self, folder: Path, read: Callable[[str], torch.Tensor]) -> None:
        self._files, self._read = sorted(map(str, folder.iterdir())), read

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self._read(self._files[i])


def with_pillow(path: str) -> torch.Tensor:
    with Image.open(path) as image:
        return tensor(image)


def with_simplejpeg(path: str) -> torch.Tensor:
    import simplejpeg

    return torch.from_numpy(simplejpeg.decode_jpeg(Path(path).read_bytes()))


def with_pyspng(path: str) -> torch.Tensor:
    import pyspng

    return torch.from_numpy(pyspng.load(Path(path).read_bytes(), "RGB"))


def file_loader(folder: Path, read: Callable[[str], torch.Tensor]) -> Iterator[int]:
    files = Files(folder, read)
    sampler = RandomSampler(files, replacement=True, num_samples=10**8)  # an endless epoch
    for batch in DataLoader(files, BATCH, sampler=sampler, num_workers=PROCESSES, prefetch_factor=AHEAD):
        yield len(batch)


def dataloader(folder: Path, kind: str) -> Iterator[int]:
    """torch's DataLoader over image files, decoded by Pillow."""
    return file_loader(folder / "files", with_pillow)


def dataloader_fast(folder: Path, kind: str) -> Iterator[int]:
    """torch's DataLoader over image files, decoded by simplejpeg or pyspng."""
    return file_loader(folder / "files", with_simplejpeg if kind == "JPEG" else with_pyspng)


def stack(rows: list[dict[str, Any]]) -> torch.Tensor:
    return torch.stack([tensor(row["image"]) for row in rows])


def huggingface(folder: Path, kind: str) -> Iterator[int]:
    """Hugging Face `datasets`, streaming Parquet, decoded by its Image feature."""
    import datasets

    datasets.disable_progress_bars()
    files = sorted(map(str, (folder / "parquet").iterdir()))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    stream = datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=True, features=features
    )
    shuffled = stream.shuffle(seed=0, buffer_size=BUFFER).repeat(None)
    for batch in DataLoader(shuffled, BATCH, num_workers=PROCESSES, prefetch_factor=AHEAD, collate_fn=stack):
        yield len(batch)


def write_mosaicml(folder: Path, kind: str) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder / "mosaicml"), columns={"image": kind.lower(), "label": "int"}) as out:
        for path in sorted((folder / "files").iterdir()):
            with Image.open(path) as image:
                out.write({"image": image, "label": 0})


def mosaicml(folder: Path, kind: str) -> Iterator[int]:
    """mosaicml-streaming, decoded by its own encoding with Pillow."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    data = StreamingDataset(local=str(folder / "mosaicml"), shuffle=True, batch_size=BATCH, epoch_size=EPOCH)
    for batch in DataLoader(
        data, BATCH, num_workers=PROCESSES, prefetch_factor=AHEAD, drop_last=True, collate_fn=stack
    ):
        yield len(batch)


def encoded(path: str) -> dict[str, Any]:
    return {"image": Image.open(path), "label": 0}


def write_litdata(folder: Path, kind: str) -> None:
    import litdata

    litdata.optimize(
        fn=encoded,
        inputs=sorted(map(str, (folder / "files").iterdir())),
        output_dir=str(folder / "litdata"),
        num_workers=1,
        chunk_bytes="64MB",
    )


def first_dimension_last(rows: list[dict[str, Any]]) -> torch.Tensor:
    images = [row["image"] for row in rows]
    if isinstance(images[0], Image.Image):
        return torch.stack([tensor(image) for image in images])
    return torch.stack(images).permute(0, 2, 3, 1)


def litdata(folder: Path, kind: str) -> Iterator[int]:
    """litdata, decoded by its serializers: JPEG with torchvision, PNG with Pillow. Epochs repeat."""
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(str(folder / "litdata"), shuffle=True, drop_last=True)
    loader = StreamingDataLoader(
        data,
        batch_size=BATCH,
        num_workers=PROCESSES,
        prefetch_factor=AHEAD,
        persistent_workers=True,
        collate_fn=first_dimension_last,
    )
    while True:
        for batch in loader:
            yield len(batch)


def decode_loop(images: list[bytes], size: int, seconds: float, done: Any) -> None:
    from pipeline.data.images import decode

    count, began = 0, time.perf_counter()
    for data in itertools.cycle(images):
        decode(data, size, 3)
        count += 1
        if (now := time.perf_counter()) > began + seconds:
            break
    done.put(count / (now - began))


def bare(folder: Path, seconds: float) -> float:
    """Images per second of this project's decoders alone, from memory, with one process per core."""
    import_module("pipeline.data.images")  # once, before the processes are forked
    images = [path.read_bytes() for path in sorted((folder / "files").iterdir())]
    size = Image.open(io.BytesIO(images[0])).width
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    work = [
        context.Process(target=decode_loop, args=(images, size, seconds, done))
        for _ in range(os.cpu_count() or 1)
    ]
    for process in work:
        process.start()
    total = sum(done.get() for _ in work)
    for process in work:
        process.join()
    return float(total)


LOADERS = {
    loader.__name__: loader for loader in (dataloader, dataloader_fast, huggingface, mosaicml, litdata)
}
WRITERS = {"mosaicml": write_mosaicml, "litdata": write_litdata}
NEEDED = {"huggingface": ("datasets",), "mosaicml": ("streaming",), "litdata": ("litdata", "torchvision")}


def measure(counts: Iterator[int], settle: float, count: float) -> tuple[float, float]:
    """Images per second after start-up, and the seconds to the first batch."""
    began = time.perf_counter()
    with closing(counts):  # type: ignore[type-var]
        next(counts)
        started = time.perf_counter()
        while time.perf_counter() < started + settle:
            next(counts)
        counted, seen = time.perf_counter(), 0
        while (now := time.perf_counter()) < counted + count:
            seen += next(counts)
    return seen / (now - counted), started - began


def answer(request: dict[str, Any]) -> Any:
    """Does one request and returns its result."""
    folder, name, kind = Path(request["folder"]), request["loader"], request["kind"]
    if request["do"] == "write":
        return WRITERS[name](folder, kind)
    if name == "bare":
        return bare(folder, request["count"]), 0.0
    return measure(LOADERS[name](folder, kind), request["settle"], request["count"])


def forked(request: dict[str, Any]) -> dict[str, Any]:
    """Answers a request in a separate process. Returns the answer, or the reason for a failure."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def work() -> None:
        try:
            send.send({"answer": answer(request)})
        except Exception as error:
            send.send({"failed": f"{type(error).__name__}: {error}"})

    process = context.Process(target=work)
    process.start()
    send.close()
    try:
        return receive.recv()  # type: ignore[no-any-return]
    except EOFError:
        return {"failed": "its process died"}
    finally:
        process.join()


def missing(names: list[str]) -> dict[str, str]:
    """The reason for each loader that can't be imported, by name."""
    found = {}
    for name in names:
        for module in NEEDED.get(name, ()):
            try:
                import_module(module)
            except Exception as error:  # an incompatible binary can raise any error
                found.setdefault(name, f"{type(error).__name__}: {error}")
    return found


def serve() -> None:
    """Answers the lines of stdin on stdout. All other output goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        found = missing(request["names"]) if request["do"] == "import" else forked(request)
        print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    serve()
