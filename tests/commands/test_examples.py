"""The example settings are ones that a job takes."""

from pipeline.commands import cli
from pipeline.config import ImageConfig, ModelSpec, TrainConfig
from pipeline.models.unet import build
from tests.jobs.common import ROOT


def test_the_recipe_for_cifar10_is_the_papers() -> None:
    config = cli.parse(TrainConfig, ["--config", str(ROOT / "examples" / "cifar10.yaml")], "train", "")
    image = ImageConfig(32, 3)
    parameters = build(ModelSpec(config.model, image, config.diffusion)).parameters()
    # Ho et al. 2020, appendix B: 35.7 million. Scale-shift doubles the projections of the time embedding.
    assert 35.7e6 < sum(p.numel() for p in parameters) < 39e6
    assert (config.steps, config.batch_size, config.optimizer.learning_rate) == (800_000, 128, 2e-4)
