"""Connects to a cluster's job server: address, token, certificate. Each that is wrong gets one clear line."""

import logging
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import InputError
from pipeline.redact import one_line, redact

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
VARIABLES = "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"
# Oldest versions on the cluster that can run the code that is sent, as in pyproject.toml.
OLDEST = {"Ray": (2, 60), "Python": (3, 11)}
THIS_MACHINE = "127.0.0.1", "localhost", "::1"
SECONDS = 15.0


def connect(address: str, verify: str = "true") -> Any:
    """Connects a client to a job server.

    If RAY_AUTH_MODE is not set, a cluster on this machine gets the token from the home folder that `ray start` creates.
    No other cluster gets that token.

    Args:
        address: http:// or https://; "" = RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else this machine's job server.
        verify: "true", "false", or the path of trusted authorities' certificates.

    Raises:
        InputError: the address or the certificates are wrong, no job server answers, it refuses the token, or the
            cluster's versions are too old.
    """
    given = {"--address": address} | {name: os.environ.get(name, "") for name in VARIABLES}
    source, address = next(((k, v.strip().rstrip("/")) for k, v in given.items() if v), ("", DEFAULT_ADDRESS))
    _check_address(source, address)
    checked: bool | str = {"true": True, "false": False}.get(verify.lower(), verify)
    if isinstance(checked, str) and not Path(checked).exists():
        raise InputError(f"--verify {verify}: expected true, false, or a file or folder of certificates")
    # Ray's client would prefer these variables to its argument.
    for name in VARIABLES:
        os.environ.pop(name, None)

    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    from pipeline.cluster.ray_internals import JOB_CLIENT_LOGGERS, maybe_enable_token_auth_if_token_available

    for name in JOB_CLIENT_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if urlsplit(address).hostname in THIS_MACHINE:
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    _knock(address, checked)
    try:
        client = JobSubmissionClient(address, verify=checked)
        # The version is public, so only this request shows if the token is correct.
        client.get_job_info("is-the-token-right")
    except AuthenticationError as error:
        raise InputError(_token_line(address, str(error))) from None
    except (OSError, RuntimeError, ValueError) as error:
        if "404" not in str(error):
            raise InputError(f"the job server at {address}: {one_line(error)}") from None
    _check_versions(client, address)
    return client


def read_log(client: Any, job_id: str, node: str | None) -> bytes:
    """All that a job has printed so far.

    Args:
        node: id of the node of the job's driver; None = the job has not started.
    """
    from pipeline.cluster.ray_internals import ask_job_server

    if node is None:
        return b""
    name = f"job-driver-{job_id}.log"
    return bytes(ask_job_server(client, f"/api/v0/logs/file?node_id={node}&filename={name}&lines=-1").content)


def _check_address(source: str, address: str) -> None:
    """Refuses an address that is not http:// or https://, and names the flag or variable that gave it."""
    try:
        url = urlsplit(address)
        complete = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        other = urlsplit(address if "://" in address else f"//{address}")
        host = other.hostname if other.scheme in ("", "ray") and other.port else None
    except ValueError:
        complete, host = False, None
    if complete and redact(address) == address:
        return
    hint = "http://HOST:8265 or https://HOST"
    if host and "@" not in address:
        hint = f"the job server of that cluster, by default http://{host}:8265"
    name = f"--address {redact(address)}" if source == "--address" else f"{source}={redact(address)}"
    raise InputError(
        f"{name}: expected {hint}" + ("" if source == "--address" else "; --address goes before it")
    )


def _knock(address: str, verify: bool | str) -> None:
    """Requests the version first, because Ray's client waits forever for an answer and hides errors of TLS."""
    import requests

    try:
        answer = requests.get(f"{address}/api/version", timeout=SECONDS, verify=verify)
        if answer.status_code in (401, 403):
            return
        answer.raise_for_status()
        answer.json()["ray_version"]
    except requests.exceptions.SSLError as error:
        raise InputError(
            f"{address}: its certificate is not trusted: {one_line(error)}; "
            "--verify FILE names the authority's certificate"
        ) from None
    except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
        raise InputError(
            f"no Ray job server answers at {address}: {one_line(_root(error))}; `ray start --head` starts a cluster on "
            "this machine, --address names another"
        ) from None
    except (requests.exceptions.RequestException, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the server at {address} is not a Ray job server: {one_line(error)}") from None


def _root(error: BaseException) -> BaseException:
    """The first error of a chain, which the system raised."""
    while before := error.__cause__ or error.__context__:
        error = before
    return error


def _check_versions(client: Any, address: str) -> None:
    """Refuses a cluster that is too old for the code that is sent."""
    from pipeline.cluster.ray_internals import ask_job_server

    needed = " and ".join(f"{name} {'.'.join(map(str, oldest))}" for name, oldest in OLDEST.items())
    try:
        there = ask_job_server(client, "/api/v0/cluster_metadata").json()["data"]
        found = {"Ray": str(there["rayVersion"]), "Python": str(there["pythonVersion"])}
        parts = {name: tuple(map(int, re.findall(r"\d+", text)[:2])) for name, text in found.items()}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"the cluster at {address} does not say its versions ({one_line(error)}): jobs need {needed} or newer"
        ) from None
    if any(parts[name] < oldest for name, oldest in OLDEST.items()):
        runs = " and ".join(f"{name} {text}" for name, text in found.items())
        raise InputError(f"the cluster at {address} runs {runs}: jobs need {needed} or newer")


def _token_line(address: str, reason: str) -> str:
    if "Authentication required" in reason:
        return f"the cluster at {address} asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
    if "Authentication failed" in reason:
        return f"the cluster at {address} refuses the token: is RAY_AUTH_TOKEN that of this cluster?"
    return f"no token for the cluster at {address}: {one_line(reason)}"
