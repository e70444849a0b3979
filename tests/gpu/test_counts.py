"""A training step's kernels, counted on torch's meta device, which holds no values."""

import pytest

from pipeline.gpu import available

pytest.importorskip("triton")


def test_a_batch_is_prepared_by_few_kernels_and_no_step_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmarks import kernels

    monkeypatch.setattr(available, "work", available.work)  # the benchmark replaces it; this restores it
    # A step that read a value from the device would raise here, since the device has none.
    counts = kernels.main(smoke=True)
    assert counts["prepare"] < 40
    assert counts["step"] > counts["prepare"]
