"""Damaged files by the thousand: never a hang, a crash or a lost good image."""

import subprocess
import sys

import pytest

from tests.jobs.common import ROOT

KINDS = {"PNG,JPEG,GIF,TIFF,WEBP": 1000, "tar": 400, "parquet": 400}


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(kind: str) -> None:
    command = [sys.executable, "-m", "tests.data.fuzz", kind, str(KINDS[kind]), "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    # Damage that no reader noticed would prove nothing.
    assert int(done.stdout) > KINDS[kind] // 20
