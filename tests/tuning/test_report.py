"""The report: one page that needs no other file and no network, and a table of the trials."""

import csv
import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.models.export import save_model
from pipeline.tuning import ledger, report
from pipeline.tuning.config import TuneConfig, rung_images
from pipeline.tuning.ledger import Record, Rung
from pipeline.tuning.space import Space, parse_space
from tests.evaluation.common import small_model

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
REASON = 'InputError: <b>"bad" & broken</b></script><script>document.title="owned"</script>'
SPACE = parse_space(
    {"schedule": ["cosine", "linear", "sigmoid"], "learning_rate": {"low": 1e-6, "high": 1.0, "log": True}}
)
COMMAND = "python jobs/train.py --data 'd</pre><i>'"


def parameters(flags: dict[str, Any]) -> dict[str, Any]:
    """Return Optuna's parameters from which SPACE makes these flags."""
    return {
        "diffusion.schedule": json.dumps(flags["diffusion.schedule"]),
        "optimizer.learning_rate": flags["optimizer.learning_rate"],
    }


def search(output: Path) -> tuple[TuneConfig, list[Record]]:
    """Write a ledger of two finished trials with models, a stopped one and a failed one. Return settings and records."""
    config = TuneConfig(
        "/home/somebody/digits", str(output), trials=4, objective="both", images=900, rungs=3, reduction=3
    )
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
        record = Record(number, parameters(flags), flags, status, reason, measured)  # type: ignore[arg-type]
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
    return folder, report.write(config, SPACE, records, COMMAND)


