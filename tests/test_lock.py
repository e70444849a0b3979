"""One driver per output, on every storage: a living one keeps its lock, a dead one's lock is taken over."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.exceptions import ConnectionClosedError

from pipeline import lock as lock_module
from pipeline import storage
from pipeline.errors import InputError, Outage
from pipeline.lock import LeaseLost, locked
from pipeline.output import read_claim, write_claim
from tests.data.weather import Weather
from tests.jobs.common import ROOT

HOLD = (
    "import sys, time; from pipeline.lock import locked\n"
    "with locked(sys.argv[1]):\n print('held', flush=True)\n time.sleep(600)"
)


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def owner(**changes: object) -> bytes:
    """Return a lock's content, by default this process's."""
    content = {"owner": "x", "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    return json.dumps(content | changes).encode()


def test_a_lock_is_gone_after_use_also_after_a_failure(output: str) -> None:
    with pytest.raises(ValueError, match="failed"), locked(output):
        assert json.loads(storage.read_bytes(f"{output}/lock.json"))["pid"] == os.getpid()
        raise ValueError("failed")
    with locked(output):
        pass
    assert not storage.exists(f"{output}/lock.json")


@pytest.mark.slow
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


@pytest.mark.parametrize("slow", [0, 600])
def test_a_driver_on_another_machine_is_waited_for_until_it_shows_that_it_is_alive(
    slow: float, output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This holds too if the other machine's clock is ten minutes slow."""
    monkeypatch.setattr(lock_module, "POLL_SECONDS", 0.05)
    place = f"{output}/lock.json"
    storage.write_atomic(place, owner(host="elsewhere", pid=7, time=time.time() - slow))

    done = threading.Event()

    def renew() -> None:
        while not done.wait(0.2):
            storage.write_atomic(place, owner(host="elsewhere", pid=7, time=time.time() - slow))

    with ThreadPoolExecutor(1) as elsewhere:
        elsewhere.submit(renew)
        try:
            with pytest.raises(InputError, match="being written by process 7 on elsewhere"), locked(output):
                pass
        finally:
            done.set()
    assert "held by process 7 on elsewhere, which may be dead: taking over in " in capsys.readouterr().err


