"""The stream gives the plan's images for any number of workers and any first step, in bounded memory."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray import cloudpickle
from ray.data import DataContext

from pipeline.cluster.ray_internals import ExecutionCallback
from pipeline.cluster.session import spilled_bytes
from pipeline.config import ImageConfig
from pipeline.data import stream
from pipeline.data.batch import Batch
from pipeline.data.blocks import as_row, tables_of
from pipeline.data.groups import row_groups
from pipeline.data.images import decode
from pipeline.data.index import DatasetIndex, open_dataset
from pipeline.data.order import Plan, batch_rows
from pipeline.data.stream import PlannedData, RankStream, share
from tests.data.common import encode, encoded, label_of, picture, write_folder, write_tars

IMAGES = encoded(200, 20, 12)


@pytest.fixture(scope="module")
def index(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    """An index of tars with images that aren't square."""
    return open_dataset(str(write_tars(tmp_path_factory.mktemp("data") / "tars", IMAGES)), image_size=12)


def plan_of(index: DatasetIndex) -> Plan:
    return index.plan(seed=3, batch_size=24)


def stream_of(index: DatasetIndex, rank: int = 0, world_size: int = 1, **options: object) -> RankStream:
    return RankStream(share(index, plan_of(index)), rank, world_size, **options)  # type: ignore[arg-type]


def collect(stream: RankStream, start: int, stop: int) -> list[Batch]:
    with closing(stream.batches(start, stop)) as batches:
        return list(batches)


def samples(batches: list[Batch]) -> list[tuple[int, int, bytes]]:
    return [
        (int(i), int(e), x.numpy().tobytes())
        for b in batches
        for i, e, x in zip(b.ids, b.epochs, b.images.contiguous(), strict=True)
    ]


@pytest.fixture(scope="module")
def whole(index: DatasetIndex) -> list[Batch]:
    """The batches of twenty steps (nearly three epochs) on one rank, with random crops."""
    return collect(stream_of(index, random_crop=True), 0, 20)


@pytest.fixture(scope="module")
def centred(index: DatasetIndex) -> list[Batch]:
    """The batches of the first ten steps on one rank, with crops at the centre."""
    return collect(stream_of(index), 0, 10)


def check_order(index: DatasetIndex, batches: list[Batch], start: int, stop: int) -> None:
    """Check that the batches are those of the plan's steps, in its order, with each image's pixels and label."""
    plan = plan_of(index)
    rows = batch_rows(plan, start, stop)
    assert torch.cat([b.ids for b in batches]).tolist() == plan.ids(rows).ravel().tolist()
    assert torch.cat([b.epochs for b in batches]).tolist() == rows.epoch.ravel().tolist()
    by_pixels = {decode(d, 12, 3).tobytes(): label_of(i) for i, d in enumerate(IMAGES)}
    pixels_of = dict[int, bytes]()
    for batch in batches:
        assert batch.images.shape == (24, 3, 12, 12)
        assert batch.weights.tolist() == [1.0] * 24
        pixels = [p.tobytes() for p in batch.images.permute(0, 2, 3, 1).contiguous().numpy()]
        assert [by_pixels[p] for p in pixels] == batch.labels.tolist()
        for number, content in zip(batch.ids.tolist(), pixels, strict=True):
            assert pixels_of.setdefault(number, content) == content
    assert len(set(pixels_of.values())) == len(pixels_of)


def test_the_plans_images_in_the_plans_order(index: DatasetIndex, centred: list[Batch]) -> None:
    check_order(index, centred, 0, 10)


