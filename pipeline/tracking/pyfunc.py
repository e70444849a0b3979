"""An exported model as an MLflow pyfunc. It is logged as code: MLflow runs this file and unpickles nothing.

    model = mlflow.pyfunc.load_model("models:/NAME@ALIAS")
    images = model.predict(pandas.DataFrame({"label": [3, 1, 4]}), params={"sampling_steps": 50})

Each row asks for one image. The optional column `label` holds its class number. The optional column `index` holds its
number among the samples of the seed, by default the row number. The result is uint8 [N, H, W, C]. See
`pipeline.models.sampling.SERVED` for the parameters and their defaults. The package that computes the images is
stored with the model, as a zip file.
"""

import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch


class ExportedModel(mlflow.pyfunc.PythonModel):
    """Draws samples from an exported model folder."""

    def load_context(self, context: Any) -> None:
        """Loads the model with the package stored beside it, unless this process has imported the package already."""
        if "pipeline" not in sys.modules and (code := context.artifacts.get("code")):
            sys.path.insert(0, code)
        from pipeline import load_model

        self.model, self.spec = load_model(Path(context.artifacts["model"]))

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Samples images; see the module's docstring. Raises ValueError, in one line, for rows that ask for no image."""
        # No type hints, because MLflow would take them for a schema of the input.
        from pipeline.models.sampling import SERVED, sample_images

        if not hasattr(model_input, "columns") or not len(model_input):
            raise ValueError("input: give a DataFrame with one row for each image")
        options = SERVED | (params or {})
        options["sampling_steps"] = min(options["sampling_steps"], self.spec.diffusion.timesteps)
        ids = _whole_numbers(model_input, "index", 2**63)
        labels = _whole_numbers(model_input, "label", len(self.spec.image.classes))
        if ids is None:
            ids = torch.arange(len(model_input))
        images = sample_images(self.model, self.spec, ids, labels=labels, **options)
        return images.permute(0, 2, 3, 1).numpy()


def _whole_numbers(model_input, column, end):  # type: ignore[no-untyped-def]
    """A column as int64 [N]; None if there is no such column."""
    if column not in model_input:
        return None
    if not end:
        raise ValueError(f"input: the model has no classes: leave column {column!r} out")
    try:
        values = np.asarray(model_input[column].astype("int64"))
        exact = (values == np.asarray(model_input[column], np.float64)).all()
    except (TypeError, ValueError, OverflowError):
        exact = False
    if not exact or (values < 0).any() or (values >= end).any():
        raise ValueError(f"input: column {column!r} must hold whole numbers from 0 to {end - 1}")
    return torch.as_tensor(values)


mlflow.models.set_model(ExportedModel())
