"""A cluster as users meet it: nodes from `ray start`, a token, an MLflow server, an S3 server. All is on loopback.

Every process is a child of this one in a session of its own, and is ended by its id.
"""

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests

from tests.jobs.common import OF_TRAINING, Outcome, command, outcome
from tests.jobs.forked import descendants, starting_node, template_address

LOOPBACK = "127.0.0.1"
BUCKET = "ray-ddpm"
DATA, RUN = f"s3://{BUCKET}/digits", f"s3://{BUCKET}/runs/digits"
PREPARE = ["prepare", "--", "--source", "digits", "--output", DATA, "--rows-per-shard", "900"]
SMALL = [
    "--model-channels", "32", "--channel-multipliers", "1", "--res-blocks", "1", "--attention-resolutions", "4",
    "--readers", "1",
]  # fmt: skip
BIN = Path(sys.executable).parent
START_SECONDS = 120.0


@dataclass
class Served:
    """Addresses, secrets and processes of the cluster.

    Attributes:
        home: folder of logs and MLflow's files, which all nodes see.
        secret: the nodes' S3 password, which must not appear anywhere.
        jobs, mlflow, s3: URLs of the job server, MLflow and S3.
        address: the address for RAY_ADDRESS.
        servers: environment variables by which the nodes reach MLflow and S3.
        ray_start: runs `ray start` in the nodes' environment, given a name and flags.
    """

    home: Path
    token: str
    secret: str
    jobs: str
    mlflow: str
    s3: str
    address: str
    servers: dict[str, str]
    head: subprocess.Popen[bytes]
    ray_start: Callable[..., subprocess.Popen[bytes]]
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def user(self) -> dict[str, str]:
        """The environment of a user outside the cluster: the token, but none of the nodes' variables."""
        return user_environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    @property
    def member(self) -> dict[str, str]:
        """The environment of a driver that joins the cluster: the nodes' variables and the token."""
        return self.user | self.servers | {"RAY_ADDRESS": self.address}

    def driver(self, *words: str) -> list[psutil.Process]:
        """Return the head's processes whose command line has these words, such as a submitted job's driver."""
        found = []
        for process in family(self.head):
            with contextlib.suppress(psutil.Error):
                if set(words) <= set(" ".join(process.cmdline()).split()):
                    found.append(process)
        return found

    def submit(self, *arguments: object, timeout: float = 240, **extra: str) -> Outcome:
        """Run `jobs/submit.py` from outside the cluster and return its outcome."""
        return outcome(
            subprocess.run(
                command("submit", "--address", self.jobs, *arguments),
                cwd=self.home,
                env=self.user | extra,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        )

    def start_submit(self, *arguments: object) -> subprocess.Popen[str]:
        """Start `jobs/submit.py` from outside the cluster in the background."""
        return subprocess.Popen(
            command("submit", "--address", self.jobs, *arguments),
            cwd=self.home,
            env=self.user,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def keys(self, prefix: str) -> list[str]:
        """Return the bucket's keys with this prefix, as the server lists them."""
        listing = requests.get(f"{self.s3}/{BUCKET}?list-type=2&prefix={prefix}", timeout=30).text
        return re.findall("<Key>(.*?)</Key>", listing)

    def add_node(self, cpus: int = 2) -> None:
        """Start a node and wait until it has joined."""
        name = f"node{len(self.nodes)}"
        self.nodes.append(self.ray_start(name, f"--address={self.address}", f"--num-cpus={cpus}"))
        wait_for(name, self._all_joined, needed=[self.head, *self.nodes])

    def _all_joined(self) -> bool:
        """Return whether as many nodes are alive as were started."""
        bearer = {"Authorization": f"Bearer {self.token}"}
        with contextlib.suppress(requests.RequestException):
            answer = requests.get(f"{self.jobs}/nodes?view=summary", headers=bearer, timeout=10)
            up = [one for one in answer.json()["data"]["summary"] if one["raylet"].get("state") == "ALIVE"]
            return len(up) == len(self.nodes) + 1
        return False


def user_environment() -> dict[str, str]:
    """Return this process's environment without variables of Ray, MLflow and AWS."""
    ours = ("RAY_", "MLFLOW_", "AWS_")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {"PYTHONWARNINGS": "ignore"}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return a process that was started here, and its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        return [parent, *descendants(parent)]
    return []


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that was started here, and its descendants."""
    for one in family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def wait_for(
    what: str,
    ready: Callable[[], bool],
    seconds: float = START_SECONDS,
    needed: Iterable[subprocess.Popen[bytes]] = (),
) -> None:
    """Wait until `ready`. Fail after `seconds`, or earlier if one of the `needed` processes has ended."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"{what} took more than {seconds} s"
        assert all(process.poll() is None for process in needed), f"{what}: a process ended too early"
        time.sleep(0.2)


def answers(url: str, **headers: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(url, headers=headers, timeout=5).ok
    return False


@contextlib.contextmanager
def served_cluster(nodes: int = 2, cpus: int = 2) -> Iterator[Served]:
    """Start the cluster and its servers, and end all processes afterwards, also after an error."""
    # Ray's sockets lie in this folder and need short paths.
    home = Path(tempfile.mkdtemp(prefix="rd-", dir="/tmp"))
    started: list[subprocess.Popen[bytes]] = []
    token, secret = secrets.token_hex(32), f"planted/{secrets.token_hex(16)}"
    jobs, gcs, client, mlflow, s3 = free_ports(5)
    # MLflow's own job runners would each occupy a core while they start, and no test needs them.
    idle = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    base = user_environment() | idle | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    servers = {
        "MLFLOW_TRACKING_URI": f"http://{LOOPBACK}:{mlflow}",
        "AWS_ENDPOINT_URL": f"http://{LOOPBACK}:{s3}",
        "AWS_ACCESS_KEY_ID": "user",
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
    }
    inside = base | servers | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "1",
        "RAY_prestart_worker_first_driver": "0",
        **OF_TRAINING,
    }  # fmt: skip

    def start(name: str, environment: dict[str, str], *words: object) -> subprocess.Popen[bytes]:
        with (home / f"{name}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    list(map(str, words)),
                    cwd=home,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        return started[-1]

    def ray_start(name: str, *words: object) -> subprocess.Popen[bytes]:
        agent, metrics = free_ports(2)
        return start(
            name, inside, *starting_node(template_address(), "start"), "--block", "--disable-usage-stats",
            f"--node-ip-address={LOOPBACK}", "--min-worker-port=0", "--max-worker-port=0",
            f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}",
            f"--object-store-memory={200 * 2**20}",
            # A folder per node, as on separate machines. In a shared one nodes would unpack files over each other.
            f"--temp-dir={home}/{name}", *words,
        )  # fmt: skip

    try:
        start(
            "mlflow", base, BIN / "mlflow", "server", f"--host={LOOPBACK}", f"--port={mlflow}", "--workers=1",
            f"--backend-store-uri=sqlite:///{home}/mlflow.db", "--serve-artifacts",
            f"--artifacts-destination={home}/artifacts",
        )  # fmt: skip
        start("s3", base, BIN / "moto_server", "-H", LOOPBACK, "-p", s3)
        # Start one after the other, since Ray gives each node 30 s to start whatever else the machine does.
        wait_for("MLflow", lambda: answers(f"{servers['MLFLOW_TRACKING_URI']}/health"))
        head = ray_start(
            "head", "--head", f"--port={gcs}", f"--dashboard-host={LOOPBACK}", f"--dashboard-port={jobs}",
            "--num-cpus=0", f"--ray-client-server-port={client}",
        )  # fmt: skip
        cluster = Served(
            home, token, secret, f"http://{LOOPBACK}:{jobs}", servers["MLFLOW_TRACKING_URI"],
            servers["AWS_ENDPOINT_URL"], f"{LOOPBACK}:{gcs}", servers, head, ray_start,
        )  # fmt: skip
        wait_for("the S3 server", lambda: answers(cluster.s3))
        assert requests.put(f"{cluster.s3}/{BUCKET}", timeout=10).ok
        bearer = {"Authorization": f"Bearer {token}"}
        wait_for("Ray's head", lambda: answers(f"{cluster.jobs}/api/version", **bearer), needed=started)
        for _ in range(nodes):
            cluster.add_node(cpus)
        yield cluster
    except BaseException:
        for log in home.glob("*.log"):
            print(f"--- {log.name}\n{log.read_text()[-2000:]}", file=sys.stderr)
        raise
    finally:
        for process in reversed(started):
            kill(process)
        shutil.rmtree(home, ignore_errors=True)
