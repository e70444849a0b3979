"""What a step asks of a GPU, counted on torch's device without values."""

import pytest

from pipeline.gpu import available

pytest.importorskip("triton")


def test_a_batch_is_prepared_by_few_kernels_and_no_step_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmarks import kernels

    monkeypatch.setattr(available, "work", available.work)  # which the benchmark replaces
    # A step that asked for a value of the device, which has none, would raise here.
    counts = kernels.main(smoke=True)
    assert counts["prepare"] < 40
    assert counts["step"] > counts["prepare"]
