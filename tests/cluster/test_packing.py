"""What of a working tree goes to a cluster: code and settings, never data or secrets, never much."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from pipeline.cluster.packing import pack, tree_files
from pipeline.errors import InputError
from tests.jobs.common import ROOT


def write(root: Path, *names: str, text: str = "x = 1\n") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def sent(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in tree_files(root)]


def test_ignore_files_act_where_they_lie_and_below(tmp_path: Path) -> None:
    write(tmp_path, "a.py", "b.log", "sub/c.py", "sub/d.txt", "sub/deep/d.txt", "e.txt", "keep/build/f.py")
    write(tmp_path, ".gitignore", text="*.log\n/build/\n")
    write(tmp_path, "sub/.rayignore", text="d.txt\n")
    assert sent(tmp_path) == [".gitignore", "a.py", "e.txt", "keep/build/f.py", "sub/.rayignore", "sub/c.py"]


def test_ignored_files_are_those_that_git_ignores(tmp_path: Path) -> None:
    write(tmp_path, "a.py", "build/x.py", "sub/build/y.py", "sub/z.tmp", "keep.tmp", "only/here/w.py")
    write(tmp_path, ".gitignore", text="build/\n*.tmp\n!keep.tmp\n/only/*\n")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    listed = subprocess.run(
        ["git", "-C", tmp_path, "ls-files", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert sent(tmp_path) == sorted(listed.splitlines())


SECRETS = (
    ".env", ".env.production", "prod.env", "tls.key", "ca.pem", "id_rsa", ".netrc", ".aws/credentials",
    "deploy/.kube/config", "kubeconfig.yaml", "team-credentials.json",
)  # fmt: skip
DATA = (
    "run/weights.safetensors", "shards/0.parquet", "x.tar", "images/1.png", "t10k-images-idx3-ubyte.gz", "mlflow.db",
    "mlruns/0/meta.yaml", "state.pt", "moments.npz",
)  # fmt: skip


def test_secrets_and_data_stay_whatever_the_ignore_files_say(tmp_path: Path) -> None:
    write(tmp_path, "jobs/train.py", "betas.json", *SECRETS, *DATA, ".git/config", ".venv/lib/a.py")
    write(tmp_path, ".gitignore", text="".join(f"!{name}\n" for name in (*SECRETS, *DATA)))
    assert sent(tmp_path) == [".gitignore", "betas.json", "jobs/train.py"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "outside", "passwords.txt")
    write(tmp_path / "tree", "a.py")
    (tmp_path / "tree/data").symlink_to(tmp_path / "outside")
    (tmp_path / "tree/loop").symlink_to(tmp_path / "tree")
    assert sent(tmp_path / "tree") == ["a.py"]


def test_a_tree_that_is_too_large_is_refused_and_what_is_large_named(tmp_path: Path) -> None:
    write(tmp_path, "a.py", "small/b.txt")
    write(tmp_path, "huge/c.csv", text="0" * 1_500_000)
    with pytest.raises(InputError, match=r"1\.5 MB.*--max-megabytes 1 .*huge \(1\.5 MB\).*\.rayignore"):
        pack(tmp_path, tmp_path / "t.zip", 1)
    assert not (tmp_path / "t.zip").exists()
    assert pack(tmp_path, tmp_path / "t.zip", 2) == 3


def test_a_secret_inside_a_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted/secret+value")
    write(tmp_path, "notes.txt", text="the key is planted/secret+value\n")
    with pytest.raises(InputError, match=r"notes\.txt holds the value of AWS_SECRET_ACCESS_KEY") as caught:
        pack(tmp_path, tmp_path / "t.zip", 1)
    assert "planted" not in str(caught.value)
    write(tmp_path, "notes.txt", text="-----BEGIN EC PRIVATE KEY-----\n")
    with pytest.raises(InputError, match=r"notes\.txt holds a private key"):
        pack(tmp_path, tmp_path / "t.zip", 1)


def test_equal_trees_make_equal_packages(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, "b.py", "a/c.py")
    os.utime(tmp_path / "two/b.py", (0, 0))
    packages = []
    for name in ("one", "two"):
        pack(tmp_path / name, tmp_path / f"{name}.zip", 1)
        packages.append((tmp_path / f"{name}.zip").read_bytes())
    assert packages[0] == packages[1]


def test_this_tree_goes_without_tests_and_with_every_job(tmp_path: Path) -> None:
    pack(ROOT, tmp_path / "t.zip", 20)
    names = zipfile.ZipFile(tmp_path / "t.zip").namelist()
    assert {f"jobs/{job}.py" for job in ("prepare", "train", "tune", "generate", "evaluate")} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "docs/", ".git/", ".venv/", "k8s/"))]
