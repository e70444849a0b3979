"""Labels in tars: each image gets its own label wherever that lies. A label that can't be read is reported."""

import codecs
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.reading import opened
from tests.data.tar_files import IMAGES, A, B, C, Members, labels, read, tar_of


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("s.input.jpg", A), ("s.cls", b"1")], ["1"]),
        ([("photo.2020.01.jpg", A), ("photo.2020.02.jpg", B)], [None, None]),
        ([("photo.2020.01.jpg", A), ("photo.2020.02.jpg", B), ("photo.2020.02.cls", b"5")], [None, "5"]),
        ([("a.b.c.png", A), ("a.cls", b"1"), ("a.b.cls", b"2")], ["2"]),
        ([("a.b.c.png", A), ("a.b.json", b'{"label": 2}'), ("a.b.c.cls", b"3"), ("a.cls", b"1")], ["3"]),
        ([("a.b.png", A), ("a.b.json", b"{}"), ("a.cls", b"1")], ["1"]),
        ([("a.png", A), ("a.png.cls", b"4")], ["4"]),
        ([("a.png", A), ("a.b.cls", b"4")], [None]),
        ([("ab.png", A), ("a.cls", b"4")], [None]),
        ([("v1.0/x.png", A), ("v1.cls", b"4"), ("v1.0/x.cls", b"1")], ["1"]),
        ([("v1.0/x.png", A), ("v1.cls", b"4")], [None]),
        ([("one/a.png", A), ("two/a.png", B), ("two/a.cls", b"1")], [None, "1"]),
        ([("./a.png", A), ("a.cls", b"1")], ["1"]),
        ([("IMG.PNG", A), ("IMG.CLS", b"1")], ["1"]),
        ([("noend", A), ("noend.cls", b"1")], ["1"]),
        ([("img.0001", A), ("img.0001.cls", b"1"), ("img.0002", B), ("img.0002.cls", b"2")], ["1", "2"]),
        ([("s.left.png", A), ("s.right.png", B), ("s.cls", b"2")], ["2", "2"]),
        ([("s.png", A), ("s.jpg", B), ("s.cls", b"2")], ["2", "2"]),
        ([("s.png", A), ("s.png", B), ("s.cls", b"2")], ["2", "2"]),
        ([("s.png", A), ("s.cls", b"2"), ("s.png", B), ("s.cls", b"3")], ["2", "3"]),
        ([("s.png", A), ("s.png", B), ("s.cls", b"2"), ("s.cls", b"2"), ("s.cls", b"2")], ["2", "2"]),
    ],
)  # fmt: skip
def test_which_label_belongs_to_an_image(
    tmp_path: Path, members: Members, expected: list[str | None]
) -> None:
    assert labels(tmp_path, members) == expected
    assert [item.data for item in read(tmp_path, members)] == [A, B][: len(expected)]


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False))
def test_labels_may_lie_anywhere(tmp_path_factory: pytest.TempPathFactory, chance: random.Random) -> None:
    members = [(f"{i:02d}.png", data) for i, data in enumerate(IMAGES)]
    members += [(f"{i:02d}.cls", str(i % 7).encode()) for i in range(0, 40, 2)]
    members += [(f"{i:02d}.json", json.dumps({"label": i % 7}).encode()) for i in range(1, 40, 2)]
    chance.shuffle(members)
    items = read(tmp_path_factory.mktemp("tar"), members)
    assert [item.path for item in items] == [f"a.tar/{name}" for name, _ in members if name.endswith(".png")]
    assert {item.data: item.label for item in items} == {data: str(i % 7) for i, data in enumerate(IMAGES)}


