"""Some three thousand damaged files cause no hang, no crash and no loss of an intact image."""

import subprocess
import sys

import pytest

from tests.jobs.common import ROOT

KINDS = {"PNG,JPEG,GIF,TIFF,WEBP": 500, "tar": 200, "parquet": 200}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(kind: str) -> None:
    command = [sys.executable, "-m", "tests.data.fuzz", kind, str(KINDS[kind]), "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    # The mutations must really do damage, else the checks prove nothing.
    assert int(done.stdout) > KINDS[kind] // 20
