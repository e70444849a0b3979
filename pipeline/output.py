"""Ties an output folder to one set of settings, from its first file on."""

import json
import math
import os
from typing import Any

from pipeline import __version__, storage
from pipeline.errors import InputError
from pipeline.versions import OF_0_1_0, TRAINING, VERSIONS, check_same

# The files by which jobs claim an output, and what it then holds.
CLAIMS = {
    "run.json": "a training run",
    "search.json": "a search",
    "settings.json": "generated samples",
    "parts/settings.json": "prepared data",
}


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON. Numbers that are not finite become null, because JSON can't express them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), indent=indent, allow_nan=False)


def read_claim(output: str, name: str, beside: tuple[str, ...] = ()) -> dict[str, Any] | None:
    """The settings that an output was begun with; None if the output is new.

    Args:
        name: name of the file that holds them.
        beside: texts that must be there, of those that `write_claim` kept beside the settings.

    Returns:
        `fixed`, the settings; `versions`; and whatever `write_claim` kept beside them.
    Raises:
        InputError: the file is damaged, or can't be read now.
    """
    uri = storage.join(output, name)
    with storage.reporting(f"{uri} can't be read"):
        try:
            data = storage.read_bytes(uri)
        except FileNotFoundError:
            return None
    try:
        content = json.loads(data)
    except ValueError as error:
        raise InputError(f"{uri} is damaged: {error}: restore it, or choose another folder") from None
    whole = isinstance(content, dict) and isinstance(content.get("fixed", {}), dict)
    if not (whole and all(isinstance(content.get(key), str) for key in beside)):
        raise InputError(f"{uri} is damaged: restore it, or choose another folder")
    # Release 0.1.0 wrote some settings at the top level, and no versions.
    return content if "fixed" in content else {"fixed": content, "versions": OF_0_1_0, **content}


def check_claim(
    output: str,
    before: dict[str, Any],
    fixed: dict[str, Any],
    defaults: dict[str, Any] | None = None,
    hints: dict[str, str] | None = None,
    of: tuple[str, ...] = TRAINING,
) -> None:
    """Refuses to continue an output with settings other than those it was begun with.

    Args:
        before: result of `read_claim`.
        fixed: the settings of this run that must equal those the output was begun with.
        defaults: values of settings that an older release did not write.
        hints: text that the error adds after the former value, by setting.
        of: names of the versions that the work depends on.

    Raises:
        InputError: a setting differs, or the output was begun by a release that works differently.
    """
    check_same(before.get("versions"), f"--output {output}", of)
    for key, now in fixed.items():
        if (then := before["fixed"].get(key, (defaults or {}).get(key))) != now:
            raise InputError(
                f"--output {output} was begun with {key} = {then}{(hints or {}).get(key, '')}, now it is {now}: keep it, "
                "or choose another folder"
            )


def check_unclaimed(output: str, name: str) -> None:
    """Refuses to begin in a folder that another job has begun in, because each would take the other's files for its own.

    Args:
        name: name of the file by which this job claims an output, one of `CLAIMS`.

    Raises:
        InputError: the folder holds another job's output.
    """
    for other, what in CLAIMS.items():
        claim = None if other == name else read_claim(output, other)
        if claim and "release" in (claim.get("versions") or {}):  # else a file of another program
            raise InputError(f"--output {output} holds {what}: choose another folder")


def write_claim(output: str, name: str, fixed: dict[str, Any], **beside: Any) -> None:
    """Writes the settings that an output belongs to. Values in `beside` are kept too, and may change later."""
    content = {"versions": {**VERSIONS, "release": f"ray-ddpm {__version__}"}, "fixed": fixed, **beside}
    uri = storage.join(output, name)
    with storage.reporting(f"{uri} can't be written"):
        storage.write_atomic(uri, json.dumps(content, indent=1, sort_keys=True).encode())


def check_apart(output: str, flag: str, source: str) -> None:
    """Refuses an output inside the data that it is made from, because the next run would read it as data.

    Args:
        flag: flag that the data was given with.
        source: URI of the data.

    Raises:
        InputError: the output lies inside the data, or is the same folder.
    """
    if source and is_inside(output, source):
        raise InputError(f"--output {output} lies inside {flag} {source}: choose a folder beside it")


def is_inside(uri: str, folder: str) -> bool:
    """True if a file or folder lies in another folder, or is that folder. Links are resolved.

    Args:
        folder: folder or pattern; for a pattern, True if `uri` lies in something that it would match.
    """

    fs, mine = storage.open_fs(uri)
    pattern = storage.pattern_of(folder)
    there, above = storage.open_fs(folder)
    if type(fs) is not type(there):
        return False
    above = pattern[0] if pattern else above
    if storage.is_local(uri):
        mine, above = os.path.realpath(mine), os.path.realpath(above)
    mine, above = mine.rstrip("/") + "/", above.rstrip("/") + "/"
    return mine.startswith(above) and (not pattern or storage.matcher(pattern[1])(mine[len(above) : -1]))
