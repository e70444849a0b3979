"""Label dropout for guidance is a function of each sample's counters."""

import dataclasses

import torch

from pipeline.data.batch import Batch
from pipeline.diffusion import timesteps
from pipeline.diffusion.timesteps import init_state
from pipeline.training.step import prepare
from tests.training.common import problem

COUNT = 4000


def labels_of(ids: torch.Tensor, dropout: float = 0.3, known: bool = True) -> torch.Tensor:
    config, spec = problem(label_dropout=dropout)
    size = len(ids)
    batch = Batch(
        images=torch.zeros(size, 1, 8, 8, dtype=torch.uint8),
        labels=ids % 2 if known else torch.full((size,), -1),
        ids=ids,
        epochs=torch.zeros(size, dtype=torch.int64),
        weights=torch.ones(size),
    )
    sampler = init_state("uniform", spec.diffusion.timesteps)
    labels = prepare(
        config, spec, timesteps.table(sampler, torch.device("cpu")), batch, torch.device("cpu")
    ).labels
    assert labels is not None
    return labels


def test_the_stated_share_of_labels_is_hidden_and_the_others_are_kept() -> None:
    ids = torch.arange(COUNT)
    labels = labels_of(ids)
    hidden = labels == 2
    assert abs(hidden.float().mean().item() - 0.3) < 4 * (0.3 * 0.7 / COUNT) ** 0.5
    assert (labels[~hidden] == ids[~hidden] % 2).all()
    assert (labels_of(ids, dropout=0.0) == ids % 2).all()


def test_which_labels_are_hidden_does_not_depend_on_the_batch() -> None:
    ids = torch.arange(100)
    parts = torch.cat([labels_of(part) for part in ids.flip(0).split(7)]).flip(0)
    assert (parts == labels_of(ids)).all()


def test_an_image_without_a_label_trains_the_unconditional_model() -> None:
    assert (labels_of(torch.arange(10), dropout=0.0, known=False) == 2).all()


def test_a_model_without_classes_gets_no_labels() -> None:
    config, spec = problem()
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, class_conditional=False))
    batch = Batch(
        torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        torch.tensor([0, 1]),
        torch.arange(2),
        torch.zeros(2),
        torch.ones(2),
    )
    sampler = init_state("uniform", spec.diffusion.timesteps)
    assert (
        prepare(
            config, spec, timesteps.table(sampler, torch.device("cpu")), batch, torch.device("cpu")
        ).labels
        is None
    )
