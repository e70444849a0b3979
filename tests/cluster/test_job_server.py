"""Anything wrong with the connection to a cluster is reported in one line, and soon."""

import contextlib
import datetime
import ipaddress
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.cluster import job_server
from pipeline.cluster.job_server import connect
from pipeline.errors import InputError
from tests.jobs.common import ROOT


@contextlib.contextmanager
def server(
    answer: Callable[[str], tuple[int, str | bytes]],
    certificate: tuple[Path, Path] | None = None,
    token: str = "",
    host: str = "127.0.0.1",
) -> Iterator[str]:
    """Serve HTTP. `answer` gives status and body for a path; a request without the token gets 401."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = not token or self.headers.get("Authorization") == f"Bearer {token}"
            # Requests to a proxy name the whole URL.
            path = "/" + self.path.split("/", 3)[3] if "://" in self.path else self.path
            status, body = answer(path) if known else (401, "no token")
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else body.encode())

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer((host, 0), Handler)
    scheme = "http"
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        running.socket = context.wrap_socket(running.socket, server_side=True)
        scheme = "https"
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    try:
        yield f"{scheme}://{host}:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def ray_like(path: str, ray: str = "2.60.0", python: str = "3.11.7") -> tuple[int, str | bytes]:
    """Answer as a cluster without a token does."""
    answers = {
        "/api/version": {"ray_version": ray},
        "/api/v0/cluster_metadata": {"data": {"rayVersion": ray, "pythonVersion": python}},
    }
    return (200, json.dumps(answers[path])) if path in answers else (404, "no such job")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Paths of a self-signed certificate for 127.0.0.1 and of its key."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return folder / "cert.pem", folder / "key.pem"


def test_an_address_given_goes_before_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    with server(ray_like) as address:
        assert connect(address).get_address() == address
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert connect("").get_address() == address


def test_a_certificate_is_checked_unless_told_otherwise(certificate: tuple[Path, Path]) -> None:
    with server(ray_like, certificate) as address:
        with pytest.raises(InputError, match=r"not trusted.*--verify FILE"):
            connect(address)
        assert connect(address, str(certificate[0])).get_address() == address
        assert connect(address, "false").get_address() == address


@pytest.mark.parametrize(
    ("status", "complaint"), [(401, "asks for a token: set RAY_AUTH_MODE=token"), (403, "refuses the token")]
)
def test_what_is_wrong_with_the_token_is_said(status: int, complaint: str) -> None:
    with server(lambda path: (status, "no")) as address, pytest.raises(InputError, match=complaint):
        connect(address)


def test_rays_own_token_goes_to_this_machines_cluster_and_to_no_other(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    token = "0123456789abcdef" * 4
    (tmp_path / ".ray" / "auth_token").write_text(token)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    program = "import sys; from pipeline.cluster.job_server import connect; connect(sys.argv[1])"

    def asked(address: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, address],
            env=environment | {"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    with server(ray_like, token=token) as address:
        known = asked(address)
        assert known.returncode == 0, known.stderr
    with server(ray_like, token=token, host="127.0.0.2") as address:
        assert "asks for a token" in asked(address).stderr


def test_another_server_is_told_from_a_job_server() -> None:
    with (
        server(lambda path: (200, "<html>")) as address,
        pytest.raises(InputError, match="is not a Ray job server"),
    ):
        connect(address)
    with (
        server(lambda path: (404, "")) as address,
        pytest.raises(InputError, match="is not a Ray job server"),
    ):
        connect(address)


def test_where_nothing_listens_the_cause_is_named_and_what_to_do() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(
            InputError, match=r": \[Errno 111\] Connection refused; `ray start --head` starts"
        ):
            connect(f"http://127.0.0.1:{closed.getsockname()[1]}")


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_server, "SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(InputError, match="no Ray job server answers"):
            connect(f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize(
    ("ray", "python", "complaint"),
    [
        (
            "2.40.0",
            "3.11.7",
            "runs Ray 2.40.0 and Python 3.11.7: jobs need Ray 2.60 and Python 3.11 or newer",
        ),
        ("2.60.0", "3.9.18", "Python 3.9.18: jobs need"),
        ("3.0.0", "3.14.1", ""),
        ("unknown", "3.12", "Invalid version: 'unknown'"),
    ],
)
def test_a_cluster_that_is_too_old_for_the_jobs_is_refused(ray: str, python: str, complaint: str) -> None:
    refused = pytest.raises(InputError, match=complaint) if complaint else contextlib.nullcontext()
    with server(lambda path: ray_like(path, ray, python)) as address, refused:
        connect(address)
    with (
        server(lambda path: (404, "") if "metadata" in path else ray_like(path)) as address,
        pytest.raises(InputError, match=r"does not say its versions.*jobs need Ray 2\.60"),
    ):
        connect(address)


def test_the_oldest_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ray,) = (line for line in project["dependencies"] if line.startswith("ray["))
    oldest = {"Ray": ray.partition(">=")[2], "Python": project["requires-python"].removeprefix(">=")}
    assert {name: tuple(map(int, text.split("."))) for name, text in oldest.items()} == job_server.OLDEST


@pytest.mark.parametrize(
    ("source", "address", "complaint"),
    [
        (
            "RAY_ADDRESS",
            "10.0.0.1:6379",
            r"^RAY_ADDRESS=10\.0\.0\.1:6379: expected .* http://10\.0\.0\.1:8265",
        ),
        ("RAY_ADDRESS", "auto", r"^RAY_ADDRESS=auto: expected http://HOST:8265"),
        (
            "RAY_API_SERVER_ADDRESS",
            "ray://h:10001",
            r"^RAY_API_SERVER_ADDRESS=ray://h:10001: .* http://h:8265",
        ),
    ],
)
def test_a_variable_that_is_wrong_is_named(
    source: str, address: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(source, address)
    with pytest.raises(InputError, match=complaint):
        connect("")


@pytest.mark.parametrize(
    "address",
    ["10.0.0.1:8265", "ray://head:10001", "http://", "http://head:99999", "http://me:planted@head:8265"],
)
def test_an_address_that_cannot_be_is_refused(address: str) -> None:
    with pytest.raises(InputError, match=r"--address .*: expected .*http://[\w.]+:8265") as caught:
        connect(address)
    assert "planted" not in str(caught.value)


def test_certificates_that_are_not_there_are_named() -> None:
    with pytest.raises(InputError, match="--verify nowhere"):
        connect("https://127.0.0.1:9", "nowhere")
