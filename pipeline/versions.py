"""Version numbers of the behaviour and formats that a release may change, for files that users keep.

Every run, checkpoint, manifest and model records the versions that wrote it. Files from before 0.2.0 record none and
count as 0.1.0.
"""

from typing import Any

from pipeline.errors import InputError

VERSIONS = {
    "order": 3,  # choice of the samples in global batch k
    "noise": 2,  # random numbers of a sample
    "kernels": 4,  # arithmetic of the network, bit by bit
    "format": 2,  # layout of files
}
TRAINING, SAMPLING, PREPARING = ("order", "noise", "kernels"), ("noise", "kernels"), ("order",)
OF_0_1_0 = {"order": 1, "noise": 1, "kernels": 1, "format": 2}


def check_readable(found: dict[str, Any] | None, where: str) -> None:
    """Checks that this release can read a file. It reads all older layouts.

    Raises:
        InputError: a later release wrote the file, or its versions are damaged.
    """
    try:
        its = int((found or OF_0_1_0)["format"])
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{where} is damaged: its versions are {found}") from None
    if its > VERSIONS["format"]:
        raise InputError(
            f"{where}: written by a later release of ray-ddpm (format {its}, this one reads up to {VERSIONS['format']}): "
            "upgrade"
        )


def check_same(found: dict[str, Any] | None, where: str, of: tuple[str, ...] = TRAINING) -> None:
    """Checks that work that was begun can continue with the same result as without an interruption.

    Args:
        of: names of the versions that the work depends on.

    Raises:
        InputError: this release orders data, draws noise or computes differently from the one that began the work.
    """
    check_readable(found, where)
    its = found or OF_0_1_0
    changed = [f"{name} {its[name]}, now {VERSIONS[name]}" for name in of if its[name] != VERSIONS[name]]
    if changed:
        raise InputError(
            f"{where}: begun by {its.get('release', 'ray-ddpm 0.1.0')}, which works differently ({'; '.join(changed)}): "
            "continue with that release, or choose another folder"
        )
