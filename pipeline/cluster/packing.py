"""Packs the working tree into a small zip for a cluster: tracked and requested files, without data and secrets.

Ray can pack a folder itself, but it follows links out of the folder, its lowest size limit is 512 MiB, and the same files
in another checkout give another package.
"""

import contextlib
import os
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pathspec import GitIgnoreSpec

from pipeline.errors import InputError
from pipeline.redact import find_secret, one_line, printable

# Files that are never sent, even if requested.
_SECRET = """
    .env* *.env *.pem *.key *.p12 *.pfx *.jks *.keystore *.kdbx *.ppk id_rsa* id_dsa* id_ed25519* id_ecdsa*
    .netrc _netrc .pgpass .my.cnf .pypirc .npmrc .yarnrc* .git-credentials .gitcookies .htpasswd .vault-token
    .s3cfg .boto .passwd-s3fs .dockercfg .dockerconfigjson token *.token .*_token auth_token
    .aws/ .azure/ gcloud/ .ssh/ .gnupg/ .kube/ .docker/ .huggingface/ kubeconfig* *.kubeconfig
    credentials *credentials*.json *credentials*.y*ml *credentials*.csv *credentials*.ini *credentials*.toml
    *service[-_]account*.json client_secret*.json application_default_credentials*
    secrets.json secrets.y*ml secrets.toml secrets.ini *[-_.]secrets.y*ml *[-_.]secret.y*ml *.secret *.secrets
    *.tfstate *.tfstate.* *.tfvars *.tfvars.json .terraform/
"""
# Files that are sent only if requested: history and environments, data and results.
_NEEDLESS = """
    .git .venv/ venv/ __pycache__/ .*_cache/ *.egg-info/ node_modules/
    mlruns/ mlartifacts/ *.db *.sqlite* *.parquet *.arrow *.tar *.tgz *.gz *.zip *.npy *.npz *.h5
    *.safetensors *.pt *.pth *.ckpt *.pkl *.png *.jpg *.jpeg *.webp *.gif *.bmp *.tif *.tiff
"""
# Every file gets the same date. So equal trees give equal zips, which Ray uploads once.
_DATE = (1980, 1, 1, 0, 0, 0)


def pack(
    root: Path, target: Path, max_megabytes: int, base: Path | None = None, include: Sequence[str] = ()
) -> int:
    """Zips a tree and returns the number of files.

    Args:
        max_megabytes: size limit of all files together, before compression.
        base: folder to which names in the zip are relative; None = `root`.
        include: patterns of files to send beside the tracked ones.

    Raises:
        InputError: the files are larger than `max_megabytes` together, a file holds a secret, or as `tree_files`.
    """
    files = tree_files(root, include)
    sizes = {path: path.stat().st_size for path in files}
    if sum(sizes.values()) > max_megabytes * 10**6:
        tops: Counter[str] = Counter()
        for path, size in sizes.items():
            tops[path.relative_to(root).parts[0]] += size
        largest = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in tops.most_common(3))
        raise InputError(
            f"{root} is {sum(sizes.values()) / 1e6:.1f} MB, more than --max-megabytes {max_megabytes}: {largest}; "
            "name files that jobs don't need in .rayignore"
        )
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            content, name = path.read_bytes(), path.relative_to(base or root).as_posix()
            if what := find_secret(content.decode("utf-8", "replace")):
                raise InputError(f"{printable(name)} holds {what} and would be sent: name it in .rayignore")
            info = zipfile.ZipInfo(name, _DATE)
            info.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return len(files)


