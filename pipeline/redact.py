"""Secrets in addresses and settings: masked in whatever is shown, refused wherever they would be kept."""

import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any

from pipeline.errors import InputError

MASK = "***"
# Variables whose values are secret, however they get into a message.
SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN", "HF_TOKEN",
)  # fmt: skip
_SHORTEST_SECRET = 8
# scheme://USER:PASSWORD@; what looks like scheme://host:port/…@ is none. AWS's secret keys may hold slashes.
_PASSWORD = re.compile(r"(?<=://)[^/\s@:'\"]*:(?!\d+(?:/|$))[^\s'\"]*@")
# https://TOKEN@host; other schemes have names there (container@account, user@host).
_WEB_USER = re.compile(r"(?:(?<=https://)|(?<=http://))[^/\s@'\"]+@")
_QUERY = re.compile(
    r"(?i)([?&](?:[\w.-]*(?:token|secret|password|signature|credential|key)[\w.-]*|sig)=)[^&\s'\"]+"
)


def redact(text: str) -> str:
    """A text without the passwords of the URIs in it, and without the values of secret variables."""
    text = _WEB_USER.sub(f"{MASK}@", _PASSWORD.sub(f"{MASK}@", text))
    text = _QUERY.sub(rf"\g<1>{MASK}", text)
    for value in secret_values().values():
        text = text.replace(value, MASK)
    return text


def printable(text: str) -> str:
    """A text as it can be shown and listed in one line: control characters, and bytes that are no UTF-8, are escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how a byte of a name stands that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """An error's words in one printable line without secrets; its kind, where it has no words."""
    words = printable(" ".join(str(error).split())) or type(error).__name__
    return redact(words)[:limit]


def secret_values() -> dict[str, str]:
    """The secrets that this process knows of, by the name of their variable."""
    values = {name: os.environ.get(name, "") for name in SECRET_VARIABLES}
    return {name: value for name, value in values.items() if len(value) >= _SHORTEST_SECRET}


def refuse_secrets(config: Any) -> None:
    """Refuses a configuration with a secret in it: flags are written to MLflow, model cards and logs.

    Raises:
        InputError: names the flag, with the secret masked.
    """
    for name, value in _strings(config):
        if redact(value) != value:
            raise InputError(
                f"--{name.replace('_', '-')} {redact(value)} holds a secret, and flags are logged: credentials "
                "come from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for S3)"
            )


def _strings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _strings(item, name)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, str(key))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _strings(getattr(value, field.name), field.name)
