"""Arrow files that `datasets` saves, and IPC files of other programs."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, load_from_disk
from datasets import Image as ImageFeature
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

from pipeline.data.sources.arrow import is_arrow, list_arrow
from pipeline.data.sources.parts import Request, SourceListing
from pipeline.data.sources.tree import open_tree
from pipeline.errors import InputError
from tests.data.tables import COUNT, IMAGES, NUMBERS, STRUCT, WORDS, Planted, binary, items, structs

NAMES = ["dog", "cat"]


def dataset(images: list[bytes] = IMAGES) -> Dataset:
    cells = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    features = Features({"pic": ImageFeature(), "kind": ClassLabel(names=NAMES)})
    return Dataset.from_dict({"pic": cells, "kind": [i % 2 for i in range(len(images))]}, features=features)


def listing(root: Path, images_per_part: int = 5) -> SourceListing:
    tree = open_tree(str(root))
    assert is_arrow(tree)
    return list_arrow(tree, Request(images_per_part))


def plain(path: Path, columns: dict[str, Any], rows: int = 6, file: bool = False, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    write = pa.ipc.new_file if file else pa.ipc.new_stream
    with write(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=rows)


@pytest.mark.parametrize("shards", [1, 3, 12])
def test_what_datasets_saved_is_read_as_it_reads_it(tmp_path: Path, shards: int) -> None:
    dataset().save_to_disk(tmp_path, num_shards=shards)
    theirs = load_from_disk(str(tmp_path)).cast_column("pic", ImageFeature(decode=False))
    found = listing(tmp_path)
    assert found.classes == tuple(NAMES)
    expected = [(row["pic"]["bytes"], NAMES[row["kind"]]) for row in theirs]
    assert [(item.data, item.label) for item in items(found)] == expected
    assert {part.split for part in found.parts} == {""}
    assert found.used == {path.name for path in tmp_path.iterdir()} and not found.ignored and not found.bad


def test_splits_are_the_folders_of_a_dataset_dict(tmp_path: Path) -> None:
    splits = {"train": IMAGES[:8], "validation": IMAGES[8:12], "test": IMAGES[12:]}
    DatasetDict({name: dataset(images) for name, images in splits.items()}).save_to_disk(tmp_path)
    (tmp_path / "old").mkdir()
    plain(tmp_path / "old" / "data.arrow", {"pic": structs()})
    found = listing(tmp_path)
    for split, images in splits.items():
        assert [item.data for part in found.parts if part.split == split for item in part.read()] == images
    assert found.ignored == {"old/data.arrow": "dataset_dict.json does not list its folder as a split"}
    assert {"dataset_dict.json", "test/state.json", "test/dataset_info.json"} < found.used


def test_what_is_chosen_of_a_dataset_is_saved_alone(tmp_path: Path) -> None:
    dataset().select([5, 2, 9]).save_to_disk(tmp_path)
    assert [item.data for item in items(listing(tmp_path))] == [IMAGES[5], IMAGES[2], IMAGES[9]]


def state(folder: Path, **changes: Any) -> None:
    path = folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("key", ["_indices_files", "_indices_data_files"])
def test_an_index_of_rows_is_refused(tmp_path: Path, key: str) -> None:
    dataset().save_to_disk(tmp_path)
    state(tmp_path, **{key: [{"filename": "indices.arrow"}]})
    with pytest.raises(
        InputError, match=r"holds a selection of rows \(.*\): call flatten_indices\(\) and save it again$"
    ):
        listing(tmp_path)


def test_the_order_and_the_choice_of_files_are_those_of_the_state(tmp_path: Path) -> None:
    dataset().save_to_disk(tmp_path, num_shards=4)
    names = [f"data-{i:05d}-of-00004.arrow" for i in range(4)]
    plain(tmp_path / "cache-1234.arrow", {"pic": structs()})
    (tmp_path / names[3]).unlink()
    state(
        tmp_path,
        _data_files=[{"filename": name} for name in (names[2], names[0], names[3], "../secret.arrow")],
    )
    found = listing(tmp_path)
    assert [item.data for item in items(found)] == IMAGES[8:12] + IMAGES[:4]
    assert found.ignored == dict.fromkeys(
        ["cache-1234.arrow", names[1]], "state.json does not list it as a data file"
    )
    assert found.bad == dict.fromkeys([names[3], "../secret.arrow"], "missing, although state.json lists it")


def test_the_split_that_was_saved_counts_where_no_name_has_one(tmp_path: Path) -> None:
    for folder, split in (("a", "train"), ("b", "test"), ("c", None)):
        dataset().save_to_disk(tmp_path / folder)
        state(tmp_path / folder, _split=split)
    found = listing(tmp_path, COUNT)
    assert [part.split for part in found.parts] == ["train", "test", ""]


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_what_is_said_of_the_data_may_be_damaged(tmp_path: Path, name: str) -> None:
    dataset().save_to_disk(tmp_path)
    (tmp_path / name).write_text('{"half": ')
    found = listing(tmp_path)
    assert [item.data for item in items(found)] == IMAGES and found.classes == tuple(NAMES)
    assert list(found.bad) == [name] and found.bad[name].startswith("damaged: ")


def test_features_may_stand_beside_the_file_alone(tmp_path: Path) -> None:
    dataset().save_to_disk(tmp_path)
    path = tmp_path / "data-00000-of-00001.arrow"
    with pa.OSFile(str(path), "rb") as file:
        table = pa.ipc.open_stream(file).read_all().replace_schema_metadata(None)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    assert listing(tmp_path).classes == tuple(NAMES)


@pytest.mark.parametrize(
    "write",
    [
        lambda path, columns: plain(path.with_suffix(".arrow"), columns),
        lambda path, columns: plain(path.with_suffix(".arrow"), columns, file=True),
        lambda path, columns: plain(path.with_suffix(".arrow"), columns, compression="lz4"),
        lambda path, columns: plain(path.with_suffix(".arrow"), columns, file=True, compression="zstd"),
        lambda path, columns: pyarrow.feather.write_feather(
            pa.table(columns), str(path.with_suffix(".feather"))
        ),
        lambda path, columns: pyarrow.feather.write_feather(
            pa.table(columns), str(path.with_suffix(".Feather")), "uncompressed", chunksize=4
        ),
    ],
)
def test_files_of_others(tmp_path: Path, write: Callable[[Path, dict[str, Any]], None]) -> None:
    columns = {"n": list(range(COUNT)), "image": structs(), "label": pa.array(WORDS).dictionary_encode()}
    write(tmp_path / "train", columns)
    write(tmp_path / "test", {name: column[:5] for name, column in columns.items()})
    write(tmp_path / "side", {"n": list(range(COUNT))})
    found = listing(tmp_path)
    assert [item.data for item in items(found)] == IMAGES[:5] + IMAGES
    assert [item.label for item in items(found)] == WORDS[:5] + WORDS
    assert found.classes == ("cat", "dog")
    assert {(part.names[0].partition(".")[0], part.split) for part in found.parts} == {
        ("test", "test"),
        ("train", "train"),
    }
    assert list(found.ignored.values()) == ["Arrow without an image column"]


def test_parts_are_small_and_read_by_position(tmp_path: Path) -> None:
    plain(tmp_path / "a.arrow", {"image": binary(), "label": NUMBERS}, rows=6)
    parts = listing(tmp_path, 7).parts
    assert [len(list(part.read())) for part in parts] == [7, 7, 2]
    part = pickle.loads(pickle.dumps(parts[1]))
    whole = list(part.read())
    assert [item.data for item in whole] == IMAGES[7:14]
    assert list(part.read([5, 0, 5])) == [whole[5], whole[0], whole[5]]
    assert part.table(np.array([3, 1]))["bytes"].to_pylist() == [IMAGES[10], IMAGES[8]]
    assert len({item.path for each in parts for item in each.read()}) == COUNT
    assert len(pickle.dumps(parts)) < 400 + 100 * len(parts)


def test_several_images_in_a_row(tmp_path: Path) -> None:
    cells: list[Any] = [[IMAGES[0], IMAGES[1]], [], None, [IMAGES[2]]]
    plain(tmp_path / "a.arrow", {"images": pa.array(cells, pa.large_list(pa.binary()))})
    part = listing(tmp_path).parts[0]
    read = list(part.read())
    assert [item.data for item in read if not item.reason] == IMAGES[:3]
    assert [item.path for item in read if item.reason == "the row holds no image"] == [
        "a.arrow/000001",
        "a.arrow/000002",
    ]
    assert list(part.read([4, 1])) == [read[4], read[1]]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an Arrow file: it is empty"),
        (b"ARROW1 and nothing else", "not an Arrow file: "),
        (b"FEA1" + bytes(40), "a Feather file of version 1: write it again with"),
        (b"\xff\xff\xff\xff\x10\0\0\0" + bytes(90), "not an Arrow file: "),
        (b"plain text", "not an Arrow file: "),
    ],
)
def test_a_file_that_is_none_is_bad_and_the_others_are_read(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "b.arrow").write_bytes(content)
    assert listing(tmp_path).bad["b.arrow"].startswith(reason)
    plain(tmp_path / "a.arrow", {"image": binary()})
    found = listing(tmp_path)
    assert list(found.bad) == ["b.arrow"] and str(tmp_path) not in found.bad["b.arrow"]
    assert [item.data for item in items(found)] == IMAGES


@pytest.mark.parametrize("file", [False, True])
def test_a_file_that_is_cut_short_is_bad(tmp_path: Path, file: bool) -> None:
    for share in (0.3, 0.6, 0.9):
        plain(tmp_path / "a.arrow", {"image": binary()}, rows=3, file=file)
        data = (tmp_path / "a.arrow").read_bytes()
        (tmp_path / "a.arrow").write_bytes(data[: int(len(data) * share)])
        reason = listing(tmp_path).bad["a.arrow"]
        assert (
            reason.startswith("not an Arrow file: " if file else "record batch ")
            and str(tmp_path) not in reason
        )


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), STRUCT])
@pytest.mark.parametrize("value", [b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff"])
def test_offsets_that_lead_out_of_the_file_are_an_error_with_file_and_batch(
    tmp_path: Path, kind: pa.DataType, value: bytes
) -> None:
    """A reader that followed them would read memory outside the file."""
    image = structs(kind) if kind == STRUCT else binary(kind)
    plain(tmp_path / "a.arrow", {"image": image, "label": NUMBERS}, rows=COUNT)
    good = listing(tmp_path, 100).parts[0]
    assert len(list(good.read())) == COUNT
    width = 8 if kind == pa.large_binary() else 4
    data = bytearray((tmp_path / "a.arrow").read_bytes())
    offsets = np.cumsum([0, *map(len, IMAGES)]).astype(np.int64 if width == 8 else np.int32).tobytes()
    at = data.index(offsets) + 9 * width
    data[at : at + 4] = value
    (tmp_path / "a.arrow").write_bytes(data)
    with pytest.raises(InputError, match=r"^\S+a.arrow: record batch 0 can't be read: \S"):
        list(good.read())


@pytest.mark.parametrize("name", ["café", "étiquette", "x\udce9"])
def test_names_of_columns_that_are_no_text(tmp_path: Path, name: str) -> None:
    """For example, a program wrote them in Latin-1."""
    raw = name.encode("latin-1" if name.isprintable() else "utf-8", "surrogateescape")
    plain(tmp_path / "a.arrow", {"image": binary(), "#" * len(raw): NUMBERS})
    data = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(data.replace(b"#" * len(raw), raw))
    assert (
        listing(tmp_path).bad["a.arrow"].startswith("not an Arrow file: 'utf-8' codec can't decode byte 0xe9")
    )


def test_files_of_a_remote_store_are_read_alike(tmp_path: Path) -> None:
    DatasetDict({"train": dataset(), "test": dataset(IMAGES[:5])}).save_to_disk(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/saved", recursive=True)
    tree = open_tree("memory://saved")
    assert is_arrow(tree)
    found, local = list_arrow(tree, Request(5)), listing(tmp_path)
    assert items(found) == items(local) and len(items(found)) == COUNT + 5
    assert [part.split for part in found.parts] == [part.split for part in local.parts]
    memory.rm("/saved", recursive=True)


@pytest.mark.parametrize("column", ["image", "label", "other"])
def test_nothing_of_a_file_is_run(tmp_path: Path, column: str) -> None:
    mark, root = tmp_path / "mark", tmp_path / "data"
    planted = ArrowPythonObjectArray.from_objects([Planted(mark)] * COUNT)
    plain(root / "a.arrow", {"image": structs(), "label": pa.array(NUMBERS), column: planted})
    if column == "other":
        assert [item.data for item in items(listing(root))] == IMAGES
    else:
        with pytest.raises(InputError, match=f"a.arrow: column {column} is .*, not plain data: refused"):
            listing(root)
    assert not mark.exists()
