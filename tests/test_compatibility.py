"""Version 0.1.0's flags, fields of files and registered models still work."""

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.commands import cli
from pipeline.config import TrainConfig, from_dict, to_dict
from pipeline.data.index import open_dataset
from pipeline.errors import InputError
from pipeline.evaluation.config import EvaluateConfig
from pipeline.output import check_claim, read_claim, write_claim
from pipeline.training import checkpoint
from pipeline.training.state import new_state
from pipeline.tuning import ledger
from pipeline.tuning.space import apply, parse_space
from pipeline.versions import SAMPLING, VERSIONS
from tests.generation.common import save
from tests.jobs.common import database
from tests.training.common import problem

CPU = torch.device("cpu")
# The script that 0.1.0 logged with every model, with its comments removed.
PYFUNC = """
from pathlib import Path
import mlflow
import numpy as np
import torch

class Sampler(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        from pipeline.models.export import load_model
        self.model, self.spec = load_model(Path(context.artifacts["model"]))

    def predict(self, context, model_input, params=None):
        from pipeline.sampling import sample_images
        options = {"sampler": "ddim", "sampling_steps": 50, "seed": 0, "guidance": 1.0} | (params or {})
        labels = torch.as_tensor(np.asarray(model_input["label"], np.int64))
        images = sample_images(self.model, self.spec, torch.arange(len(model_input)), labels=labels, **options)
        return images.permute(0, 2, 3, 1).numpy()

mlflow.models.set_model(Sampler())
"""


@pytest.mark.parametrize("flag", ["--class-dropout", "--class_dropout", "--label-dropout"])
def test_flags_keep_their_old_names(flag: str) -> None:
    required = ["--data", "d", "--output", "o"]
    assert cli.parse(TrainConfig, [*required, flag, "0.3"], "train", "").label_dropout == 0.3
    assert cli.parse(TrainConfig, [*required, f"{flag}=0.3"], "train", "").label_dropout == 0.3
    parsed = cli.parse(
        EvaluateConfig, ["--model", "m", "--data", "d", "--manifold-neighbours", "5"], "evaluate", ""
    )
    assert parsed.precision_recall_neighbours == 5


def test_fields_of_files_keep_their_old_names(tmp_path: Path) -> None:
    before = to_dict(TrainConfig("d", "o", label_dropout=0.3))
    before["class_dropout"] = before.pop("label_dropout")
    assert from_dict(TrainConfig, before).label_dropout == 0.3
    assert apply(TrainConfig("d", "o"), {"class_dropout": 0.3}).label_dropout == 0.3
    assert "label_dropout" in parse_space({"class_dropout": [0.1, 0.2]}).entries
    record = tmp_path / "trials" / "0003" / "trial.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"number": 3, "parameters": {}, "flags": {}, "leg": 2}))
    assert ledger.read(str(tmp_path), "0003").incarnation == 2


def test_a_setting_that_is_gone_is_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match=r"--groups-per-window is gone, since .*: leave it out"):
        cli.parse(TrainConfig, ["--data", "d", "--output", "o", "--groups-per-window", "64"], "train", "")
    with pytest.raises(InputError, match=r"run.yaml: 'groups_per_window' is gone, since .*: leave it out"):
        from_dict(TrainConfig, to_dict(TrainConfig("d", "o")) | {"groups_per_window": 64}, "run.yaml")


def strip_versions(path: Path) -> dict[str, Any]:
    """Turn a file into one of 0.1.0, which wrote no versions, and return its content."""
    content = json.loads(path.read_text())
    del content["versions"]
    path.write_text(json.dumps(content))
    return content


def test_a_release_that_works_otherwise_refuses_to_go_on_and_opens_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"seed": 1, "sampler": "ddim"}
    samples, run = str(tmp_path / "samples"), str(tmp_path / "run")
    # 0.1.0 wrote the settings of samples at the top level of their file, and those of a run under a key.
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "settings.json").write_text(json.dumps({**settings, "model": "models:/m/1"}))
    write_claim(run, "run.json", settings, run_id="abc")
    strip_versions(tmp_path / "run" / "run.json")
    claims = {samples: "settings.json", run: "run.json"}
    config, spec = problem()
    checkpoint.write(str(tmp_path / "c"), checkpoint.capture(new_state(config, spec, CPU)), {})
    stored = json.loads((tmp_path / "c" / "state.json").read_text())["state"]
    assert stored["versions"] == VERSIONS

    for output, name in claims.items():
        before = read_claim(output, name)
        assert before is not None
        check_claim(output, before, settings, of=())
        with pytest.raises(InputError, match=r"begun with seed = 1, now it is 2: keep it"):
            check_claim(output, before, settings | {"seed": 2}, of=())
        with pytest.raises(InputError, match=r"begun by ray-ddpm 0.1.0.*kernels 1, now 4"):
            check_claim(output, before, settings, of=SAMPLING)
        with pytest.raises(InputError, match=r"begun by ray-ddpm 0.1.0.*order 1, now 3"):
            check_claim(output, before, settings)
    assert read_claim(samples, "settings.json")["model"] == "models:/m/1"  # type: ignore[index]

    for name in ("order", "noise", "kernels"):
        written = VERSIONS[name]
        with monkeypatch.context() as later:
            later.setitem(VERSIONS, name, 7)
            for output, file in claims.items():
                with pytest.raises(InputError, match=rf"{output}: begun by ray-ddpm 0.1.0.*{name} 1, now 7"):
                    check_claim(output, read_claim(output, file) or {}, settings)
            with pytest.raises(InputError, match=f"{name} {written}, now 7"):
                checkpoint.read(str(tmp_path / "c"))
            assert checkpoint.read_model(str(tmp_path / "c"))[1] == 0


def test_prepared_data_opens_in_later_releases_and_not_in_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = {"size": 8, "channels": 1, "classes": []}
    shard = {"file": "data/train-00000.parquet", "rows": 3, "row_groups": [3], "bytes": 1, "sha256": ""}
    splits = {"train": {"rows": 3, "shards": [shard]}}
    manifest = {"format": "ray-ddpm-shards", "version": 1, "image": image, "splits": splits}
    manifest |= {"fingerprint": "f", "mean": [0], "std": [1], "quarantined": 0}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for name in VERSIONS:
        with monkeypatch.context() as later:
            later.setitem(VERSIONS, name, 7)
            assert open_dataset(str(tmp_path)).rows == 3
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"versions": VERSIONS | {"format": 9}}))
    with pytest.raises(InputError, match=r"written by a later release of ray-ddpm \(format 9, .*upgrade"):
        open_dataset(str(tmp_path))


def test_models_that_it_registered_load_through_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(database(tmp_path))
    monkeypatch.chdir(tmp_path)
    try:
        (tmp_path / "pyfunc.py").write_text(PYFUNC)
        artifacts = {"model": str(save(tmp_path / "model"))}
        with mlflow.start_run():
            logged = mlflow.pyfunc.log_model(
                name="model", python_model="pyfunc.py", artifacts=artifacts, pip_requirements=["ray-ddpm"]
            )
        loaded = mlflow.pyfunc.load_model(logged.model_uri).unwrap_python_model()
        images = loaded.predict(None, pd.DataFrame({"label": [0, 2]}), {"sampling_steps": 2})
        assert np.asarray(images).shape == (2, 8, 8, 1) and np.asarray(images).dtype == np.uint8
    finally:
        mlflow.set_tracking_uri(before)