def test_two_ranks_see_what_one_sees(index: DatasetIndex, whole: list[Batch]) -> None:
    parts = [collect(stream_of(index, rank, 2, random_crop=True), 0, 20) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert sorted(samples([parts[0][step], parts[1][step]])) == sorted(samples([batch]))


def test_a_stream_goes_on_from_any_step(index: DatasetIndex, whole: list[Batch]) -> None:
    assert samples(collect(stream_of(index, random_crop=True), 7, 20)) == samples(whole[7:])


class Reading(ExecutionCallback):
    """Records the most spans that a stream's reading process was given at once. Ray may run the later one first."""

    most = 0

    def on_execution_step(self, executor: object) -> None:
        for operator in executor._topology:  # type: ignore[attr-defined]
            if "Read" in operator.name:
                Reading.most = max(Reading.most, operator.num_active_tasks())


def test_spans_are_read_one_after_the_other(index: DatasetIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SPAN_BLOCKS", 1)
    callbacks = [*DataContext.get_current().custom_execution_callback_classes, Reading]
    monkeypatch.setattr(DataContext.get_current(), "custom_execution_callback_classes", callbacks)
    check_order(index, collect(stream_of(index), 20, 90), 20, 90)
    assert Reading.most == 1


def test_a_stream_travels_as_little_whatever_the_size_of_the_data(cluster: None) -> None:
    sizes = []
    for files in (10, 10_000):
        groups = row_groups((f"/data/{n}.parquet", [4096] * 16) for n in range(files))
        image = ImageConfig(64, 3, tuple(f"class {n}" for n in range(files)))
        index = DatasetIndex("/data", "train", image, groups, "")
        (stream,) = PlannedData(2, False).configure({"train": share(index, plan_of(index))}, 1)
        sizes.append(len(cloudpickle.dumps(stream)))
    assert sizes[0] == pytest.approx(sizes[1], abs=16)
    assert sizes[1] < 4096


def test_a_table_is_a_row_and_back_without_a_copy() -> None:
    table = pa.table({"a": [1, 2, 3], "b": pa.chunked_array([["x"], ["y", None]]), "c": [[1], [], [2]]})
    row = as_row(table)
    assert row.num_rows == 1
    both = pa.concat_tables([row, as_row(table.slice(1))])
    assert [t.to_pydict() for t in tables_of(both)] == [table.to_pydict(), table.slice(1).to_pydict()]
    (again,) = tables_of(row)
    assert again["a"].chunk(0).buffers()[1].address == table["a"].chunk(0).buffers()[1].address


def test_crops_change_with_the_epoch_and_the_sample(whole: list[Batch], centred: list[Batch]) -> None:
    seen: dict[int, set[bytes]] = {}
    for number, _, pixels in samples(whole):
        seen.setdefault(number, set()).add(pixels)
    assert sum(len(crops) for crops in seen.values()) > 1.5 * len(seen)
    plain = {number: pixels for number, _, pixels in samples(centred)}
    assert sum(plain[number] in crops for number, crops in seen.items()) < len(seen) // 2


def left_of_streams(threads: set[threading.Thread]) -> list[str]:
    """Return the names of threads that aren't in `threads`, and of this process's living actors."""
    from pipeline.cluster.ray_internals import state

    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    actors = state.actor_table(None, job, "ALIVE").values()
    return [thread.name for thread in set(threading.enumerate()) - threads] + [
        actor["ActorClassName"] for actor in actors
    ]


@pytest.fixture(scope="module")
def read_before(whole: list[Batch]) -> None:
    """A stream was read, which starts the actors and threads that Ray Data keeps for later executions."""
    time.sleep(2)


@pytest.mark.parametrize("seconds", [0.0, 1.0, 6.0])
def test_a_stream_that_is_closed_before_its_first_batch_leaves_nothing_behind(
    index: DatasetIndex, read_before: None, seconds: float
) -> None:
    """It is closed before its execution begins, while its readers start, and while its batches wait to be taken."""
    threads = set(threading.enumerate())
    kept = Counter(left_of_streams(threads))
    with closing(stream_of(index).batches(0, 200)):
        time.sleep(seconds)
    deadline = time.monotonic() + 20
    while (left := Counter(left_of_streams(threads)) - kept) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def test_a_process_of_the_stream_that_dies_changes_nothing(
    index: DatasetIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind dies at different moments: while the first batches are taken, and far into the run.

    With blocks of eight steps some 100 steps are in flight. So the processes that replace the first dead ones work
    when the later ones die.
    """
    monkeypatch.setattr(stream, "block_rows", lambda *_: 8 * 24)
    plan, steps = plan_of(index), 375
    rows = batch_rows(plan, 0, steps)
    expected = plan.ids(rows).tolist()
    kills = {2: "Read", 12: "Decode", 125: "Decode", 225: "Read"}
    with closing(stream_of(index).batches(0, steps)) as batches:
        for step, batch in enumerate(batches):
            assert batch.ids.tolist() == expected[step]
            if kind := kills.get(step):
                victims = [one for one in family() if f"MapBatches({kind}" in " ".join(one.cmdline())]
                assert victims
                for victim in victims:
                    victim.kill()
    assert step == steps - 1


def test_bad_images_count_for_nothing_and_are_named(cluster: None, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", IMAGES[:60])
    (folder / "cat" / "bad.png").write_bytes(b"\x89PNG not really")
    bad_index = open_dataset(str(folder), image_size=12)
    told: dict[str, str] = {}
    stream = stream_of(bad_index)
    with closing(stream.batches(0, 3, on_bad=told.update)) as batches:
        weights = torch.cat([b.weights for b in batches])
    if "cat/bad.png" not in told:  # the split by hash may have put it into validation
        told |= next(iter(collect(stream_of(open_dataset(str(folder), "validation", 12)), 0, 3))).bad
    else:
        assert (weights == 0).sum() >= 1
    assert told.keys() == {"cat/bad.png"}
    assert "UnidentifiedImageError" in told["cat/bad.png"]


def large_images(folder: Path, count: int) -> DatasetIndex:
    """Return an index of images that are small as PNG and 256 KiB decoded."""
    folder.mkdir()
    data = [encode(picture(i, 3, 3, "L").resize((512, 512), 0), compress_level=1) for i in range(8)]
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())])
    with pq.ParquetWriter(folder / "a.parquet", schema) as writer:
        for first in range(0, count, 32):
            rows = range(first, min(first + 32, count))
            # A different tail per image, so that the split by content doesn't take all copies or none.
            writer.write_table(
                pa.table(
                    {"image": [data[i % 8] + b"%d" % i for i in rows], "label": [i % 3 for i in rows]}, schema
                )
            )
    return open_dataset(str(folder))


MEGABYTE = 2**20
IN_FLIGHT = 128 * MEGABYTE
SLACK = 160 * MEGABYTE  # blocks being written, waiting in the trainer, or not yet freed


def store_bytes() -> int:
    from pipeline.cluster.ray_internals import get_memory_info_reply, get_state_from_address

    return int(
        get_memory_info_reply(
            get_state_from_address(ray.get_runtime_context().gcs_address)
        ).store_stats.object_store_bytes_used
    )


def family() -> Iterator[psutil.Process]:
    """Yield this process and the workers of its Ray."""
    yield psutil.Process()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[0].startswith("ray::"):
                yield process
        except (psutil.Error, IndexError):
            continue


def of_a_stream(process: psutil.Process) -> bool:
    try:
        return "MapBatches(" in " ".join(process.cmdline())
    except psutil.Error:
        return False


class Peak:
    """The peak private memory of this process and of a worker, and of the object store, in a `with` block; bytes."""

    def __enter__(self) -> "Peak":
        # A process of the stream before would count for this one, and hide that it is the larger one.
        deadline = time.monotonic() + 20
        while any(of_a_stream(process) for process in family()):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        self.trainer = self.reader = self.store = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        looked, known = 0.0, list[psutil.Process]()
        while not self._done.wait(0.2):
            # A look for new processes reads about every process of the machine, and they live for many seconds.
            if time.monotonic() > looked + 1:
                looked, known = time.monotonic(), list(family())
            for process in known:
                try:
                    memory = process.memory_info()
                except psutil.Error:
                    continue
                private = memory.rss - memory.shared
                if process.pid == psutil.Process().pid:
                    self.trainer = max(self.trainer, private)
                else:
                    self.reader = max(self.reader, private)
            self.store = max(self.store, store_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def consume(index: DatasetIndex, images: int) -> int:
    """Read equally many images of any data. All go through one decoding process, which would hold what it kept."""
    stream = replace(stream_of(index), readers=1, in_flight=IN_FLIGHT)
    with closing(stream.batches(0, images // 24)) as batches:
        return sum(len(b.ids) for b in batches)


@pytest.mark.system
def test_memory_does_not_grow_with_the_data(cluster: None, tmp_path: Path) -> None:
    small, large = large_images(tmp_path / "small", 200), large_images(tmp_path / "large", 2000)
    images = large.rows // 24 * 24
    assert images > 9 * small.rows
    # Each run reads equally many images, since a longer run has a higher peak. The small data is read before and
    # after, since a process also grows with its age. The bounds are wide, since the data is ten times as large.
    with Peak() as once:
        assert consume(small, images) == images
    with Peak() as tenfold:
        assert consume(large, images) == images
    with Peak() as again:
        assert consume(small, images) == images
    assert tenfold.trainer < 1.25 * max(once.trainer, again.trainer)
    assert tenfold.reader < 1.25 * max(once.reader, again.reader)
    # The store releases freed blocks about once a second, which at this speed is some 300 MiB.
    assert tenfold.store < 2 * max(once.store, again.store)
    assert spilled_bytes() == 0


@pytest.mark.system
def test_a_slow_trainer_holds_the_readers_back(cluster: None, tmp_path: Path) -> None:
    large = large_images(tmp_path / "large", 3000)
    before = store_bytes()
    stream = replace(stream_of(large), in_flight=IN_FLIGHT)
    with closing(stream.batches(0, large.rows // 24)) as batches:
        next(batches)
        sizes = []
        for _ in range(8):
            time.sleep(0.5)
            sizes.append(store_bytes() - before)
    assert max(sizes) < IN_FLIGHT + SLACK
