"""The plan: each epoch whole, the same for any number of workers, from any position."""

import numpy as np
import pytest

from pipeline.data.order import Plan, epoch_windows, local_batch_size, window_rows, windows_between

PLAN = Plan(group_rows=(10, 7, 10, 10, 3, 10, 1), seed=3, batch_size=8, groups_per_window=3)


def stream(plan: Plan, start: int, stop: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, int]]:
    """(position, sample id) pairs, as the rank sees them."""
    seen = []
    for window in windows_between(plan, start, stop):
        rows = window_rows(plan.seed, window, start, stop, rank, world_size)
        seen += zip(rows.position.tolist(), (plan.first_id[rows.group] + rows.row).tolist(), strict=True)
    return seen


def test_every_epoch_sees_every_sample_once() -> None:
    for epoch in range(3):
        seen = stream(PLAN, epoch * PLAN.rows, (epoch + 1) * PLAN.rows)
        assert sorted(sample for _, sample in seen) == list(range(51))
        assert [position for position, _ in seen] == list(range(epoch * 51, (epoch + 1) * 51))


def test_epochs_and_seeds_differ_in_order() -> None:
    first = [s for _, s in stream(PLAN, 0, 51)]
    assert first != [s for _, s in stream(PLAN, 51, 102)]
    assert first != [s for _, s in stream(Plan(PLAN.group_rows, 4, 8, 3), 0, 51)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_global_batches_do_not_depend_on_the_number_of_workers(world_size: int) -> None:
    whole = dict(stream(PLAN, 0, 160))
    parts = [stream(PLAN, 0, 160, rank, world_size) for rank in range(world_size)]
    assert dict(pair for part in parts for pair in part) == whole
    for rank, part in enumerate(parts):
        for step in range(20):
            local = [p for p, _ in part if p // 8 == step]
            assert len(local) == local_batch_size(PLAN, step, rank, world_size)


@pytest.mark.parametrize("start", [0, 1, 8, 50, 51, 77])
def test_a_resume_goes_on_where_the_stream_stopped(start: int) -> None:
    assert stream(PLAN, start, 160) == stream(PLAN, 0, 160)[start:]


def test_a_window_mixes_its_groups_evenly_and_bounds_the_memory() -> None:
    plan = Plan(group_rows=(64,) * 12, seed=0, batch_size=16, groups_per_window=4)
    window = epoch_windows(plan, 0)[0]
    rows = window_rows(plan.seed, window, 0, plan.rows, 0, 1)
    assert len(rows.row) == 4 * 64
    for batch in range(16):
        _, counts = np.unique(rows.group[batch * 16 : (batch + 1) * 16], return_counts=True)
        assert counts.tolist() == [4, 4, 4, 4]


def test_ranks_read_disjoint_groups_when_the_window_divides() -> None:
    plan = Plan(group_rows=(64,) * 12, seed=0, batch_size=16, groups_per_window=4)
    window = epoch_windows(plan, 0)[0]
    groups = [set(window_rows(plan.seed, window, 0, plan.rows, r, 2).group.tolist()) for r in range(2)]
    assert groups[0].isdisjoint(groups[1])
    assert groups[0] | groups[1] == set(window.groups)
