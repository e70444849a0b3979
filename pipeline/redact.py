"""Finds secrets in addresses and settings: masks them in messages, and refuses settings that contain them."""

import dataclasses
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from pipeline.errors import InputError

MASK = "***"
# Environment variables whose values are always secret, wherever they appear in a message.
SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN", "HF_TOKEN", "REDIS_PASSWORD", "AZURE_STORAGE_KEY", "AZURE_CLIENT_SECRET",
)  # fmt: skip
# Other variables whose values are secret, by the last word of their names.
_SECRET_NAME = re.compile(
    r"(?i)(?:^|_)(?:(?<!public_)key|secret|token|pass|passwd|password|passphrase|pwd|credentials?|connection_string)$"
)
_SHORTEST_SECRET = 8
# scheme://USER:PASSWORD@, but not scheme://host:port/…@. AWS secret keys may contain slashes.
_PASSWORD = re.compile(r"(?<=://)[^/\s@:'\"]*:(?!\d+(?:/|$))[^\s'\"]*@")
# https://TOKEN@host. Other schemes have names in that place (container@account, user@host).
_WEB_USER = re.compile(r"(?:(?<=https://)|(?<=http://))[^/\s@'\"]+@")
_QUERY = re.compile(
    r"(?i)([?&](?:[\w.-]*(?:token|secret|password|signature|credential|key)[\w.-]*|sig)=)[^&\s'\"]+"
)
# Secrets with a known format, as their issuers document it.
_SHAPES = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[\w+/=\s\\-]*-----END [A-Z ]*PRIVATE KEY-----)?",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b",
    "an Azure key": r"(?i:(?<=AccountKey=)|(?<=SharedAccessKey=))[\w+/]{40,}={0,2}",
    "an Azure secret": r"(?<![\w~.-])[\w~.-]{3}\dQ~[\w~.-]{31,34}(?![\w~.-])",
    "an Azure signature": r"\bsig=[A-Za-z0-9%+/]{40,}={0,2}",
    "a Google key": r"\bAIza[\w-]{35}(?![\w-])|\bGOCSPX-[\w-]{28}|\bya29\.[\w-]{20,}",
    "a Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{34,}\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_\w{36,}",
    "a GitLab token": r"\bglpat-[\w-]{20,}",
    "a Docker token": r"\bdckr_[a-z]{3}_[\w-]{27,}",
    "an npm token": r"\bnpm_[A-Za-z0-9]{36}\b",
    "a PyPI token": r"\bpypi-AgE[\w-]{50,}",
    "a Slack token": r"\bxox[abeoprs]-[\w-]{10,}",
    "a Databricks token": r"\bdapi[0-9a-f]{32}\b",
    "a signed token": r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{16,}",
}
_SHAPE = re.compile("|".join(f"(?:{shape})" for shape in _SHAPES.values()))
# A password in an address as written in a file. Placeholders and examples do not count.
_WRITTEN_PASSWORD = re.compile(
    r"\b[a-z][a-z0-9+.-]*://(?P<user>[^/\s@:'\"]*):(?P<password>[^/\s@'\"<>{}$%*()\[\]]{8,})@[\w.-]+"
)
_EXAMPLE = re.compile(r"(?i)pass(?:word|wort|phrase)|secret|changeme|example|xxxx|my[_-]|your")


def redact(text: str) -> str:
    """The text with passwords in URIs, secrets of known format, and values of secret variables masked."""
    text = _WEB_USER.sub(f"{MASK}@", _PASSWORD.sub(f"{MASK}@", text))
    text = _SHAPE.sub(MASK, _QUERY.sub(rf"\g<1>{MASK}", text))
    for value in secret_values().values():
        text = text.replace(value, MASK)
    return text


def printable(text: str) -> str:
    """The text in one printable line: control characters and bytes that are not UTF-8 are escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # surrogateescape: a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """An error's message in one printable line without secrets, at most `limit` characters; its type if it is empty."""
    words = printable(" ".join(str(error).split())) or type(error).__name__
    return redact(words)[:limit]


def secret_values() -> dict[str, str]:
    """Values of the secret environment variables, by name. Paths and plain words under other names do not count."""
    return {
        name: value
        for name in os.environ
        if _may_be_secret(name)
        and len(value := os.environ[name]) >= _SHORTEST_SECRET
        and (name in SECRET_VARIABLES or not (value.isalpha() or value.startswith(("/", "~", "."))))
    }


@lru_cache(maxsize=1024)
def _may_be_secret(name: str) -> bool:
    """True if a variable's name says that its value is secret. Each damaged image asks this about every variable."""
    return name in SECRET_VARIABLES or bool(_SECRET_NAME.search(name))


def find_secret(text: str) -> str:
    """A description of a secret that a text contains; "" if none is found."""
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
    """Refuses a configuration that contains a secret, because flags are written to MLflow, model cards and logs.

    Raises:
        InputError: a flag holds a secret; the message names the flag and masks the secret.
    """
    for name, value in _strings(config):
        if redact(value) != value:
            raise InputError(
                f"--{name.replace('_', '-')} {redact(value)} holds a secret, but flags are logged: put "
                "credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3)"
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
