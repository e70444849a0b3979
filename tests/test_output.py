"""One driver an output: a living one is not disturbed, a dead one's lock is taken over, whatever the store."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import output as output_module
from pipeline import storage
from pipeline.errors import InputError
from pipeline.output import locked
from tests.jobs.common import ROOT

HOLD = (
    "import sys, time; from pipeline.output import locked\n"
    "with locked(sys.argv[1]):\n print('held', flush=True)\n time.sleep(600)"
)


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def owner(**changes: object) -> bytes:
    """What a lock says."""
    content = {"owner": "x", "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    return json.dumps(content | changes).encode()


def test_a_lock_is_gone_after_use_also_after_a_failure(output: str) -> None:
    with pytest.raises(ValueError, match="failed"), locked(output):
        assert json.loads(storage.read_bytes(f"{output}/lock.json"))["pid"] == os.getpid()
        raise ValueError("failed")
    with locked(output):
        pass
    assert not storage.exists(f"{output}/lock.json")


def test_a_process_that_lives_is_named_and_one_that_was_killed_is_followed(output: str) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, output], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(
                InputError, match=f"being written by process {holder.pid} on {socket.gethostname()}"
            ),
            locked(output),
        ):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(output):
        assert json.loads(storage.read_bytes(f"{output}/lock.json"))["pid"] == os.getpid()


def test_a_driver_on_another_machine_is_alive_until_it_has_been_silent(output: str) -> None:
    place = f"{output}/lock.json"
    storage.write_atomic(place, owner(host="elsewhere", pid=7))
    with pytest.raises(InputError, match="process 7 on elsewhere"), locked(output):
        pass
    storage.write_atomic(
        place, owner(host="elsewhere", pid=7, time=time.time() - output_module.DEAD_SECONDS - 1)
    )
    with locked(output):
        pass


def test_a_damaged_lock_belongs_to_nobody(output: str) -> None:
    storage.write_atomic(f"{output}/lock.json", b'{"own')
    with locked(output):
        pass


def test_of_many_drivers_at_once_exactly_one_gets_a_new_lock_and_one_a_dead_ones(output: str) -> None:
    for dead in (False, True):
        if dead:
            storage.write_atomic(f"{output}/lock.json", owner(host="elsewhere", time=0.0))

        def attempt(_: int) -> bool:
            try:
                with locked(output):
                    time.sleep(output_module.SETTLE_SECONDS + 1)
            except InputError:
                return False
            return True

        with ThreadPoolExecutor(4) as drivers:
            assert sum(drivers.map(attempt, range(4))) == 1


def test_the_owner_says_again_and_again_that_it_is_alive(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module, "BEAT_SECONDS", 0.05)
    with locked(output):
        before = json.loads(storage.read_bytes(f"{output}/lock.json"))["time"]
        deadline = time.monotonic() + 30
        while json.loads(storage.read_bytes(f"{output}/lock.json") or b'{"time": 0}')["time"] <= before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
