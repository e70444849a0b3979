"""The example notebook runs from top to bottom, in a process of its own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.models.export import load_model
from tests.jobs.common import ROOT, environment

pytestmark = pytest.mark.system
QUICKSTART = ROOT / "examples" / "quickstart.ipynb"
# Fewer of what takes long: steps, terms of the bound, samples.
FEWER = {
    "steps = 300": "steps = 20", "timesteps=400": "timesteps=50", "count=200": "count=50",
    "classifier_steps=200": "classifier_steps=20",
}  # fmt: skip


def test_the_quickstart_runs_and_leaves_what_it_says(tmp_path: Path) -> None:
    cells = json.loads(QUICKSTART.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    # The cells run as one script. Workers import nothing from it, as they import nothing from a notebook.
    text = "\n\n".join(code)
    for number, fewer in FEWER.items():
        assert text.count(number) == 1
        text = text.replace(number, fewer)
    script = tmp_path / "quickstart.py"
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=environment(tmp_path, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    home = tmp_path / "runs" / "quickstart"
    assert "after 20 steps" in done.stdout
    assert "torch.Size([10, 1, 8, 8]) torch.uint8" in done.stdout
    figures = dict(re.findall(r"^(\w+) +([\d.]+)$", done.stdout, re.MULTILINE))
    assert 0 < float(figures["bits_per_dim"]) < 20
    assert 0 <= float(figures["knn_label_accuracy"]) <= 1
    _, spec = load_model(home / "run" / "model")
    assert (spec.image.size, len(spec.image.classes)) == (8, 10)
    for name in ("samples.png", "process.png"):
        with Image.open(home / name) as picture:
            assert min(picture.size) > 50
