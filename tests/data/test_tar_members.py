"""Members of tars with any name and of any kind: every image is used, or listed with the reason."""

import pickle
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.data.common import encode, picture
from tests.data.tar_files import IMAGES, A, B, C, labels, read, special, tar_of


def test_links_lead_to_what_is_in_the_tar(tmp_path: Path) -> None:
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    members: list[tuple[str, bytes] | tarfile.TarInfo] = [
        special("early.png", soft, "data/a.png"),
        ("data/a.png", A), ("b.png", B), (".hidden/c", C), ("label.cls", b"cat"),
        special("hard.png", hard, "data/a.png"), special("hard.cls", hard, "label.cls"),
        special("data/up.png", soft, "../b.png"), special("data/up.cls", soft, "../label.cls"),
        special("twice.png", soft, "hard.png"), special("c.png", soft, ".hidden/c"), special("d", hard, "./b.png"),
        special("folder", soft, "data"), special("caption.txt", soft, "nowhere"),
    ]  # fmt: skip
    found = {item.path: (item.data, item.label) for item in read(tmp_path, members)}
    assert found == {
        "a.tar/early.png": (A, None), "a.tar/data/a.png": (A, None), "a.tar/b.png": (B, None),
        "a.tar/hard.png": (A, "cat"), "a.tar/data/up.png": (B, "cat"), "a.tar/twice.png": (A, None),
        "a.tar/c.png": (C, None), "a.tar/d": (B, None),
    }  # fmt: skip


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(C)
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    targets = {
        "a.png": str(secret),
        "b.png": "../secret.png",
        "c": "nothing",
        "d.png": "e.png",
        "e.png": "d.png",
    }
    for kind in (hard, soft):
        members = [special(name, kind, target) for name, target in targets.items()]
        items = read(
            tmp_path, [*members, special("good.cls", kind, "nothing"), ("good.png", A), ("x.png", B)]
        )
        assert [item.data for item in items] == [b""] * 6 + [B]
        reasons = {item.path[6:]: item.reason for item in items if item.reason}
        for name in "abc":
            assert any("which is not in the tar" in r for n, r in reasons.items() if n[0] == name)
        assert reasons["d.png"] == reasons["e.png"] == "a link that leads to itself"
        assert "its label can't be read: good.cls: a link to nothing" in reasons["good.png"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_of_all_kinds(tmp_path: Path, format: int) -> None:
    names = [
        "../../up",
        "/absolute",
        "with\nnewline",
        "tab\t",
        "two  spaces",
        "back\\slash",
        "a (2)",
        "folder/./x/../y",
    ]
    names += ["l/" * 60 + "x" * 90]
    names += ["x" * 3000, "日本", "x" * 90 + "日本" * 20] if format != tarfile.USTAR_FORMAT else ["日本"]
    members = [(f"{name}.png", data) for name, data in zip(names, IMAGES, strict=False)]
    members += [(f"{name}.cls", str(i).encode()) for i, name in enumerate(names)]
    before = sorted(tmp_path.parent.iterdir())
    assert labels(tmp_path, members, format=format) == [str(i) for i in range(len(names))]
    items = read(tmp_path, members, format=format)
    assert [item.data for item in items] == IMAGES[: len(names)]
    assert [i.path for i in items[:3]] == [
        "a.tar/_/_/up.png",
        "a.tar/absolute.png",
        r"a.tar/with\nnewline.png",
    ]
    assert sorted(tmp_path.parent.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("encoding", ["latin-1", "shift-jis", "koi8-r"])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_names_that_are_no_utf_8(tmp_path: Path, encoding: str, format: int) -> None:
    name = {"latin-1": "Köter", "shift-jis": "日本", "koi8-r": "кот"}[encoding]
    members = [(f"{name}.png", A), (f"{name}.cls", b"1"), (f"{name * 40}.png", B)][
        : 2 + (format == tarfile.GNU_FORMAT)
    ]
    items = read(tmp_path, members, format=format, encoding=encoding)
    assert [(item.data, item.label) for item in items] == [(A, "1"), (B, None)][: len(items)]
    assert items[0].path.startswith("a.tar/") and "\\x" in items[0].path and items[0].path.endswith(".png")


def test_a_name_that_is_there_twice(tmp_path: Path) -> None:
    items = read(tmp_path, [("a.png", A), ("a.png", B), ("a.png (2)", C), ("a.png", C), ("./a.png", A)])
    assert [item.data for item in items] == [A, B, C, C, A]
    assert [i.path[6:] for i in items] == ["a.png", "a.png (2)", "a.png (2) (2)", "a.png (3)", "./a.png"]
    two = tar_of([("0.png", A), ("0.cls", b"1")]) + tar_of([("0.png", B), ("0.cls", b"2")])
    assert [(item.data, item.label) for item in read(tmp_path, two)] == [(A, "1"), (B, "2")]


@pytest.mark.skipif("GNU" not in subprocess.getoutput("tar --version"), reason="needs GNU tar")
@pytest.mark.parametrize(
    "options", [["--format=gnu"], *(["--format=posix", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0"))]
)  # fmt: skip
def test_sparse_members(tmp_path: Path, options: list[str]) -> None:
    image = picture(0, 400, 400)
    image.paste((0, 0, 0), (0, 40, 400, 330))
    content = {
        "a.bmp": encode(image, "BMP"),
        "b.bmp": encode(image.rotate(90), "BMP"),
        "c.dat": A + bytes(500_000),
    }
    for name, data in content.items():
        with (tmp_path / name).open("wb") as file:
            for at in range(0, len(data), 4096):
                if data[at : at + 4096].strip(b"\0"):
                    file.seek(at)
                    file.write(data[at : at + 4096])
            file.truncate(len(data))
    (tmp_path / "b.cls").write_bytes(b"7")
    command = ["tar", "--sparse", *options, "-cf", "a.tar", *content, "b.cls"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "a.tar").stat().st_size < sum(map(len, content.values())) / 1.2
    items = read(tmp_path, (tmp_path / "a.tar").read_bytes())
    assert [item.data for item in items] == list(content.values())
    assert [item.label for item in items] == [None, "7", None]


def test_images_by_their_content(tmp_path: Path) -> None:
    jpeg, webp, avif = (encode(picture(0), kind) for kind in ("JPEG", "WEBP", "AVIF"))
    members = [
        ("a.jfif", jpeg),
        ("b.bin", webp),
        ("c", A),
        ("d.input", B),
        ("e.avif", avif),
        ("f.unknown", avif),
    ]
    others = [("g.txt", A), ("h.npy", b"\x93NUMPY"), ("i", b""), ("j.mp4", b"\0\0\0 ftypisom"), ("k.json", b"{}"),
              ("l.cls", b"1"), ("m.pkl", pickle.dumps(A)), ("n.caption", b"a cat")]  # fmt: skip
    hidden = [
        ("._a.jpg", A),
        ("__MACOSX/x/._a.jpg", A),
        (".DS_Store", b"Bud1"),
        (".git/x.png", A),
        ("x/Thumbs.db", A),
    ]
    folders = [
        special("x", tarfile.DIRTYPE),
        special("y/", tarfile.DIRTYPE),
        special("z.png", tarfile.DIRTYPE),
    ]
    items = read(tmp_path, [*folders, *members, *others, *hidden])
    assert [(item.path[6:], item.data) for item in items] == members


def test_what_is_named_as_an_image_and_is_none(tmp_path: Path) -> None:
    items = read(
        tmp_path, [("a.png", b"<html>"), ("b.heic", b"x"), ("c.jxl", b"y"), ("d.jpg", b""), ("e.png", A)]
    )
    assert [(item.data, item.reason) for item in items] == [
        (b"<html>", ""), (b"x", ""), (b"y", ""), (b"", "empty"), (A, ""),
    ]  # fmt: skip


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    kinds = {
        "pipe.png": tarfile.FIFOTYPE,
        "char": tarfile.CHRTYPE,
        "block.txt": tarfile.BLKTYPE,
        "rest.png": b"M",
    }
    hidden = special(".pipe", tarfile.FIFOTYPE)
    items = read(tmp_path, [*(special(name, kind) for name, kind in kinds.items()), hidden, ("a.png", A)])
    expected = ["a named pipe", "a device", "a device", "the rest of a file that begins in another tar", ""]
    assert [(item.path[6:], item.reason) for item in items] == list(
        zip([*kinds, "a.png"], expected, strict=True)
    )
    odd = special("odd.png", b"Q")
    odd.size = len(A)
    assert [
        item.data for item in read(tmp_path, tar_of([odd])[:512] + A.ljust(1024, b"\0") + bytes(1024))
    ] == [A]