@pytest.mark.parametrize(
    ("suffix", "content", "expected"),
    [
        ("cls", b"007", "007"), ("cls", b" 3\n", "3"), ("cls", b"great cat\r\n", "great cat"), ("cls", b"", None),
        ("cls", b" \n", None), ("cls", b"-1", None), ("cls", b"-1\n", None), ("cls", codecs.BOM_UTF8 + b"3", "3"),
        ("cls", "3\r\n".encode("utf-16"), "3"), ("cls", "Köter".encode(), "Köter"), ("cls", b"K\xf6ter", r"K\xf6ter"),
        ("json", b'{"label": 7}', "7"), ("json", b'{"label": "cat"}', "cat"), ("json", b'{"label": null}', None),
        ("json", b'{"caption": "x"}', None), ("json", b"[1, 2]", None), ("json", b'"x"', None), ("json", b"3", None),
        ("json", b'{"label": -1}', None), ("json", b'{"label": NaN}', None), ("json", b'{"label": 2.0}', "2"),
        ("json", b'{"label": true}', "1"), ("json", b'{"class": "owl"}', "owl"), ("json", b'{"cls": 4}', "4"),
        ("json", b'{"label": null, "class": "owl"}', "owl"), ("json", b'{"label": 0, "class": "owl"}', "0"),
        ("json", b'{"label": ""}', None), ("json", b'{"label": [5]}', "5"), ("json", b'{"label": []}', None),
        ("json", '{"label": "cat"}'.encode("utf-16"), "cat"), ("json", codecs.BOM_UTF8 + b'{"label": 1}', "1"),
        ("json", b'{"label": "\\ud83d"}', r"\ud83d"),
    ],
)  # fmt: skip
def test_what_labels_say(tmp_path: Path, suffix: str, content: bytes, expected: str | None) -> None:
    assert labels(tmp_path, [("x.png", A), (f"x.{suffix}", content)]) == [expected]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"label": 1', "0.json: not JSON"),
        (b"", "0.json: not JSON"),
        (b"{'label': 1}", "0.json: not JSON"),
        (b"\xff\xfe\xfd", "0.json: not JSON"),
        (b"[" * 100_000, "0.json: not JSON"),
        (b'{"label": [0, 1]}', "0.json: label [0, 1] names 2 classes"),
        (b'{"label": 1.5}', "0.json: label 1.5 is not a class number"),
        (b'{"label": 1e999}', "0.json: label inf is not a class number"),
    ],
)
def test_an_image_whose_label_cannot_be_read_is_not_used_beside_others(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    members = [("0.png", A), ("0.json", content), ("1.png", B), ("1.json", b'{"label": 1}'), ("2.png", C)]
    items = read(tmp_path, members)
    assert [(i.data, i.label) for i in items] == [(b"", None), (B, "1"), (C, None)]
    assert items[0].reason == f"its label can't be read: {reason}"
    # Another member may hold the label. If the other images' .json holds no label, one that is not JSON doesn't either.
    assert labels(tmp_path, [*members, ("0.cls", b"3")]) == ["3", "1", None]
    items = read(tmp_path, [*members[:3], ("1.json", b'{"caption": "x"}'), ("2.png", C)])
    assert [item.label for item in items] == [None] * 3
    assert [bool(item.reason) for item in items] == ["not JSON" not in reason, False, False]


def test_labels_are_left_alone_if_none_are_wanted(tmp_path: Path) -> None:
    members = [("0.png", A), ("0.cls", b"1"), ("1.png", B), ("1.json", b'{"label": [0, 1]}')]
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    found, items = opened(tmp_path, label_column="none")
    assert [(item.label, item.reason) for item in items] == [(None, "")] * 2
    (part,) = found.listing.parts
    assert [item.label for small in part.cut(1) for item in small.read()] == [None] * 2


def test_labels_that_contradict_each_other(tmp_path: Path) -> None:
    items = read(tmp_path, [("s.png", A), ("s.cls", b"2"), ("s.cls", b"3"), ("t.png", B), ("t.cls", b"3")])
    assert [item.label for item in items] == [None, "3"]
    assert "s.cls: occurs more than once, with different labels" in items[0].reason
