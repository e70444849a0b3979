"""Whose an output folder is: one set of settings, from its first file on."""

import json
import math
import os
from typing import Any

from pipeline import __version__, storage
from pipeline.errors import InputError
from pipeline.versions import OF_0_1_0, TRAINING, VERSIONS, check_same


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON. Numbers that are not finite become null, since JSON has no word for them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), indent=indent, allow_nan=False)


def read_claim(output: str, name: str) -> dict[str, Any] | None:
    """What an output was begun with; None where it is new.

    Args:
        name: of the file that says it.

    Returns:
        `fixed`, the settings; `versions`; and what else was kept beside them.

    Raises:
        InputError: the file is damaged.
    """
    uri = storage.join(output, name)
    try:
        content = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{uri} is damaged: {error}: restore it, or choose another folder") from None
    if not isinstance(content, dict):
        raise InputError(f"{uri} is damaged: restore it, or choose another folder")
    # 0.1.0 kept some settings without a name around them, and no versions.
    return content if "fixed" in content else {"fixed": content, "versions": OF_0_1_0, **content}


def check_claim(
    output: str,
    before: dict[str, Any],
    fixed: dict[str, Any],
    defaults: dict[str, Any] | None = None,
    hints: dict[str, str] | None = None,
    of: tuple[str, ...] = TRAINING,
) -> None:
    """Refuses to continue an output with other settings than it was begun with.

    Args:
        before: what `read_claim` returned.
        fixed: the settings of this run that must equal those the output was begun with.
        defaults: values of settings that an older release did not write.
        hints: by setting, words that the error adds to the former value.
        of: the versions that the work depends on.

    Raises:
        InputError: other settings, or a release that works otherwise.
    """
    check_same(before.get("versions"), f"--output {output}", of)
    for key, now in fixed.items():
        if (then := before["fixed"].get(key, (defaults or {}).get(key))) != now:
            raise InputError(
                f"--output {output} was begun with {key} = {then}{(hints or {}).get(key, '')}, now it is {now}: keep it, "
                "or choose another folder"
            )


def write_claim(output: str, name: str, fixed: dict[str, Any], **beside: Any) -> None:
    """Makes an output belong to `fixed`; what is `beside` it is kept, and may change."""
    content = {"versions": {**VERSIONS, "release": f"ray-ddpm {__version__}"}, "fixed": fixed, **beside}
    storage.write_atomic(storage.join(output, name), json.dumps(content, indent=1, sort_keys=True).encode())


def check_apart(output: str, flag: str, source: str) -> None:
    """Refuses an output inside of the data that it is made from: the next run would take it for data.

    Args:
        flag: that the data was given with.

    Raises:
        InputError: it lies inside, or is the same folder.
    """
    if source and is_inside(output, source):
        raise InputError(f"--output {output} lies inside of {flag} {source}: choose a folder beside it")


def is_inside(uri: str, folder: str) -> bool:
    """Whether a file or a folder lies in another folder, or is that, whatever links lead there.

    Args:
        folder: or a pattern: then whether it lies in what that would match.
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
