"""The plan: each epoch holds each row once, any number of ranks and any first step agree, each byte is read once."""

import time

import numpy as np
import pytest

from pipeline.data.order import OPEN_BYTES, Plan, Rows, batch_rows, cut, lanes_for, rows_per_group

WORLDS = (1, 2, 3, 4, 7, 16, 256)
PLAN = Plan(np.array([10, 7, 10, 10, 3, 10, 1]), seed=3, batch_size=8, lanes=4)
_MIXED = np.random.default_rng(0)
SIZES = {
    "one row": [1],
    "one group": [200],
    "fewer rows than a batch": [3, 1, 4],
    "rows alone": [1] * 300,
    "huge and small": [3000, *[1] * 30, *[64] * 9],
    "uneven": _MIXED.integers(1, 100, 40).tolist(),
    "a tenth held out": _MIXED.binomial(64, 0.9, 30).tolist(),
}


def same(one: Rows, other: Rows) -> bool:
    return all(np.array_equal(getattr(one, n), getattr(other, n)) for n in ("epoch", "group", "row"))


def part(rows: Rows, steps: slice, places: slice = slice(None)) -> Rows:
    return Rows(*(getattr(rows, name)[steps, places] for name in ("epoch", "group", "row")))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("batch_size", "lanes"), [(24, 1), (24, 8), (24, 24), (256, 64)])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_epoch_holds_every_sample_once_for_any_number_of_ranks(
    sizes: list[int], batch_size: int, lanes: int, whole: bool
) -> None:
    plan = Plan(np.array(sizes), 1, batch_size, lanes, whole)
    steps = -(-3 * plan.rows // batch_size) + 1
    everything = batch_rows(plan, 0, steps)
    for epoch in range(3):
        seen = plan.ids(everything)[everything.epoch == epoch]
        assert np.array_equal(np.sort(seen), np.arange(plan.rows))
    # The plan is the same from any step on and for any number of ranks, and each rank's share of a batch is constant.
    for world_size in [n for n in WORLDS if n <= batch_size]:
        start = steps * world_size % 5 * steps // 5
        for rank in {0, world_size // 2, world_size - 1}:
            first, last = cut(batch_size, rank, world_size)
            mine = batch_rows(plan, start, steps, first, last)
            assert same(mine, part(everything, slice(start, steps), slice(first, last)))
        cuts = [cut(batch_size, rank, world_size) for rank in range(world_size)]
        assert [a for a, _ in cuts] == [0, *(b for _, b in cuts[:-1])]
        assert cuts[-1][1] == batch_size


def test_any_step_alone_is_that_of_the_whole() -> None:
    everything = batch_rows(PLAN, 0, 40)
    for step in range(40):
        assert same(batch_rows(PLAN, step, step + 1), part(everything, slice(step, step + 1)))


def test_epochs_follow_each_other_without_a_seam() -> None:
    """When the last row of an epoch enters a batch, each lane is at most one row into the next epoch."""
    rows = batch_rows(PLAN, 0, 40)
    before = [np.count_nonzero(rows.epoch[:step] == 0) for step in range(41)]
    assert all(taken >= min(51, 8 * step - 4) for step, taken in enumerate(before))


def test_epochs_and_seeds_differ_in_order() -> None:
    seen = PLAN.ids(rows := batch_rows(PLAN, 0, 13))
    first, second = seen[rows.epoch == 0], seen[rows.epoch == 1]
    assert first[: len(second)].tolist() != second.tolist()
    other = Plan(PLAN.group_rows, 4, 8, 4)
    assert other.ids(batch_rows(other, 0, 5)).tolist() != seen[:5].tolist()


def bytes_read_over_used(plan: Plan, world_size: int) -> float:
    """Return rows read over rows used in one epoch, if a rank keeps each group from first to last use."""
    steps = plan.rows // plan.batch_size
    read = 0
    for rank in range(world_size):
        rows = batch_rows(plan, 0, steps, *cut(plan.batch_size, rank, world_size))
        open_ = np.unique(rows.epoch * len(plan.group_rows) + rows.group)
        read += int(plan.group_rows[open_ % len(plan.group_rows)].sum())
    return read / (steps * plan.batch_size)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("world_size", [3, 4, 7, 8, 256])
def test_all_ranks_together_read_a_byte_once(world_size: int, held_out: bool) -> None:
    rng = np.random.default_rng(1)
    sizes = rng.binomial(64, 0.9, 10_240) if held_out else np.full(10_240, 64)
    assert bytes_read_over_used(Plan(sizes, 0, 1024, 256), world_size) < 1.03 + (
        0 if 256 % world_size == 0 else (world_size - 1) / 256
    )


def test_a_small_dataset_is_read_about_once_by_eight_ranks() -> None:
    """This is at the defaults of jobs/prepare.py."""
    for rows, batch_size in ((1800, 64), (9000, 128)):
        each = rows_per_group(rows, rows * 3000)
        sizes = np.array([each] * (rows // each) + [rows % each])
        plan = Plan(sizes, 0, batch_size, lanes_for(len(sizes), rows * 3000, batch_size))
        assert bytes_read_over_used(plan, 4) < 1.05
        assert bytes_read_over_used(plan, 8) < 1.05


@pytest.mark.parametrize("image", [300, 3000, 110_000, 2_000_000])
@pytest.mark.parametrize("rows", [10**6, 10**7, 10**9])
def test_prepared_data_has_ten_groups_for_each_lane_of_usual_batches(rows: int, image: int) -> None:
    each = rows_per_group(rows, rows * image)
    groups = rows // each
    for batch_size in (64, 256, 1024):
        if image < 2_000_000 or batch_size < 1024:  # else memory holds less than one image per lane
            assert lanes_for(groups, rows * image, batch_size) == batch_size
        assert groups >= 10 * lanes_for(groups, rows * image, batch_size)
    # Groups are no smaller than necessary: a request for a few kilobytes takes as long as one for half a megabyte.
    assert each * image > min(OPEN_BYTES / 2048, rows * image / 10 / 1024) / 2


def test_small_prepared_data_has_no_tiny_groups_and_large_images_few_in_a_group() -> None:
    assert rows_per_group(200, 200 * 300) == rows_per_group(60_000, 60_000 * 300) == 16
    assert rows_per_group(10_000, 10_000 * 110_000) == 4
    assert rows_per_group(1, 10**9) == 1


@pytest.mark.parametrize("group", [4, 8])
def test_a_batch_of_sorted_data_holds_nearly_as_many_classes_as_a_random_one(group: int) -> None:
    classes = np.repeat(np.arange(1000), 1280)
    plan = Plan(np.full(len(classes) // group, group), 0, 256, 256, whole=False)
    for step in (0, 1, 500, 4000, 4999, 5001):
        assert len(np.unique(classes[plan.ids(batch_rows(plan, step, step + 1))])) > 0.9 * 226
    # Consecutive batches hold different classes.
    assert len(np.unique(classes[plan.ids(batch_rows(plan, 1000, 1004))])) > 0.75 * 641


def test_lanes_are_as_many_as_memory_allows_and_divide_the_batch() -> None:
    assert lanes_for(1000, 10**6, 96) == 96
    assert lanes_for(1000, 0, 96) == 96
    for groups, size, batch in ((10**4, 10**11, 96), (244_141, 6 * 10**12, 8192), (3, 10**13, 8)):
        lanes = lanes_for(groups, size, batch)
        assert batch % lanes == 0
        assert lanes == 1 or 2 * lanes * size / groups <= max(OPEN_BYTES, size / 256)
    assert lanes_for(244_141, 6 * 10**12, 8192) >= 256


def test_a_plan_of_a_billion_images_is_cheap_anywhere() -> None:
    plan = Plan(np.full(244_141, 4096), 0, 8192, 256)
    began = time.process_time()
    for rank, step in enumerate((0, 60_000, 121_000)):
        assert batch_rows(plan, step, step + 16, *cut(8192, rank, 256)).row.shape == (16, 32)
    assert time.process_time() - began < 1
