"""Secrets in addresses and settings: masked in whatever is shown, refused wherever they would be kept."""

import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any

from pipeline.errors import InputError

MASK = "***"
# Variables whose values are secret, whatever they look like and however they get into a message.
SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN", "HF_TOKEN", "REDIS_PASSWORD", "AZURE_STORAGE_KEY", "AZURE_CLIENT_SECRET",
)  # fmt: skip
# Others, by the last word of their names.
_SECRET_NAME = re.compile(
    r"(?i)(?:^|_)(?:(?<!public_)key|secret|token|pass|passwd|password|passphrase|pwd|credentials?|connection_string)$"
)
_SHORTEST_SECRET = 8
# scheme://USER:PASSWORD@; what looks like scheme://host:port/…@ is none. AWS's secret keys may hold slashes.
_PASSWORD = re.compile(r"(?<=://)[^/\s@:'\"]*:(?!\d+(?:/|$))[^\s'\"]*@")
# https://TOKEN@host; other schemes have names there (container@account, user@host).
_WEB_USER = re.compile(r"(?:(?<=https://)|(?<=http://))[^/\s@'\"]+@")
_QUERY = re.compile(
    r"(?i)([?&](?:[\w.-]*(?:token|secret|password|signature|credential|key)[\w.-]*|sig)=)[^&\s'\"]+"
)
# Secrets that are known by how they look, as those who give them out describe them.
_SHAPES = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[\w+/=\s\\-]*-----END [A-Z ]*PRIVATE KEY-----)?",
    "a key of AWS": r"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b",
    "a key of Azure": r"(?i:(?<=AccountKey=)|(?<=SharedAccessKey=))[\w+/]{40,}={0,2}",
    "a secret of Azure": r"(?<![\w~.-])[\w~.-]{3}\dQ~[\w~.-]{31,34}(?![\w~.-])",
    "a signature of Azure": r"\bsig=[A-Za-z0-9%+/]{40,}={0,2}",
    "a key of Google": r"\bAIza[\w-]{35}(?![\w-])|\bGOCSPX-[\w-]{28}|\bya29\.[\w-]{20,}",
    "a token of Hugging Face": r"\b(?:hf|api_org)_[A-Za-z0-9]{34,}\b",
    "a token of GitHub": r"\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_\w{36,}",
    "a token of GitLab": r"\bglpat-[\w-]{20,}",
    "a token of Docker": r"\bdckr_[a-z]{3}_[\w-]{27,}",
    "a token of npm": r"\bnpm_[A-Za-z0-9]{36}\b",
    "a token of PyPI": r"\bpypi-AgE[\w-]{50,}",
    "a token of Slack": r"\bxox[abeoprs]-[\w-]{10,}",
    "a token of Databricks": r"\bdapi[0-9a-f]{32}\b",
    "a signed token": r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{16,}",
}
_SHAPE = re.compile("|".join(f"(?:{shape})" for shape in _SHAPES.values()))
# A password in an address, as it stands in a file; a place for one is none, nor is an example.
_WRITTEN_PASSWORD = re.compile(
    r"\b[a-z][a-z0-9+.-]*://(?P<user>[^/\s@:'\"]*):(?P<password>[^/\s@'\"<>{}$%*()\[\]]{8,})@[\w.-]+"
)
_EXAMPLE = re.compile(r"(?i)pass(?:word|wort|phrase)|secret|changeme|example|xxxx|my[_-]|your")


def redact(text: str) -> str:
    """A text without the passwords of the URIs in it, and without the values of secret variables."""
    text = _WEB_USER.sub(f"{MASK}@", _PASSWORD.sub(f"{MASK}@", text))
    text = _SHAPE.sub(MASK, _QUERY.sub(rf"\g<1>{MASK}", text))
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
    """The secrets that this process knows of, by the name of their variable; no path is one, and no plain word."""
    return {
        name: value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST_SECRET
        and (
            name in SECRET_VARIABLES
            or (_SECRET_NAME.search(name) and not value.isalpha() and not value.startswith(("/", "~", ".")))
        )
    }


def find_secret(text: str) -> str:
    """What secret a file's text holds, in words; "" where none is known."""
    for name, value in secret_values().items():
        if value in text:
            return f"the value of {name}"
    for what, shape in _SHAPES.items():
        if re.search(shape, text):
            return what
    for found in _WRITTEN_PASSWORD.finditer(text):
        word = found["password"]
        if not word.isupper() and word != found["user"] and not _EXAMPLE.match(word):
            return "a password in an address"
    return ""


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
