"""Control characters in class names are kept in the data and escaped wherever they are shown."""

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.cluster.pool import in_process
from pipeline.commands import prepare as prepare_job
from pipeline.data import shards
from pipeline.data.index import open_splits
from pipeline.data.labels import class_text
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.errors import InputError
from pipeline.redact import one_line, printable
from tests.data.common import encoded, tar_bytes
from tests.data.reading import listed, put
from tests.data.tables import class_label, features, structs, write

IMAGES = encoded(8)
ODD = ("new\nline", "tab\there", "red\x1b[31m", "next\x85line", "ls\u2028ps", "del\x7f", "bell\a")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ActorPool", lambda *_, **__: in_process)


def is_shown_in_one_line(text: str) -> bool:
    return text.isprintable() and len(text.splitlines()) == 1


def texts_in_parquet(root: Path, name: str) -> None:
    write(root / "a.parquet", {"image": structs(images=IMAGES), "label": [name, "plain"] * 4})


def features_in_parquet(root: Path, name: str) -> None:
    columns = {"image": structs(images=IMAGES), "label": [0, 1] * 4}
    write(root / "a.parquet", columns, features(label=class_label(name, "plain")))


def tars(root: Path, name: str) -> None:
    put(root, "a.tar", data=tar_bytes(IMAGES, names=(name, "plain", "plain")))


def metadata(root: Path, name: str) -> None:
    text = io.StringIO()
    table = csv.writer(text)
    table.writerows([["file_name", "label"], *([f"{i}.png", name if i % 2 else "plain"] for i in range(8))])
    put(root, "metadata.csv", data=text.getvalue().encode())
    for i, data in enumerate(IMAGES):
        put(root, f"{i}.png", data=data)


def json_lines(root: Path, name: str) -> None:
    rows = [{"file_name": f"{i}.png", "label": name if i % 2 else "plain"} for i in range(8)]
    put(root, "metadata.jsonl", data="\n".join(map(json.dumps, rows)).encode())
    for i, data in enumerate(IMAGES):
        put(root, f"{i}.png", data=data)


@pytest.mark.parametrize("name", ODD, ids=ascii)
@pytest.mark.parametrize("make", [texts_in_parquet, features_in_parquet, tars, metadata, json_lines])
def test_names_are_kept_as_data_and_escaped_when_printed(
    make: Callable[[Path, str], None], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", name)
    put(tmp_path / "in", "no\nimage\x1b.txt", data=b"x")
    prepare(PrepareConfig(str(tmp_path / "out"), input=str(tmp_path / "in"), image_size=12))
    raw = open_splits(str(tmp_path / "in"), 12)
    prepared = open_splits(str(tmp_path / "out"))
    for splits in (raw, prepared):
        assert {index.image.classes for index in splits.indexes.values()} == {
            tuple(sorted([name, "plain"]))
        } or (make is features_in_parquet)
        assert all(name in index.image.classes for index in splits.indexes.values())
    lines = [line for line in capsys.readouterr().err.split("\n") if " is " in line]
    assert len(lines) == 2 and all(map(is_shown_in_one_line, lines))
    assert all(printable(name) in line for line in lines)
    for file in ("ignored.jsonl", "quarantine.jsonl", "README.md"):
        text = (tmp_path / "out" / file).read_text()
        assert all(line.isprintable() for line in text.split("\n")), file


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_names_of_columns_are_escaped_in_reasons(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "in", "metadata.jsonl", data=json.dumps({name: 1}).encode())
    put(tmp_path / "in", "1.png", data=IMAGES[0])
    prepare(PrepareConfig(str(tmp_path / "out"), input=str(tmp_path / "in"), image_size=12))
    assert listed(tmp_path / "out", "ignored.jsonl") == {
        "metadata.jsonl": f"has no column file_name; it has {printable(name)}"
    }
    (line,) = [line for line in capsys.readouterr().err.split("\n") if " is " in line]
    assert is_shown_in_one_line(line)


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_reasons_in_lists_are_one_line(name: str, tmp_path: Path) -> None:
    for some in ([["a", name]], [name, name]):
        assert is_shown_in_one_line(class_text(some)[1])
    labels = [["plain"]] * 7 + [[name, "plain"]]
    write(tmp_path / "in" / "a.parquet", {"image": structs(images=IMAGES), "label": pa.array(labels)})
    output = tmp_path / "out"
    prepare(PrepareConfig(str(output), input=str(tmp_path / "in"), image_size=12, max_bad_fraction=0.5))
    (line,) = (output / "quarantine.jsonl").read_text().removesuffix("\n").split("\n")
    assert is_shown_in_one_line(line) and printable(name) in json.loads(line)["reason"]
    with pytest.raises(InputError) as error:
        prepare(PrepareConfig(f"{output}2", input=str(tmp_path / "in"), image_size=12))
    assert is_shown_in_one_line(str(error.value))


@pytest.mark.parametrize("name", [*ODD, os.fsdecode(b"caf\xe9"), "half\ud800"], ids=ascii)
def test_any_text_becomes_one_printable_line(name: str) -> None:
    for shown in (printable(name), one_line(name), one_line(ValueError(name))):
        assert is_shown_in_one_line(shown) and shown == printable(shown) and shown.encode()


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_an_error_is_printed_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_job.main([f"--{name}"]) == 2
    assert is_shown_in_one_line(capsys.readouterr().err.removesuffix("\n"))
