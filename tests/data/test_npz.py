"""NumPy's .npz files: image and label arrays, order of axes, refusals."""

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import storage
from pipeline.data.sources import records
from pipeline.data.sources.npz import is_npz
from pipeline.data.sources.parts import Request
from pipeline.data.sources.registry import open_source
from pipeline.data.sources.tree import open_tree
from pipeline.errors import InputError
from tests.data.reading import labels, opened, put, splits

RNG = np.random.default_rng(0)
SAVERS: dict[str, Callable[..., None]] = {"plain": np.savez, "compressed": np.savez_compressed}


def images(count: int = 30, *shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, *(shape or (6, 6, 3))), dtype=np.uint8)


def pixels(uri: Path | str, **request: Any) -> np.ndarray:
    return np.stack([item.data for item in opened(uri, 7, **request)[1] if isinstance(item.data, np.ndarray)])


@pytest.mark.parametrize("saver", SAVERS)
def test_guided_diffusions_samples(saver: str, tmp_path: Path) -> None:
    arr, numbers = images(), np.arange(30) % 4
    SAVERS[saver](tmp_path / "samples.npz", arr, numbers)
    found, items = opened(tmp_path, 7)
    assert found.source == "npz" and (pixels(tmp_path) == arr).all()
    assert [item.label for item in items] == [str(n) for n in numbers]
    assert (found.listing.size, found.listing.channels, found.listing.classes) == (6, 3, ("0", "1", "2", "3"))
    assert [len(list(part.read())) for part in found.listing.parts] == [7, 7, 7, 7, 2]
    assert items[8].path == "samples.npz/arr_0/000008.png" and not found.listing.ignored
    part = found.listing.parts[2]
    whole = list(part.read())
    for rows in ([6, 0, 1, 2, 0], [], [3]):
        assert [(i.path, i.label) for i in part.read(rows)] == [(whole[r].path, whole[r].label) for r in rows]
        assert all((a.data == whole[r].data).all() for a, r in zip(part.read(rows), rows, strict=True))
    assert pickle.loads(pickle.dumps(part)) == part and len(pickle.dumps(part)) < 1000


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize(
    "shape, back",
    [
        ((5, 8), lambda a: a[..., None]),
        ((5, 8, 1), lambda a: a),
        ((5, 8, 4), lambda a: a),
        ((3, 5, 8), lambda a: a.transpose(0, 2, 3, 1)),
        ((1, 5, 8), lambda a: a.transpose(0, 2, 3, 1)),
        ((3, 5, 3), lambda a: a),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_axes(
    saver: str, shape: tuple[int, ...], back: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    arr = images(10, *shape)
    SAVERS[saver](tmp_path / "a.npz", images=arr)
    found, items = opened(tmp_path, 4)
    assert (pixels(tmp_path) == back(arr)).all() and {item.label for item in items} == {None}
    assert found.listing.channels == back(arr).shape[-1] and found.listing.size == 0
    assert found.listing.classes == ()


@pytest.mark.parametrize(
    "names",
    [
        ("x_{}", "y_{}"),
        ("{}_images", "{}_labels"),
        ("X_{}", "Y_{}"),
        ("images_{}", "labels_{}"),
        ("{}_data", "{}_targets"),
    ],
)
def test_splits_in_one_file(names: tuple[str, str], tmp_path: Path) -> None:
    arrays = dict[str, np.ndarray]()
    for split, count in (("train", 12), ("val", 5), ("test", 4)):
        arrays |= {
            names[0].format(split): images(count),
            names[1].format(split): np.arange(count)[:, None] % 3,
        }
    np.savez_compressed(tmp_path / "data.npz", **arrays)
    found, items = opened(tmp_path, 4)
    assert splits(found) == {"train": 12, "validation": 5, "test": 4}
    assert Counter(item.label for item in items) == {"0": 8, "1": 7, "2": 6}
    assert not found.listing.ignored


def test_splits_in_several_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", images(9), np.zeros(9, np.int64))
    np.savez(tmp_path / "test.npz", images(4), np.ones(4, np.int64))
    assert splits(opened(tmp_path)[0]) == {"train": 9, "test": 4}
    np.savez(tmp_path / "test.npz", images=images(4), images_test=images(3), labels=np.zeros(4))
    assert splits(opened(tmp_path / "test.npz")[0]) == {"train": 4, "test": 3}


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.array(["cat", "dog", "cat"]), ["cat", "dog", "cat"]),
        (np.array([b"cat", b"dog", b"cat"]), ["cat", "dog", "cat"]),
        (np.array([2, -1, 0], np.int8), ["2", None, "0"]),
        (np.array([2.0, np.nan, 0.0]), ["2", None, "0"]),
        (np.array([True, False, True]), ["1", "0", "1"]),
        (np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], np.uint8), ["2", "0", "1"]),
        (np.eye(3), ["0", "1", "2"]),
        (np.array([[3], [1], [0]]), ["3", "1", "0"]),
    ],
    ids=str,
)
def test_what_labels_may_be(values: np.ndarray, expected: list[str | None], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=images(3), labels=values)
    assert [item.label for item in opened(tmp_path)[1]] == expected
    assert [item.label for item in opened(tmp_path, label_column="none")[1]] == [None] * 3


