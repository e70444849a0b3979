"""Print the distances of pytorch-fid, clean-fid and torch-fidelity as JSON, in a process of its own.

    python references.py FOLDER FEATURES.npz

These packages import torchvision for networks and image files. Neither is used here, so an empty module replaces it.
"""

import json
import sys
from typing import Any
from unittest.mock import MagicMock

import numpy as np


def figures(real: np.ndarray, fake: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """Return the figures by name of figure and package.

    Args:
        real, fake: features [N, D], equally many on each side.
        logits: class logits of images [N, classes], for an Inception Score in five parts.
    """
    import torch
    from cleanfid import fid as cleanfid
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    sides = [(side.mean(axis=0), np.cov(side, rowvar=False)) for side in (real, fake)]
    tensors = [torch.from_numpy(fake), torch.from_numpy(real)]
    # One subset holds all images, since each package draws smaller subsets in its own way.
    kernel = kid_features_to_metric(*tensors, kid_subsets=1, kid_subset_size=len(real), verbose=False)
    shares = prc_features_to_metric(*tensors, prc_neighborhood=3, verbose=False)
    score = isc_features_to_metric(torch.from_numpy(logits), splits=5, shuffle=False)
    return {
        "frechet": {
            "pytorch-fid": calculate_frechet_distance(*sides[0], *sides[1]),
            "clean-fid": cleanfid.frechet_distance(*sides[0], *sides[1]),
            "torch-fidelity": fid_statistics_to_metric(
                *(fid_features_to_statistics(side) for side in tensors), verbose=False
            )["frechet_inception_distance"],
        },
        "kernel": {
            "clean-fid": cleanfid.kernel_distance(real, fake, num_subsets=1, max_subset_size=len(real)),
            "torch-fidelity": kernel["kernel_inception_distance_mean"],
        },
        "precision": {"torch-fidelity": shares["precision"]},
        "recall": {"torch-fidelity": shares["recall"]},
        "inception_score": {"torch-fidelity": score["inception_score_mean"]},
        "inception_score_std": {"torch-fidelity": score["inception_score_std"]},
    }


if __name__ == "__main__":
    sys.path.append(sys.argv[1])
    inside = ("", ".datasets", ".transforms", ".transforms.functional")
    sys.modules |= {f"torchvision{name}": MagicMock() for name in inside}
    with np.load(sys.argv[2]) as file:
        print(json.dumps(figures(file["real"], file["fake"], file["logits"])))
