"""The report: one page that needs no other file, and a table that says what was found."""

import csv
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.models.export import save_model
from pipeline.pictures import draw
from pipeline.tuning import ledger, report
from pipeline.tuning.config import TuneConfig, rung_images
from pipeline.tuning.ledger import Record, Rung
from tests.evaluation.common import small_model

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
REASON = 'InputError: <b>"bad" & broken</b>'


def search(output: Path) -> tuple[TuneConfig, list[Record]]:
    """A search's ledger: two finished trials with models, a stopped one, a failed one."""
    config = TuneConfig("data", str(output), trials=4, objective="both", images=900, rungs=3, reduction=3)
    images = np.random.default_rng(0).normal(3, 1, 40)
    records = []
    for number, (status, rungs) in enumerate(
        (("finished", 3), ("finished", 3), ("stopped", 1), ("failed", 0))
    ):
        flags = {
            "diffusion.schedule": ["cosine", "linear", "sigmoid", "linear"][number],
            "diffusion.timesteps": 20,
        }
        flags["optimizer.learning_rate"] = 10.0 ** -(2 + number)
        measured = tuple(
            Rung(
                seen,
                seen,
                1.0,
                {
                    "bits_per_dim": 3.0 + number / 10 - k / 20,
                    "bits_per_dim_stderr": 0.1,
                    "frechet_distance": 9.0 - number,
                },
                tuple(images + number / 10),
            )
            for k, seen in enumerate(rung_images(config)[:rungs])
        )
        reason = REASON if status == "failed" else ""
        record = Record(number, {}, flags, status, reason, measured)  # type: ignore[arg-type]
        ledger.write(str(output), record)
        records.append(record)
        if status == "finished":
            model, spec = small_model(conditional=False)
            save_model(ledger.run_folder(str(output), record) / "model", model.state_dict(), spec)
    return config, records


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("report")
    config, records = search(folder)
    return folder, report.write(config, records, "python jobs/train.py --data d")


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_holds_all_its_pictures_and_points_nowhere(written: tuple[Path, list[Path]]) -> None:
    page = (written[0] / "report.html").read_text()
    found = _Links()
    found.feed(page)
    assert len(found.links) == 5  # parallel coordinates, objective, schedules, Pareto front, samples
    assert all(link.startswith("data:image/png;base64,") for link in found.links)
    assert "http" not in page
    text = " ".join(found.text)
    assert "python jobs/train.py --data d" in text
    assert REASON in text
    assert "<b>" not in page


def test_the_pictures_also_lie_there_by_themselves(written: tuple[Path, list[Path]]) -> None:
    pictures = [path for path in written[1] if path.suffix == ".png"]
    assert len(pictures) == 5
    for path in pictures:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 200
        assert pixels.std() > 5


def test_the_table_ranks_trials_and_gives_the_paired_difference(written: tuple[Path, list[Path]]) -> None:
    rows = list(csv.DictReader((written[0] / "trials.csv").open()))
    assert [row["trial"] for row in rows] == ["0000", "0001", "0002", "0003"]
    assert [row["status"] for row in rows] == ["finished", "finished", "stopped", "failed"]
    # The same images: what they differ by is known exactly, though each figure has an error of 0.1.
    assert rows[1]["worse than the winner by"] == "0.1000 ± 0.0000"
    assert rows[2]["worse than the winner by"] == ""
    assert [row["Pareto front"] for row in rows[:2]] == ["yes", "yes"]
    assert [row["schedule"] for row in rows] == ["cosine", "linear", "sigmoid", "linear"]
    assert "timesteps" not in rows[0]  # the same for all
    assert rows[3]["note"] == REASON


def test_the_page_opens_in_a_browser(written: tuple[Path, list[Path]], tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine: the page was not opened in a browser")
    picture = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,3600", "--hide-scrollbars"]
    # It opens no connection: the page needs none, and tests make none.
    flags += ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    flags += ["--disable-component-update"]
    page = (written[0] / "report.html").as_uri()
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    shown = subprocess.run(
        [browser, *flags, profile, "--dump-dom", page],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert len(re.findall("<img", shown)) == 5
    subprocess.run(
        [browser, *flags, profile, f"--screenshot={picture}", page],
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert np.asarray(Image.open(picture).convert("L")).std() > 20


def test_a_search_by_one_objective_needs_no_samples_and_draws_no_front(tmp_path: Path) -> None:
    rungs = (Rung(900, 9, 0.0, {"bits_per_dim": 3.0}),)
    records = [Record(0, {}, {"diffusion.schedule": "cosine"}, "finished", rungs=rungs)]
    ledger.write(str(tmp_path), records[0])
    config = TuneConfig("data", str(tmp_path), images=900)
    files = report.write(config, records, "again")
    assert sorted(path.name for path in files if path.suffix == ".png") == [
        "alpha_bar.png",
        "objective.png",
        "parallel.png",
    ]


def test_a_search_of_200_trials_can_still_be_seen(tmp_path: Path) -> None:
    """The plot takes most of its picture, and the legend that names trials is not cut off at an edge."""
    chance = np.random.default_rng(0)
    names = [f"{rank}. trial {rank:04d}" for rank in range(200)]
    curves = {name: ([1000, 3000], chance.normal(4, 1, 2).tolist(), [0.1, 0.1]) for name in names}
    draw.save_objective(curves, "bits_per_dim", tmp_path / "objective.png")
    draw.save_ranked_schedules({name: np.linspace(1, 0, 20) for name in names}, tmp_path / "alpha_bar.png")
    for path in tmp_path.iterdir():
        grey = np.asarray(Image.open(path).convert("L"))
        assert all((edge > 250).all() for edge in (grey[:3], grey[-3:], grey[:, :3], grey[:, -3:])), path.name
        dark = grey < 60
        height, width = dark.shape
        assert dark.sum(axis=1).max() > 0.6 * width, path.name  # the frame's longest lines
        assert dark.sum(axis=0).max() > 0.6 * height, path.name


def test_the_images_really_seen_are_shown_and_where_they_differ(tmp_path: Path) -> None:
    config, records = search(tmp_path)
    assert report.unequal(records) == ""
    rungs = tuple(replace(rung, seen=rung.images + 28) for rung in records[0].rungs)
    records[0] = replace(records[0], rungs=rungs)
    assert report.table_rows(config, records)[0]["images"] == "928"
    assert "100 to 128 at the rung of 100, 300 to 328" in report.unequal(records)