def test_labels_that_can_be_no_classes_cost_their_images_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=images(5), labels=[0.0, 0.5, -3.0, 2.0, np.inf])
    items = opened(tmp_path, 2)[1]
    assert [item.label for item in items if not item.reason] == ["0", "2"]
    assert [item.path[-10:] for item in items if "not a class number" in item.reason] == [
        "000001.png",
        "000002.png",
        "000004.png",
    ]


def test_arrays_can_be_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", photos=images(4), breeds=np.arange(4), other=images(4))
    with pytest.raises(InputError, match="holds no images"):
        opened(tmp_path)
    found, items = opened(tmp_path, source="npz", image_column="photos", label_column="breeds")
    assert [item.label for item in items] == ["0", "1", "2", "3"]
    assert found.listing.ignored == {"a.npz/other": "neither images nor labels"}
    with pytest.raises(InputError, match="--label-column kinds: no such array; it has photos, breeds, other"):
        opened(tmp_path, source="npz", image_column="photos", label_column="kinds")
    with pytest.raises(InputError, match="--image-column pics"):
        opened(tmp_path, source="npz", image_column="pics")


class Bomb:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path("unpickled"),)


OBJECTS = np.array([Bomb(), Bomb()], dtype=object)
REFUSED: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "float32": ({"arr_0": images(2).astype(np.float32)}, "float32 .*in which range"),
    "float64": ({"x_train": images(2) / 255}, "float64 .*in which range"),
    "float16": ({"images": images(2).astype(np.float16)}, "float16 .*in which range"),
    "int64": ({"images": images(2).astype(np.int64)}, "int64.*save it as uint8"),
    "bool": ({"images": images(2) > 7}, "bool.*save it as uint8"),
    "objects": ({"arr_0": OBJECTS}, "object.*save it as uint8"),
    "object labels": ({"arr_0": images(2), "arr_1": OBJECTS}, "arr_1 is object.*not plain data"),
    "object texts": ({"arr_0": images(2), "arr_1": np.array(["a", "b"], dtype=object)}, "arr_1 is object"),
    "records": ({"arr_0": images(2), "arr_1": np.zeros(2, [("a", "i4")])}, "not plain data"),
    "one image": ({"arr_0": images(1, 64, 48, 3)[0]}, "images are"),
    "one grey image": ({"images": images(1, 48, 64)[0][..., None]}, "images are"),
    "five channels": ({"arr_0": images(2, 6, 6, 5)}, "images are"),
    "five axes": ({"arr_0": images(2, 2, 6, 6, 3)}, "images are"),
    "no pixels": ({"arr_0": images(2, 0, 6, 3)}, "images are"),
    "columns first": ({"arr_0": np.asfortranarray(images(4))}, "column by column"),
    "fewer labels": ({"arr_0": images(4), "arr_1": np.arange(3)}, "3 labels for 4 images"),
    "more labels": ({"images": images(4), "labels": np.arange(5)}, "5 labels for 4 images"),
    "several classes": ({"images": images(2), "labels": np.ones((2, 3))}, "not one class an image"),
    "vectors": ({"images": images(2), "labels": np.array([[0.25, 0.75], [0, 1]])}, "not one class an image"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("saver", SAVERS)
def test_what_is_refused_in_one_line(
    kind: str, saver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arrays, words = REFUSED[kind]
    SAVERS[saver](tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=words) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value) and "a.npz" in str(error.value)
    assert not (tmp_path / "unpickled").exists()


def test_files_without_images_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images(3))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(8), sigma=np.eye(8))
    np.savez(tmp_path / "features.npz", np.zeros((3, 2048), np.float32))
    np.savez(tmp_path / "empty.npz")
    np.savez(tmp_path / "more.npz", images(3), np.arange(3), np.arange(2))
    found, items = opened(tmp_path)
    assert len(items) == 6
    assert found.listing.ignored == {
        "stats.npz": "holds no array called arr_0, images, image, x, data; it has mu, sigma",
        "features.npz/arr_0": "float32 [3, 2048], not images",
        "empty.npz": "holds no array called arr_0, images, image, x, data; it has none",
        "more.npz/arr_2": "neither images nor labels",
        "features.npz": "holds no images",
    }


