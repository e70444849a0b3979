"""The working tree as one small zip for a cluster: without what ignore files name, without data and secrets.

Ray can pack a folder itself, but follows links out of it, knows no limit under 512 MiB, and makes another
package of the same files in another checkout.
"""

import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pathspec import GitIgnoreSpec

from pipeline.errors import InputError
from pipeline.redact import secret_values

IGNORE_FILES = (".gitignore", ".rayignore")
# Never sent, whatever the ignore files say: history and environments, secrets, data and results.
_NEVER = """
    .git .venv/ venv/ __pycache__/ .*_cache/ *.egg-info/ node_modules/
    .env* *.env *.pem *.key *.p12 *.pfx *.jks *.kdbx id_rsa* id_ed25519* id_ecdsa* .netrc .pgpass .pypirc
    .aws/ .ssh/ .gnupg/ .kube/ .docker/ kubeconfig* credentials credentials.json *-credentials.json
    mlruns/ mlartifacts/ *.db *.sqlite* *.parquet *.arrow *.tar *.tgz *.gz *.zip *.npy *.npz *.h5
    *.safetensors *.pt *.pth *.ckpt *.pkl *.png *.jpg *.jpeg *.webp *.gif *.bmp *.tif *.tiff
"""
_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")
# One date for every file: equal trees make equal zips, which Ray uploads once.
_DATE = (1980, 1, 1, 0, 0, 0)


def pack(root: Path, target: Path, max_megabytes: int, base: Path | None = None) -> int:
    """Zips a tree; returns the number of files.

    Args:
        base: the folder that names in the zip are relative to; None = `root`.

    Raises:
        InputError: the files are larger than `max_megabytes` in all, or one of them holds a secret.
    """
    files = list(tree_files(root))
    sizes = {path: path.stat().st_size for path in files}
    if sum(sizes.values()) > max_megabytes * 10**6:
        tops: Counter[str] = Counter()
        for path, size in sizes.items():
            tops[path.relative_to(root).parts[0]] += size
        largest = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in tops.most_common(3))
        raise InputError(
            f"{root} is {sum(sizes.values()) / 1e6:.1f} MB, and at most --max-megabytes {max_megabytes} are sent: "
            f"{largest}; name what jobs don't need in .rayignore"
        )
    secrets = {name: value.encode() for name, value in secret_values().items()}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            content, name = path.read_bytes(), path.relative_to(base or root).as_posix()
            found = next((variable for variable, value in secrets.items() if value in content), None)
            if found or _PRIVATE_KEY.search(content):
                what = f"the value of {found}" if found else "a private key"
                raise InputError(f"{name} holds {what} and would be sent: name it in .rayignore")
            info = zipfile.ZipInfo(name, _DATE)
            info.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return len(files)


def tree_files(root: Path) -> Iterator[Path]:
    """The files that are sent, sorted; links are not followed. Ignore files act in their folder and below."""

    def walk(folder: Path, specs: list[tuple[Path, GitIgnoreSpec]]) -> Iterator[Path]:
        here = [
            (folder, GitIgnoreSpec.from_lines((folder / name).read_text().splitlines()))
            for name in IGNORE_FILES
            if (folder / name).is_file()
        ]
        specs = specs + here
        for path in sorted(folder.iterdir()):
            if path.is_symlink():
                continue
            slash = "/" if path.is_dir() else ""
            if any(spec.match_file(path.relative_to(base).as_posix() + slash) for base, spec in specs):
                continue
            if path.is_dir():
                yield from walk(path, specs)
            elif path.is_file():
                yield path

    yield from walk(root, [(root, GitIgnoreSpec.from_lines(_NEVER.split()))])