class _Elements(HTMLParser):
    """Collects the page's tags and links before any script runs."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]


def data_of(page: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    return found


def test_the_page_is_one_light_file_that_points_nowhere(written: tuple[Path, list[Path]]) -> None:
    folder, files = written
    assert files == [folder / "report.html", folder / "trials.csv"]
    page = (folder / "report.html").read_text()
    found = _Elements()
    found.feed(page)
    assert not found.links
    assert re.findall('https?://[^"]+', page) == ["http://www.w3.org/2000/svg"]  # a namespace, not an address
    assert "default-src 'none'; img-src data:" in page  # a browser refuses everything else
    assert len(page) - sum(len(one["picture"]) for one in data_of(page)["samples"]) < 40_000


def test_what_users_wrote_is_text_alone(written: tuple[Path, list[Path]]) -> None:
    page, template = (written[0] / "report.html").read_text(), report.PAGE.read_text()
    found, empty = _Elements(), _Elements()
    found.feed(page)
    empty.feed(template)
    assert found.tags == empty.tags
    assert "innerHTML" not in template
    data = data_of(page)
    assert data["command"] == COMMAND
    assert data["trials"][3]["note"] == REASON
    assert data["title"] == "Search of digits by bits_per_dim and frechet_distance"
    assert "/home/somebody" not in page


def test_the_page_has_every_figure(written: tuple[Path, list[Path]]) -> None:
    data = data_of((written[0] / "report.html").read_text())
    trials = {trial["name"]: trial for trial in data["trials"]}
    # By the second objective the other finished trial is better.
    ranks = [[trial["rank"][metric] for metric in data["metrics"]] for trial in data["trials"]]
    assert ranks == [[1, 2], [2, 1], [3, 3], [None, None]]
    assert trials["0001"]["metrics"] == {"bits_per_dim": 3.0, "frechet_distance": 8.0}
    assert [point["seen"] for point in trials["0001"]["curve"]] == [100, 300, 900]
    assert trials["0000"]["signal"][-1] == [1.0, pytest.approx(0, abs=0.01)]
    assert [trial["front"] for trial in data["trials"]] == [True, True, False, False]
    assert trials["0002"]["flags"] == {"schedule": "sigmoid", "learning_rate": 1e-4}
    assert {one["name"] for one in data["samples"]} == {"0000", "0001"}
    assert all(one["picture"].startswith("data:image/png;base64,") for one in data["samples"])
    assert data["importance"] == {
        "bits_per_dim": [],
        "frechet_distance": [],
    }  # three trials are too few


def test_what_matters_is_told_from_chance(tmp_path: Path) -> None:
    """The figure of 60 trials depends on one of three settings, and in a second case on none."""
    chance = np.random.default_rng(0)
    space = parse_space(
        {
            "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
            "both": [{"schedule": "cosine", "timesteps": 50}, {"schedule": "linear", "timesteps": 99}],
            "model_channels": [32, 64],
        }
    )

    def found(depends: bool) -> dict[str, tuple[float, float]]:
        records = []
        for number in range(60):
            given = {
                "optimizer.learning_rate": float(10 ** chance.uniform(-4, -2)),
                "both": space.entries["both"].choices[number % 2],
                "model.model_channels": json.dumps(32 * (1 + number // 2 % 2)),
            }
            off = abs(math.log10(given["optimizer.learning_rate"]) + 3)
            bits = 1000.0 if number == 7 else off if depends else float(chance.uniform())
            rungs = (Rung(900, 9, 0.0, {"bits_per_dim": bits}),)
            records.append(Record(number, given, space.decode(given), "finished", rungs=rungs))
        shares = report.importance(TuneConfig("d", str(tmp_path)), space, records, "bits_per_dim")
        assert [one["flags"] for one in shares if one["name"] == "both"] == [["schedule", "timesteps"]]
        return {one["name"]: (one["share"], one["chance"]) for one in shares}

    shares = found(True)
    share, by_chance = shares["learning_rate"]
    assert share > 0.8 and share > 1.5 * by_chance
    assert [name for name, (share, by_chance) in shares.items() if share > by_chance] == ["learning_rate"]
    assert not any(share > by_chance for share, by_chance in found(False).values())


def test_the_table_ranks_trials_and_gives_the_paired_difference(written: tuple[Path, list[Path]]) -> None:
    rows = list(csv.DictReader((written[0] / "trials.csv").open()))
    assert [row["trial"] for row in rows] == ["0000", "0001", "0002", "0003"]
    assert [row["status"] for row in rows] == ["finished", "finished", "stopped", "failed"]
    # Both use the same images, so their difference is exact, though each figure has an error of 0.1.
    assert rows[1]["worse than the winner by"] == "0.1000 ± 0.0000"
    assert rows[2]["worse than the winner by"] == ""
    assert [row["Pareto front"] for row in rows[:2]] == ["yes", "yes"]
    assert [row["schedule"] for row in rows] == ["cosine", "linear", "sigmoid", "linear"]
    assert "timesteps" not in rows[0]  # equal for all trials
    assert rows[3]["note"] == REASON


ACTIONS = """
const done = {}, count = (where) => document.querySelectorAll(where).length;
const texts = (where) => [...document.querySelectorAll(where)].map((one) => one.textContent);
done.panels = ["parallel", "curves", "scatter", "signal"].map((id) => count(`#${id} .mark`));
done.size = texts("#shown")[0];
done.front = count("#joined");
byId("find").value = "SIGMOID"; byId("find").dispatchEvent(new Event("input"));
done.found = [texts("#shown")[0], texts("tbody tr:not(.off) td:nth-child(2)")];
byId("clear").click();
document.querySelectorAll("#statuses input")[2].click();
done.withoutFailed = texts("tbody tr:not(.off) td:nth-child(3)");
byId("clear").click();
const head = (name) => [...document.querySelectorAll("th")].find((one) => one.textContent.startsWith(name));
head("learning_rate").click();
done.sorted = texts("tbody tr td:nth-child(2)");
head("learning_rate").click();
done.reversed = texts("tbody tr td:nth-child(2)");
byId("metric").value = "frechet_distance"; byId("metric").dispatchEvent(new Event("change"));
done.against = byId("against").value;
const first = document.querySelectorAll("#curves .mark")[0];
first.dispatchEvent(new PointerEvent("pointerenter", { clientX: 300, clientY: 300 }));
done.tip = byId("tip").textContent; done.over = count(".over .hot"); done.row = texts("tr.hot td:nth-child(2)");
first.dispatchEvent(new PointerEvent("pointerleave"));
done.left = count(".over .hot");
state.brushes.set("learning_rate", [0, 1]); filter();
done.brushed = texts("#shown")[0];
done.title = document.title; done.images = count("img"); done.note = texts("tbody td:last-child").pop();
const drawn = [...document.querySelectorAll("path, circle, line, rect, text")];
done.bad = drawn.filter((one) => /NaN|undefined|Infinity/.test(one.outerHTML)).length;
"""
END = """
const out = document.createElement("pre");
out.id = "done"; out.textContent = JSON.stringify(done); document.body.append(out);
"""


def browse(page: Path, *flags: str) -> str:
    """Open a page in a browser and return its standard output. Without a browser the test is skipped."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine: the page was not opened in a browser")
    every = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,2400", "--hide-scrollbars"]
    # Keep the browser itself from opening connections.
    every += ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    every += ["--disable-component-update", f"--user-data-dir={page.parent / 'profile'}"]
    done = subprocess.run(
        [browser, *every, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def test_a_browser_draws_filters_and_sorts(written: tuple[Path, list[Path]], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    text = (written[0] / "report.html").read_text()
    page.write_text(text.replace("</body>", f"<script>{ACTIONS}{END}</script></body>"))
    shown = browse(page, "--dump-dom")
    done = json.loads(html.unescape(shown.partition('<pre id="done">')[2].partition("</pre>")[0]))
    assert done == {
        "panels": [3, 3, 3, 3],
        "size": "4 of 4 trials",
        "front": 1,
        "found": ["1 of 4 trials", ["0002"]],
        "withoutFailed": ["finished", "finished", "stopped"],
        "sorted": ["0003", "0002", "0001", "0000"],
        "reversed": ["0000", "0001", "0002", "0003"],
        "against": "bits_per_dim",
        "tip": done["tip"],
        "over": 4,
        "row": ["0002"],  # the worst trial is the lowest row
        "left": 0,
        "brushed": "0 of 4 trials",
        "title": "Search of digits by bits_per_dim and frechet_distance",
        "images": 2,
        "note": REASON,
        "bad": 0,
    }
    assert "trial: 0002" in done["tip"] and "status: stopped" in done["tip"]
    picture = tmp_path / "page.png"
    browse(page, f"--screenshot={picture}")
    assert np.asarray(Image.open(picture).convert("L")).std() > 20


def one_trial(folder: Path) -> tuple[TuneConfig, Space, list[Record]]:
    rungs = (Rung(900, 9, 0.0, {"bits_per_dim": 3.0}),)
    flags = {"diffusion.schedule": "cosine", "optimizer.learning_rate": 1e-3}
    records = [Record(0, parameters(flags), flags, "finished", rungs=rungs)]
    ledger.write(str(folder), records[0])
    return TuneConfig("data", str(folder), images=900), SPACE, records


def test_a_search_of_one_trial_by_one_objective_can_be_shown(tmp_path: Path) -> None:
    report.write(*one_trial(tmp_path), "again")
    data = data_of((tmp_path / "report.html").read_text())
    assert (data["flags"], data["samples"], data["metrics"]) == ([], [], ["bits_per_dim"])
    page = tmp_path / "page.html"
    text = (tmp_path / "report.html").read_text()
    page.write_text(text.replace("</body>", f"<script>{ACTIONS.partition('byId')[0]}{END}</script></body>"))
    shown = browse(page, "--dump-dom")
    assert "[1,1,1,1]" in shown.partition('<pre id="done">')[2]


def test_the_images_really_seen_are_shown_and_where_they_differ(tmp_path: Path) -> None:
    config, records = search(tmp_path)
    assert report.unequal(records) == ""
    rungs = tuple(replace(rung, seen=rung.images + 28) for rung in records[0].rungs)
    records[0] = replace(records[0], rungs=rungs)
    assert report.table_rows(config, records)[0]["images"] == "928"
    assert "100 to 128 at the rung of 100, 300 to 328" in report.unequal(records)