def test_statistics_beside_image_files_are_no_source(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.png", "dog/2.png")
    np.savez(tmp_path / "fid.npz", mu=np.zeros(2048), sigma=np.eye(64))
    assert not is_npz(open_tree(str(tmp_path)))
    assert labels(tmp_path) == {"cat/1.png": "cat", "dog/2.png": "dog"}
    np.savez(tmp_path / "samples.npz", images(50, 8, 8, 3))
    assert is_npz(open_tree(str(tmp_path))) and opened(tmp_path)[0].source == "npz"


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("keep", [0, 0.3, 0.9, -30, -1])
def test_files_that_are_cut_short_are_bad(saver: str, keep: float, tmp_path: Path) -> None:
    SAVERS[saver](tmp_path / "cut.npz", images(), np.arange(30))
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: int(keep * len(whole)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(InputError, match=r"cut\.npz: damaged or cut short"):
        opened(tmp_path)
    np.savez(tmp_path / "good.npz", images(3))
    found, items = opened(tmp_path)
    assert len(items) == 3 and found.listing.bad == {
        "cut.npz": "damaged or cut short: File is not a zip file"
    }


def test_damage_inside_a_compressed_array_is_an_error_of_its_file(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images(300))
    whole = bytearray((tmp_path / "a.npz").read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(whole)
    with pytest.raises(InputError, match=r"a\.npz: damaged, download it again"):
        opened(tmp_path)


def test_a_file_that_shrank_since_it_was_listed_is_an_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images(30))
    part = open_source("npz", str(tmp_path), Request(10)).listing.parts[-1]
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:2500])
    with pytest.raises(InputError, match="ends at byte 2500"):
        list(part.read())
    (tmp_path / "a.npz").unlink()
    with pytest.raises(InputError, match="no longer exists"):
        list(part.read())


def test_a_compressed_file_is_unpacked_once_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens, really = list[str](), records.open_file
    monkeypatch.setattr(records, "open_file", lambda uri, ahead: opens.append(uri) or really(uri, ahead))
    for number in range(3):
        arr = images(40, 4 + number, 5)
        np.savez_compressed(tmp_path / "a.npz", arr)
        assert (pixels(tmp_path)[..., 0] == arr).all() and len(opens) == number + 1


@pytest.mark.slow
def test_a_remote_file_is_read_in_stretches(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arr = images(64, 32, 32, 3)
    for saver, save in SAVERS.items():
        save(tmp_path / f"{saver}.npz", arr, np.arange(64))
    fs, place = storage.open_fs(bucket)
    for saver in SAVERS:
        fs.put_file(str(tmp_path / f"{saver}.npz"), f"{place}/{saver}/a.npz")
        assert (pixels(f"{bucket}/{saver}") == arr).all()
    asked, stretch = list[int](), records.read_stretch

    def counting(uri: str, start: int, stop: int) -> bytes:
        asked.append(stop - start)
        return stretch(uri, start, stop)

    monkeypatch.setattr(records, "read_stretch", counting)
    part = open_source("npz", f"{bucket}/plain", Request(16)).listing.parts[1]
    assert len(list(part.read())) == 16 and asked == [16 * 3072]
    asked.clear()
    assert [i.label for i in part.read([3, 4, 9])] == ["19", "20", "25"] and asked == [2 * 3072, 3072]
