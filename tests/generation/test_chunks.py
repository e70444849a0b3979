"""Chunks cover every sample once."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.generation.chunks import Chunk, batches, cut_into_chunks, file_name, gaps, parse_name, tasks


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.sets(st.integers(0, 9), max_size=5))
def test_what_is_there_and_what_is_missing_cover_every_sample_once(
    count: int, rows: int, done: set[int]
) -> None:
    finished = [Chunk(i * rows, (i + 1) * rows) for i in done]
    todo = [chunk for gap in gaps(count, finished) for chunk in cut_into_chunks(gap, rows)]
    covered = sorted(i for chunk in [*todo, *finished] for i in range(chunk.start, chunk.stop))
    assert covered == sorted(set(covered))
    assert set(range(count)) <= set(covered)
    assert all(chunk.stop <= count for chunk in todo)
    assert all(chunk.start // rows == (chunk.stop - 1) // rows for chunk in todo)


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 20), st.sets(st.integers(0, 9), max_size=5), st.integers(1, 30))
def test_tasks_are_few_and_are_written_as_the_same_files(
    count: int, rows: int, done: set[int], most: int
) -> None:
    spans = list(gaps(count, [Chunk(i * rows, (i + 1) * rows) for i in done]))
    runs = tasks(spans, rows, most)
    assert len(runs) <= most + len(spans)
    assert [p for run in runs for p in cut_into_chunks(run, rows)] == [
        p for span in spans for p in cut_into_chunks(span, rows)
    ]


def test_a_plan_of_a_hundred_million_samples_is_a_few_thousand_tasks() -> None:
    runs = tasks(list(gaps(100_000_000, [])), 1024, 4096)
    assert len(runs) <= 4096
    assert sum(run.stop - run.start for run in runs) == 100_000_000


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 100), st.integers(1, 20))
def test_batches_are_whole_and_give_each_sample_of_a_piece_once(start: int, length: int, size: int) -> None:
    chunk = Chunk(start, start + length)
    got = []
    for indices, mine in batches(chunk, size):
        assert len(indices) == size
        assert indices.start % size == 0
        got += list(indices)[mine]
    assert got == list(range(chunk.start, chunk.stop))


def test_names_say_what_is_in_a_file() -> None:
    assert parse_name(file_name(Chunk(1024, 2048), "parquet")) == Chunk(1024, 2048)
    assert parse_name("train-1-2.parquet") is None
    assert parse_name("train-000000000002-000000000002.parquet") is None
    assert parse_name("notes.txt") is None
