"""Samples as NumPy archives: one per chunk, and one of all samples for guided-diffusion's evaluator."""

import contextlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipeline import storage
from pipeline.config import ImageConfig
from pipeline.errors import InputError
from pipeline.evaluation.reading import open_samples, read_images
from pipeline.generation import npz
from tests.generation.common import config, digests, make, manifest, opened

IMAGE = ImageConfig(8, 1, ("a", "b", "c"))


def pixels_and_labels(folder: Path) -> tuple[np.ndarray, list[int]]:
    """Return pixels [N, H, W, 1] and labels of a Parquet dataset, in order."""
    rows = opened(folder).sort("index")
    return np.stack([np.asarray(row["image"]) for row in rows])[..., None], list(rows["label"])


def test_one_file_holds_all_samples_as_the_evaluator_of_guided_diffusion_reads_them(
    model: Path, whole: Path, tmp_path: Path
) -> None:
    make(config(tmp_path, format="npz"), model)
    pixels, labels = pixels_and_labels(whole)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert set(file) == {"arr_0", "arr_1"}  # no `mu`, which the evaluator would take for statistics
        np.testing.assert_array_equal(file["arr_0"], pixels.repeat(3, axis=3))
        np.testing.assert_array_equal(file["arr_1"], labels)
        assert (file["arr_0"].dtype, file["arr_1"].dtype) == (np.uint8, np.int64)
    # The evaluator streams batches from the archive's member if that is a plain array in C order.
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        assert np.lib.format.read_array_header_1_0(member) == ((40, 8, 8, 3), False, np.dtype(np.uint8))
        assert member.read(8 * 8 * 3) == pixels[0].repeat(3, axis=2).tobytes()
    assert len(digests(tmp_path)) == 5
    with np.load(min((tmp_path / "data").iterdir())) as file:
        np.testing.assert_array_equal(file["arr_0"], pixels[:8])  # in the model's own channels


def test_a_second_run_writes_neither_the_chunks_nor_the_one_file_again(model: Path, tmp_path: Path) -> None:
    make(config(tmp_path, format="npz"), model)
    files = [tmp_path / "samples.npz", *(tmp_path / "data").iterdir()]
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}
    assert make(config(tmp_path, format="npz"), model)["metrics"]["generated"] == 0
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files} == before


@pytest.mark.parametrize("harm", ["lost", "cut", "manifest"])
def test_the_one_file_comes_out_the_same_where_it_is_lost_or_cut(
    harm: str, model: Path, tmp_path: Path
) -> None:
    make(config(tmp_path, format="npz"), model)
    one = tmp_path / "samples.npz"
    before, said = one.read_bytes(), manifest(tmp_path)
    if harm == "manifest":
        (tmp_path / "manifest.json").write_text("{")
    else:
        one.unlink()
        if harm == "cut":
            one.write_bytes(before[:-5])
    (tmp_path / "samples.npz.0123.partial").write_bytes(b"a write that was cut off")
    assert make(config(tmp_path, format="npz"), model)["metrics"]["generated"] == 0
    assert (one.read_bytes(), manifest(tmp_path)) == (before, said)
    assert not list(tmp_path.glob("*.partial"))


def test_a_larger_count_only_adds_chunks_and_replaces_the_one_file(
    model: Path, whole: Path, tmp_path: Path
) -> None:
    make(config(tmp_path, format="npz", count=21), model)
    first = digests(tmp_path)
    with np.load(tmp_path / "samples.npz") as file:
        assert len(file["arr_0"]) == len(file["arr_1"]) == 21
    make(config(tmp_path, format="npz"), model)
    assert first.items() <= digests(tmp_path).items()
    with np.load(tmp_path / "samples.npz") as file:
        np.testing.assert_array_equal(file["arr_0"][..., :1], pixels_and_labels(whole)[0])


def test_a_write_that_fails_leaves_the_former_one_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(config(tmp_path, format="npz", count=8), model)
    before = (tmp_path / "samples.npz").read_bytes()

    def full(file: npz._Digested, *_: object) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(npz, "_collect", full)
        with pytest.raises(
            InputError, match="No space left on device: solve this and run the same command again"
        ):
            make(config(tmp_path, format="npz", count=16), model)
    assert (tmp_path / "samples.npz").read_bytes() == before
    assert not list(tmp_path.glob("samples.npz.*"))


def test_evaluate_reads_chunks_and_the_one_file_alike(model: Path, whole: Path, tmp_path: Path) -> None:
    # With two of three classes, a label is the class's number, not its rank among the classes that occur.
    make(config(tmp_path / "parquet", labels=("b", "c")), model)
    make(config(tmp_path / "npz", format="npz", labels=("b", "c")), model)
    pixels, labels = pixels_and_labels(tmp_path / "parquet")
    assert set(labels) == {1, 2}
    for uri in (tmp_path / "npz", tmp_path / "npz" / "samples.npz", tmp_path / "parquet"):
        index = open_samples(str(uri), IMAGE)
        assert index.rows == 40
        images, found = read_images(index, np.arange(40))
        np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), pixels)
        assert found.tolist() == labels


def test_samples_without_classes_have_no_labels(unconditional: Path, tmp_path: Path) -> None:
    make(config(tmp_path, format="npz", guidance=1.0, count=8), unconditional)
    with np.load(tmp_path / "samples.npz") as file:
        assert set(file) == {"arr_0"}
    index = open_samples(str(tmp_path / "samples.npz"), IMAGE)
    assert read_images(index, np.arange(8))[1].tolist() == [-1] * 8


def test_npz_files_that_are_no_samples_are_refused_in_one_line(tmp_path: Path) -> None:
    images = np.zeros((3, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "floats.npz", images.astype(np.float32))
    np.savez(tmp_path / "words.npz", images, np.array(["cat", "dog", "cat"]))
    np.savez(tmp_path / "fewer.npz", images, np.zeros(2, np.int64))
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "none.npz", images[:0])
    for file in tmp_path.iterdir():
        with pytest.raises(InputError, match=f"{file.name}: [^\n]*$"):
            open_samples(str(file), IMAGE)


def test_an_object_store_gets_the_same_bytes(model: Path, tmp_path: Path, bucket: str) -> None:
    make(config(tmp_path, format="npz", count=16), model)
    make(config(bucket, format="npz", count=16), model)
    assert storage.read_bytes(f"{bucket}/samples.npz") == (tmp_path / "samples.npz").read_bytes()
    assert make(config(bucket, format="npz", count=16), model)["metrics"]["generated"] == 0
    assert open_samples(bucket, IMAGE).rows == 16


def test_any_damage_of_an_archive_is_one_line(tmp_path: Path) -> None:
    whole, file = npz.archive(np.zeros((2, 8, 8, 1), np.uint8), [0, 1]), tmp_path / "one.npz"
    for place in range(len(whole)):
        if place > 400 and whole[place] == 0:
            continue  # pixels; a checksum covers them
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        with contextlib.suppress(InputError):
            npz.read_archive(str(file))
