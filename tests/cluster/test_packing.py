"""A job's package holds the working tree's code and settings, never data or secrets, and is never large."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from pipeline.cluster.packing import pack, tree_files
from pipeline.errors import InputError
from pipeline.redact import redact
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


def git(root: Path, *words: str) -> list[str]:
    """Return the sorted lines that git prints."""
    done = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True)
    return sorted(done.stdout.splitlines())


def test_what_git_tracks_is_sent_as_it_is_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "a.py", "gone.py", "b c/\u00fc.py", "docs/d.md", "no/tracked.log", "x.npz")
    write(tmp_path, ".gitignore", text="no/\n")
    write(tmp_path, ".rayignore", text="/docs/\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "add", "--force", "no/tracked.log")
    (tmp_path / "gone.py").unlink()
    write(tmp_path, "untracked.py", "docs/untracked.md", "no/ignored.py", "prod.env")
    assert sent(tmp_path) == [".gitignore", ".rayignore", "a.py", "b c/\u00fc.py", "no/tracked.log"]
    told = capsys.readouterr().err
    assert told == "not sent: untracked.py (git does not track them: git add, or --include)\n"


def test_what_is_asked_for_is_sent_too_but_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "a.py", "new.py", "stats.npz", "sub/deep/b.npz", "sub/.env", "prod.env", "gone")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "a.py", "prod.env")
    asked = [p.relative_to(tmp_path).as_posix() for p in tree_files(tmp_path, ("new.py", "*.npz", "sub"))]
    assert asked == ["a.py", "new.py", "stats.npz", "sub/deep/b.npz"]
    told = capsys.readouterr().err
    assert "not sent: gone (git does" in told and "not sent: prod.env (named like secrets)" in told
    for pattern, complaint in (
        ("prod.env", "never sent"), ("no/*", "no such file"), ("/etc/passwd", "below"), ("", "below"), ("../*", "below")
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"^--include {pattern.replace('*', '.')}.*{complaint}"):
            tree_files(tmp_path, (pattern,))


@pytest.mark.parametrize("has_git", [False, True])
def test_ignored_files_are_those_that_git_ignores(
    has_git: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path,
        "a.py",
        "build/x.py",
        "sub/build/y.py",
        "sub/z.tmp",
        "keep.tmp",
        "only/here/w.py",
        "e/f.x",
        "f.x",
    )
    write(tmp_path, "sub/k.tmp", "sub/deep/k.tmp", "sub/deep/l.log", "m.log", "logs/n.py", "logs/p/o.py")
    write(tmp_path, ".gitignore", text="build/\n*.tmp\n!keep.tmp\n/only/*\n*.log\nlogs/*\n!logs/p/\n!\n[\n")
    write(tmp_path, "sub/.gitignore", text="!*.tmp\nz.tmp\n")
    write(tmp_path, "sub/deep/.gitignore", text="!l.log\n")
    git(tmp_path, "init", "-q")
    write(tmp_path, ".git/info/exclude", text="*.x\n!e/*.x\n")
    listed = git(tmp_path, "ls-files", "--others", "--exclude-standard")
    assert {"sub/k.tmp", "sub/deep/l.log", "e/f.x", "logs/p/o.py"} < set(listed)
    if has_git:
        git(tmp_path, "add", ".")
    else:
        monkeypatch.setenv("PATH", "")
    assert sent(tmp_path) == listed


def test_a_tree_that_git_refuses_to_list_is_sent_by_its_ignore_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "a.py", "b.log")
    write(tmp_path, ".gitignore", text="*.log\n")
    write(tmp_path, ".git", text="gitdir: nowhere\n")
    assert sent(tmp_path) == [".gitignore", "a.py"]
    assert capsys.readouterr().err.startswith(f"git can't list {tmp_path} (fatal: ")


SECRETS = (
    ".env", ".env.production", "prod.env", "tls.key", "ca.pem", "id_rsa", ".netrc", ".aws/credentials",
    "deploy/.kube/config", "kubeconfig.yaml", "team-credentials.json", ".git-credentials", ".npmrc", ".s3cfg",
    "infra/terraform.tfstate", "infra/terraform.tfstate.backup", "prod.tfvars", "secrets.yaml", "app-secrets.yml",
    "token", "hub.token", ".hf_token", "dev.kubeconfig", ".config/gcloud/x.json", "my-service-account.json",
    ".dockerconfigjson", ".boto", "app.keystore",
)  # fmt: skip
DATA = (
    "run/weights.safetensors", "shards/0.parquet", "x.tar", "images/1.png", "t10k-images-idx3-ubyte.gz", "mlflow.db",
    "mlruns/0/meta.yaml", "state.pt", "moments.npz",
)  # fmt: skip


def test_secrets_and_data_stay_whatever_the_ignore_files_say(tmp_path: Path) -> None:
    write(tmp_path, "jobs/train.py", "betas.json", "secrets.py", "tokens.json", "token.py", "credentials.py")
    write(tmp_path, *SECRETS, *DATA, ".git/config", ".venv/lib/a.py")
    write(tmp_path, ".gitignore", text="".join(f"!{name}\n" for name in (*SECRETS, *DATA)))
    code = ["credentials.py", "jobs/train.py", "secrets.py", "token.py", "tokens.json"]
    assert sent(tmp_path) == [".gitignore", "betas.json", *code]


def test_links_are_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "outside", "passwords.txt")
    write(tmp_path / "tree", "a.py")
    (tmp_path / "tree/data").symlink_to(tmp_path / "outside")
    (tmp_path / "tree/loop").symlink_to(tmp_path / "tree")
    assert sent(tmp_path / "tree") == ["a.py"]


def test_a_tree_that_is_too_large_is_refused_and_what_is_large_named(tmp_path: Path) -> None:
    write(tmp_path, "a.py", "small/b.txt")
    write(tmp_path, "huge/c.csv", text="0" * 1_500_000)
    with pytest.raises(InputError, match=r"1\.5 MB.*--max-megabytes 1: huge \(1\.5 MB\).*\.rayignore"):
        pack(tmp_path, tmp_path / "t.zip", 1)
    assert not (tmp_path / "t.zip").exists()
    assert pack(tmp_path, tmp_path / "t.zip", 2) == 3


def test_a_secret_inside_a_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted/secret+value")
    write(tmp_path, "notes.txt", text="the key is planted/secret+value\n")
    with pytest.raises(InputError, match=r"notes\.txt holds the value of AWS_SECRET_ACCESS_KEY") as caught:
        pack(tmp_path, tmp_path / "t.zip", 1)
    assert "planted" not in str(caught.value)


# Each secret stands in two halves, so that no scanner reports this file.
SHAPES = {
    "a private key": ("-----BEGIN EC PRIVATE", " KEY-----"),
    "an AWS key": ("AKIA", "IOSFODNN7EXAMPLE"),
    "an Azure key": ("AccountKey", "=" + "aB3+" * 21 + "aA=="),
    "an Azure secret": ("key = 'abc8", "Q~" + "x.Y_" * 8 + "'"),
    "an Azure signature": ("https://a.blob.core.windows.net/b?sig", "=" + "aB3%" * 11),
    "a Google key": ("AI", "za" + "Sy_-b" * 7),
    "a Hugging Face token": ("hf", "_" + "abcdeFGHIJ" * 3 + "abcd"),
    "a GitHub token": ("ghp", "_" + "a1B2" * 9),
    "a GitLab token": ("glpat", "-" + "a1B2" * 5),
    "an npm token": ("npm", "_" + "a1B2" * 9),
    "a Slack token": ("xoxb", "-1234567890-abcdef"),
    "a signed token": ("eyJhbGciOiJ", "IUzI1.eyJzdWIiOiIxMjM0.SflKxwRJSMeKKF2QT4"),
    "a password in an address": ("redis://:", "pl4nted-in-here@redis:6379/0"),
}


@pytest.mark.parametrize("what", SHAPES)
def test_a_secret_is_known_by_its_shape(what: str, tmp_path: Path) -> None:
    secret = "".join(SHAPES[what])
    write(tmp_path, "sub/notes.txt", text=f"x = 1\nthe key is {secret}\n")
    with pytest.raises(InputError, match=rf"sub/notes\.txt holds {what} and would be sent") as caught:
        pack(tmp_path, tmp_path / "t.zip", 1)
    assert secret not in str(caught.value)
    assert secret not in redact(f"no: {secret}")


def test_what_only_looks_like_a_secret_is_sent(tmp_path: Path) -> None:
    harmless = (
        "postgresql://mlflow:$(POSTGRES_PASSWORD)@db", "https://USER:PASSWORD@host", "s3://me:{password}@b/x",
        "redis://:<your password>@host", "postgres://postgres:postgres@localhost", "ghp_short", "AKIA", "sig=1",
        "hf://datasets/a/b", "BEGIN PUBLIC KEY", "token = get_token()", "see http://host:8265 (10:30)",
    )  # fmt: skip
    write(tmp_path, "notes.txt", text="\n".join(harmless))
    assert pack(tmp_path, tmp_path / "t.zip", 1) == 1


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
