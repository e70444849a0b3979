"""Versions of what a release may change under files that users have.

Every run, checkpoint, manifest and model says with which it was written. What was written before 0.2.0 says nothing, and
has those of 0.1.0.
"""

from typing import Any

from pipeline.errors import InputError

VERSIONS = {
    "order": 3,  # which samples form global batch k
    "noise": 2,  # which random numbers a sample gets
    "kernels": 3,  # how the network's arithmetic is done, to the bit
    "format": 2,  # how files are laid out
}
TRAINING, SAMPLING, PREPARING = ("order", "noise", "kernels"), ("noise", "kernels"), ("order",)
OF_0_1_0 = {"order": 1, "noise": 1, "kernels": 1, "format": 2}


def check_readable(found: dict[str, Any] | None, where: str) -> None:
    """Whether this release can read a file: it reads every older layout.

    Raises:
        InputError: a later release wrote it.
    """
    its = (found or OF_0_1_0)["format"]
    if its > VERSIONS["format"]:
        raise InputError(
            f"{where}: written by a later release of ray-ddpm (format {its}, this one reads up to {VERSIONS['format']}): "
            "upgrade"
        )


def check_same(found: dict[str, Any] | None, where: str, of: tuple[str, ...] = TRAINING) -> None:
    """Whether work that was begun can go on and come out as if nothing had stopped it.

    Args:
        of: the versions that such work depends on.

    Raises:
        InputError: this release orders data, draws noise or computes otherwise than the one that began it.
    """
    check_readable(found, where)
    its = found or OF_0_1_0
    changed = [f"{name} {its[name]}, now {VERSIONS[name]}" for name in of if its[name] != VERSIONS[name]]
    if changed:
        raise InputError(
            f"{where}: begun by {its.get('release', 'ray-ddpm 0.1.0')}, which works otherwise ({'; '.join(changed)}): "
            "go on with that release, or choose another folder"
        )