def test_an_expired_lease_is_taken_over(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(lock_module, "RENEW_SECONDS", 0.1)
    place = f"{output}/lock.json"
    storage.write_atomic(place, owner(host="elsewhere", time=time.time() - lock_module.LEASE_SECONDS - 1))
    with locked(output):
        assert json.loads(storage.read_bytes(place))["pid"] == os.getpid()
    # A lock dated in the future by a wrong clock expires too, once it has not changed for the length of a lease.
    monkeypatch.setattr(lock_module, "LEASE_SECONDS", 0.5)
    storage.write_atomic(place, owner(host="elsewhere", time=time.time() + 3600))
    with locked(output):
        assert json.loads(storage.read_bytes(place))["pid"] == os.getpid()


def test_a_driver_whose_lease_was_taken_over_stops_at_once_and_leaves_the_lock(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "RENEW_SECONDS", 0.1)
    began = time.monotonic()
    with pytest.raises(LeaseLost, match="was taken over by another driver"), locked(output):
        taken_over = owner(host="elsewhere", owner="y")
        storage.write_atomic(f"{output}/lock.json", taken_over)
        time.sleep(60)
    assert time.monotonic() - began < 30
    assert storage.read_bytes(f"{output}/lock.json") == taken_over


def test_a_driver_that_slept_past_its_lease_wakes_up_and_stops(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = f"{bucket}/{tmp_path.name}"
    quick = "import pipeline.lock as o; o.LEASE_SECONDS = 2; o.RENEW_SECONDS = 0.2\n"
    for name, value in (("LEASE_SECONDS", 2.0), ("RENEW_SECONDS", 0.2), ("POLL_SECONDS", 0.1)):
        monkeypatch.setattr(lock_module, name, value)
    holder = subprocess.Popen(
        [sys.executable, "-c", quick + HOLD, output], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    try:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=f"being written by process {holder.pid}"), locked(output):
            pass
        holder.send_signal(signal.SIGSTOP)
        with locked(output):
            holder.send_signal(signal.SIGCONT)
            _, complaint = holder.communicate(timeout=60)
            assert b"LeaseLost: --output" in complaint and holder.returncode == 1
            assert json.loads(storage.read_bytes(f"{output}/lock.json"))["pid"] == os.getpid()
    finally:
        holder.kill()
        holder.wait()


def test_a_storage_that_is_away_for_a_while_takes_no_lease_away(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lock_module, "LEASE_SECONDS", 0.2)
    with locked(output):
        with monkeypatch.context() as outage:
            outage.setattr(storage, "open_fs", lambda uri: (_ for _ in ()).throw(ConnectionError(uri)))
            time.sleep(1)
        time.sleep(0.5)
        assert storage.exists(f"{output}/lock.json")


def test_a_file_is_replaced_only_where_it_still_is_of_that_version(output: str) -> None:
    uri = f"{output}/x"
    assert storage.create(uri, b"1") and not storage.create(uri, b"2")
    content, version = storage.read_version(uri)
    assert content == b"1"
    assert storage.replace(uri, b"3", version)
    if not storage.is_local(uri):
        assert not storage.replace(uri, b"4", version)
    assert storage.read_bytes(uri) == b"3"


def test_a_damaged_lock_belongs_to_nobody(output: str) -> None:
    storage.write_atomic(f"{output}/lock.json", b'{"own')
    with locked(output):
        pass


def test_of_many_drivers_at_once_exactly_one_gets_a_new_lock_and_one_a_dead_ones(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(lock_module, "RENEW_SECONDS", 1.0)
    for dead in (False, True):
        if dead:
            storage.write_atomic(f"{output}/lock.json", owner(host="elsewhere", time=0.0))
        over = threading.Barrier(4, timeout=60)

        def attempt(_: int, over: threading.Barrier = over) -> bool:
            try:
                with locked(output):
                    over.wait()
            except InputError:
                over.wait()
                return False
            return True

        with ThreadPoolExecutor(4) as drivers:
            assert sum(drivers.map(attempt, range(4))) == 1


def test_the_owner_says_again_and_again_that_it_is_alive(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "RENEW_SECONDS", 0.05)
    with locked(output):
        before = json.loads(storage.read_bytes(f"{output}/lock.json"))["time"]
        deadline = time.monotonic() + 30
        while json.loads(storage.read_bytes(f"{output}/lock.json") or b'{"time": 0}')["time"] <= before:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_store_that_fails_at_the_lock_or_the_settings_gets_one_line(bucket: str, weather: Weather) -> None:
    write_claim(bucket, "run.json", {"a": 1})
    weather.storm("expired", 600.0, lambda method, path: path.endswith(("lock.json", "run.json")))
    with pytest.raises(Outage, match=f"--output {bucket} can't be locked: .*Forbidden"), locked(bucket):
        pass
    with pytest.raises(Outage, match=r"run\.json can't be read: .*Forbidden"):
        read_claim(bucket, "run.json")
    with pytest.raises(Outage, match=r"run\.json can't be written: .*expired"):
        write_claim(bucket, "run.json", {"a": 2})
    weather.calm()
    assert (read_claim(bucket, "run.json") or {})["fixed"] == {"a": 1}


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "X: No space left on device; then"),
        (PermissionError("Forbidden"), "X: Forbidden; then"),
        # No OSError: what s3fs raises for a connection that is closed again and again.
        (ConnectionClosedError(endpoint_url="http://s3"), 'X: Connection was closed .*"http://s3".; then'),
    ],
)
def test_an_error_of_a_storage_becomes_one_line_and_other_errors_stay(error: Exception, says: str) -> None:
    with pytest.raises(Outage, match=says), storage.reporting("X", "; then"):
        raise error
    for other in (ValueError("mine"), InputError("mine"), OSError("damaged")):
        with pytest.raises(type(other), match=r"^(mine|damaged)$"), storage.reporting("X"):
            raise other
