"""The exported model as an MLflow pyfunc, logged as code: MLflow runs this file, and unpickles nothing.

    model = mlflow.pyfunc.load_model("models:/NAME@ALIAS")
    images = model.predict(pandas.DataFrame({"label": [3, 1, 4]}), params={"sampling_steps": 50})

Each row asks for one image: column `label` (class index, optional), column `index` (which sample of the
seed, optional; the row number by default). The answer is uint8 [N, H, W, C].
"""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch


class ExportedModel(mlflow.pyfunc.PythonModel):
    """Draws samples from an exported model folder."""

    def load_context(self, context: Any) -> None:
        from pipeline import load_model

        self.model, self.spec = load_model(Path(context.artifacts["model"]))

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        # Without type hints: MLflow takes them for a schema of the input.
        from pipeline import sample_images

        options = {"sampler": "ddim", "eta": 1.0, "sampling_steps": 50, "seed": 0, "guidance": 1.0} | (
            params or {}
        )
        rows = len(model_input)
        labels = (
            torch.as_tensor(np.asarray(model_input["label"], np.int64)) if "label" in model_input else None
        )
        ids = torch.as_tensor(
            np.asarray(model_input["index"], np.int64) if "index" in model_input else np.arange(rows)
        )
        images = sample_images(self.model, self.spec, ids, labels=labels, **options)
        return images.permute(0, 2, 3, 1).numpy()


mlflow.models.set_model(ExportedModel())
