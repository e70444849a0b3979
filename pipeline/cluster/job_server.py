"""The way to a cluster's job server: address, token, certificate; one clear line for each that is wrong."""

import logging
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import InputError
from pipeline.redact import one_line, redact

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
THIS_MACHINE = "127.0.0.1", "localhost", "::1"
SECONDS = 15.0


def connect(address: str, verify: str = "true") -> Any:
    """A client of the job server.

    Where RAY_AUTH_MODE is not set, this machine's own cluster gets the token that Ray keeps in the home folder and
    that `ray start` turns on by itself; no other cluster gets it.

    Args:
        address: http:// or https://; "" = RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else this machine's.
        verify: "true", "false", or a path of certificates of trusted authorities.

    Raises:
        InputError: no job server answers there, or not to us.
    """
    given = (
        address,
        os.environ.get("RAY_API_SERVER_ADDRESS"),
        os.environ.get("RAY_ADDRESS"),
        DEFAULT_ADDRESS,
    )
    address = next(filter(None, given)).rstrip("/")
    _check_address(address)
    checked: bool | str = {"true": True, "false": False}.get(verify.lower(), verify)
    if isinstance(checked, str) and not Path(checked).exists():
        raise InputError(f"--verify {verify}: expected true, false, or a file or folder of certificates")
    # Ray's client would let these override the address that it is given.
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
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
        # The version may be asked for by anyone: whether the token is the right one shows here.
        client.get_job_info("is-the-token-right")
    except AuthenticationError as error:
        raise InputError(_token_line(address, str(error))) from None
    except (ConnectionError, RuntimeError) as error:
        if "404" not in str(error):
            raise InputError(f"the job server at {address}: {one_line(error)}") from None
    return client


def _check_address(address: str) -> None:
    try:
        url = urlsplit(address)
        complete = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        complete = False
    if not complete or redact(address) != address:
        raise InputError(f"--address {redact(address)}: expected http://HOST:8265 or https://HOST")


def _knock(address: str, verify: bool | str) -> None:
    """Asks for the version: Ray's own client waits for ever where nothing answers, and hides TLS's complaints."""
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
        raise InputError(f"no Ray job server answers at {address}: {one_line(error)}") from None
    except (requests.exceptions.RequestException, ValueError, KeyError, TypeError) as error:
        raise InputError(f"what answers at {address} is no Ray job server: {one_line(error)}") from None


def _token_line(address: str, reason: str) -> str:
    if "Authentication required" in reason:
        return f"the cluster at {address} asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
    if "Authentication failed" in reason:
        return f"the cluster at {address} refuses the token: is RAY_AUTH_TOKEN that of this cluster?"
    return f"no token for the cluster at {address}: {one_line(reason)}"