def tree_files(root: Path, include: Sequence[str] = ()) -> list[Path]:
    """The files to send, sorted: tracked files that .rayignore does not exclude, and the files that `include` names.

    Outside of a git repository, all files that .gitignore and .rayignore do not exclude. Links are not followed.

    Raises:
        InputError: a pattern in `include` matches no file, or only files that are never sent.
    """
    never = GitIgnoreSpec.from_lines([*_SECRET.split(), *_NEEDLESS.split()])
    allowed, listed = _others_than(never, root), _listed(root)
    if listed is None:
        rules = [(root, _rules(root / ".git" / "info" / "exclude"))]
        found = tracked = set(_walk(root, rules, (".gitignore", ".rayignore"), allowed))
    else:
        tracked, others = listed
        known = {place for path in tracked | others for place in (path, *path.parents)}

        def wanted(slash: str, path: Path) -> bool:
            return path in known and allowed(slash, path)

        found = set(_walk(root, [], (".rayignore",), wanted))
    sent = (found & tracked).union(*(_included(root, pattern) for pattern in include))
    secret = GitIgnoreSpec.from_lines(_SECRET.split())
    _say_left(root, found - sent, "git does not track them: git add, or --include")
    _say_left(root, {path for path in tracked if secret.match_file(_name(path, root))}, "named like secrets")
    return sorted(sent)


def _say_left(root: Path, files: set[Path], why: str) -> None:
    if files:
        names = sorted(_name(path, root) for path in files)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        print(f"not sent: {printable(', '.join(names[:5]))}{more} ({why})", file=sys.stderr)


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _others_than(never: GitIgnoreSpec, root: Path) -> Callable[[str, Path], bool]:
    return lambda slash, path: not never.match_file(_name(path, root) + slash)


def _included(root: Path, pattern: str) -> set[Path]:
    """The files that match one --include."""
    if not pattern or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise InputError(f"--include {pattern}: give a path or a pattern below {root}")
    found = set(root.glob(pattern))
    allowed = _others_than(GitIgnoreSpec.from_lines(_SECRET.split()), root)
    files = {path for path in found if path.is_file() and not path.is_symlink() and allowed("", path)}
    for folder in (path for path in found if path.is_dir() and not path.is_symlink()):
        files |= set(_walk(folder, [], (), allowed))
    if not files:
        why = "files with such names hold secrets and are never sent" if found else f"no such file in {root}"
        raise InputError(f"--include {pattern}: {why}")
    return files


def _listed(root: Path) -> tuple[set[Path], set[Path]] | None:
    """The files that git tracks, and those that it neither tracks nor ignores; None if git can't list the tree."""
    if not (root / ".git").exists():
        return None
    # In a git hook, variables may point to another tree.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def ask(*flags: str) -> set[Path]:
        command = ["git", "-C", str(root), "ls-files", "-z", *flags]
        listed = subprocess.run(command, capture_output=True, check=True, env=environment).stdout
        return {root / os.fsdecode(name) for name in listed.split(b"\0") if name}

    try:
        return ask(), ask("--others", "--exclude-standard")
    except FileNotFoundError:
        return None
    except subprocess.CalledProcessError as error:
        reason = one_line(error.stderr.decode(errors="replace"))
        print(
            f"git can't list {root} ({reason}): all files that .gitignore does not name are sent",
            file=sys.stderr,
        )
        return None


def _walk(
    folder: Path,
    rules: list[tuple[Path, GitIgnoreSpec]],
    names: Sequence[str],
    wanted: Callable[[str, Path], bool],
) -> Iterator[Path]:
    """Yields the wanted files below a folder that no rule excludes. The last rule of the deepest folder decides.

    Args:
        rules: the rules of the folders above, each with its folder.
        names: names of the files that hold rules.
        wanted: called with "/" for a folder, else "", and the path; returns False to skip it.
    """
    rules = [*rules, (folder, _rules(*(folder / name for name in names)))]
    for path in sorted(folder.iterdir()):
        slash = "/" if path.is_dir() else ""
        if path.is_symlink() or not wanted(slash, path):
            continue
        said = (
            spec.check_file(path.relative_to(base).as_posix() + slash).include
            for base, spec in reversed(rules)
        )
        if next((excluded for excluded in said if excluded is not None), False):
            continue
        if slash:
            yield from _walk(path, rules, names, wanted)
        elif path.is_file():
            yield path


def _rules(*files: Path) -> GitIgnoreSpec:
    """The patterns in ignore files. Missing files and invalid lines are skipped, as git does."""
    lines = list[str]()
    for file in files:
        for line in file.read_text(errors="surrogateescape").splitlines() if file.is_file() else ():
            with contextlib.suppress(ValueError):
                GitIgnoreSpec.from_lines([line])
                lines.append(line)
    return GitIgnoreSpec.from_lines(lines)
