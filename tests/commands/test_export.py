"""Export of any MODEL in either form to any storage, with a card. diffusers samples our images from it."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDPMPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline import storage
from pipeline.cluster.pool import in_process
from pipeline.commands import evaluate, generate, plot
from pipeline.commands import export as export_job
from pipeline.commands.__main__ import main
from pipeline.config import DiffusionConfig, ImageConfig, ModelSpec, to_dict
from pipeline.errors import InputError
from pipeline.evaluation.config import EvaluateConfig
from pipeline.generation.config import GenerateConfig
from pipeline.models.export import load_model, model_fingerprint, save_model
from pipeline.models.sampling import sample_images
from pipeline.rng import Purpose, normal
from pipeline.tracking import registry, runs
from tests.jobs.common import database
from tests.models.test_unet import SMALL, randomised

FACTS = {"data": "hf://datasets/ylecun/mnist", "data_fingerprint": "f" * 64, "steps": 3, "batch_size": 8}
SPEC = ModelSpec(SMALL, ImageConfig(8, 3), DiffusionConfig(schedule="cosine", timesteps=10), FACTS)
NAMES = ("cat | <b>", "dog\n---\nlicense: evil")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database(tmp_path))
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", randomised(SPEC).state_dict(), SPEC)
    return tmp_path


def export(capfd: pytest.CaptureFixture[str], *flags: object) -> dict[str, Any]:
    code = main(["export", *map(str, flags)])
    out, err = capfd.readouterr()
    assert code == 0, err
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def refused(capfd: pytest.CaptureFixture[str], *flags: object) -> str:
    assert main(["export", *map(str, flags)]) == 2
    out, err = capfd.readouterr()
    assert not out
    assert err.count("\n") == 1
    return err


def front_matter(folder: str) -> dict[str, Any]:
    card = storage.read_bytes(f"{folder}/README.md").decode()
    content: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return content


@pytest.mark.parametrize("pipeline_class", [DDPMPipeline, DDIMPipeline])
def test_diffusers_pipelines_give_our_images_from_a_registered_model(
    pipeline_class: Any, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The noise of diffusers is replaced by ours, which is a function of step and sample."""
    registry.log_model(runs.start_run("e", "r", {}), home / "model", "digits", "newest")
    done = export(capfd, "--model", "models:/digits@newest", "--to", "diffusers", "--output", "out")
    assert done == {"output": "out", "model": "models:/digits/1", "count": 5}
    assert front_matter("out") == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", "ddpm", "ray-ddpm", "diffusers"],
        "datasets": ["ylecun/mnist"],
    }
    with safe_open("out/unet/diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}

    ids, step = torch.arange(4), iter(range(100))

    def ours(shape: Any, *_: Any, **__: Any) -> torch.Tensor:
        return normal(5, next(step), ids, Purpose.SAMPLING, tuple(shape[1:]))

    pipeline = pipeline_class.from_pretrained("out")
    pipeline.set_progress_bar_config(disable=True)
    kind = "ddpm" if pipeline_class is DDPMPipeline else "ddim"
    ddim = {"use_clipped_model_output": True, "eta": 0.0} if kind == "ddim" else {}
    with (
        patch(f"diffusers.pipelines.{kind}.pipeline_{kind}.randn_tensor", ours),
        patch(f"diffusers.schedulers.scheduling_{kind}.randn_tensor", ours),
    ):
        images = pipeline(4, num_inference_steps=10, output_type="np", **ddim).images
    theirs = torch.from_numpy(images * 255).round().permute(0, 3, 1, 2)
    model, spec = load_model(home / "model")
    sampler: Any = "ancestral" if kind == "ddpm" else "ddim"
    mine = sample_images(model, spec, ids, sampler=sampler, sampling_steps=10, seed=5)
    assert mine.float().std() > 30
    assert (mine - theirs).abs().max() <= 1  # diffusers keeps alpha_bar in float32


def test_the_card_of_a_class_conditional_model_says_how_it_is_sampled(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The card's code is run as printed. Names of classes are shown as text, whatever characters they hold."""
    config = replace(SMALL, class_conditional=True)
    spec = ModelSpec(config, ImageConfig(8, 3, NAMES), SPEC.diffusion, FACTS | {"data": "<i>|x"})
    save_model(home / "conditional", randomised(spec).state_dict(), spec)
    for form in ("diffusers", "safetensors"):
        export(capfd, "--model", "conditional", "--to", form, "--output", form)
        card = (home / form / "README.md").read_text()
        assert set(front_matter(form)) == {"library_name", "pipeline_tag", "tags"}
        assert "<b>" not in card.replace("\\<b\\>", "")
        assert "<i>" not in card.replace("\\<i\\>", "")
        assert "\nlicense" not in card
    code = "\n".join(re.findall(r"^ {4}(.*)$", (home / "diffusers" / "README.md").read_text(), re.MULTILINE))
    found: dict[str, Any] = {}
    exec(code.replace("this-folder", "diffusers"), found)
    assert found["images"].shape == (16, 3, 8, 8)
    assert found["images"].dtype == torch.uint8


@pytest.mark.parametrize("place", ["disk", "object store"])
def test_safetensors_are_the_model_itself_anywhere(
    place: str, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = "out" if place == "disk" else f"memory://{home}/out"
    for _ in range(2):  # the second export replaces the first
        done = export(capfd, "--model", home / "model", "--to", "safetensors", "--output", output)
        assert done["count"] == 3
    assert model_fingerprint(output) == model_fingerprint(home / "model")
    assert load_model(output)[1] == SPEC
    assert front_matter(output)["library_name"] == "ray-ddpm"
    files = [file.rpartition("/")[2] for file in storage.list_files(output)]
    assert files == ["README.md", "config.json", "model.safetensors"]


def test_a_model_of_0_1_0_is_exported_as_it_is_with_the_format_that_others_ask_for(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (home / "old").mkdir()
    save_file(randomised(SPEC).state_dict(), home / "old" / "model.safetensors")
    (home / "old" / "config.json").write_text(json.dumps(to_dict(SPEC)))
    export(capfd, "--model", "old", "--to", "safetensors", "--output", "new")
    with safe_open(home / "new" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "config.json": (home / "old" / "config.json").read_text()}
    old, new = (load_file(home / name / "model.safetensors") for name in ("old", "new"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert load_model("new")[1] == SPEC


def test_what_cannot_be_exported_gets_one_line_and_nothing_is_written(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (home / "mine").mkdir()
    (home / "mine" / "README.md").write_text("mine")
    (home / "mine" / "setup.py").write_text("mine")
    learned = ModelSpec(SMALL, SPEC.image, DiffusionConfig(timesteps=10, variance="learned_range"))
    save_model(home / "learned", randomised(learned).state_dict(), learned)

    def digest() -> str:
        files = sorted(path for path in home.rglob("*") if path.is_file() and "mlflow" not in path.name)
        return hashlib.sha256(b"".join(str(path).encode() + path.read_bytes() for path in files)).hexdigest()

    before = digest()
    for flags, says in (
        (["--model", "model", "--output", "mine"], "setup.py, which does not belong to this export"),
        (["--model", "model", "--output", "model/x"], "--output model/x lies inside --model model"),
        (["--model", "model", "--output", "learned"], "config.json, which does not belong to this export"),
        (["--model", "learned", "--output", "out"], "variance learned_range can't be exported"),
        (["--model", "nowhere", "--output", "out"], "--model nowhere: no such folder"),
        (
            ["--model", "model", "--to", "onnx", "--output", "out"],
            "--to onnx: give one of diffusers, safetensors",
        ),
        (["--model", "model", "--output", "mine/setup.py"], "is a file, not a folder"),
    ):
        assert says in refused(capfd, *flags)
        assert digest() == before


@pytest.mark.parametrize("job", ["export", "plot", "evaluate", "generate"])
def test_no_job_takes_a_model_whose_weights_are_not_finite(
    job: str, home: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = randomised(SPEC).state_dict()
    broken["conv_out.weight"][0] = float("nan")
    save_model(home / "broken", broken, SPEC)
    execute, config = {
        "export": (export_job.execute, export_job.ExportConfig("broken", "out")),
        "plot": (plot.execute, plot.PlotConfig("broken", str(digits), "out")),
        "evaluate": (evaluate.execute, EvaluateConfig("broken", str(digits), output="out")),
        "generate": (
            generate.execute,
            GenerateConfig("broken", "out", count=2, batch_size=2, rows_per_file=2),
        ),
    }[job]
    monkeypatch.setattr("pipeline.generation.job.actor_pool", lambda config: in_process)
    with pytest.raises(
        InputError, match=r"broken: the model's weights are not finite \(1 tensors, the first is conv_out"
    ):
        execute(config)  # type: ignore[operator]
    assert not [
        path for path in home.glob("out/**/*") if path.suffix in (".png", ".parquet", ".safetensors", ".csv")
    ]
