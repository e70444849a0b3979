"""What 0.1.0 wrote goes on working: its flags, the fields of its files, the models that it registered."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest

from pipeline.commands import cli
from pipeline.config import TrainConfig, from_dict, to_dict
from pipeline.evaluation.config import EvaluateConfig
from pipeline.tuning import ledger
from pipeline.tuning.space import apply, parse_space
from tests.generation.common import save
from tests.jobs.common import database

# The script that 0.1.0 logged with every model, without its comments.
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
