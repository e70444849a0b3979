"""The README.md of a generated dataset, with the front matter that `datasets.load_dataset` reads."""

from typing import Any

from pipeline.config import ModelSpec
from pipeline.generation.config import GenerateConfig


def dataset_card(manifest: dict[str, Any], config: GenerateConfig, spec: ModelSpec) -> str:
    """A dataset card in Markdown."""
    files = {"parquet": "data/*.parquet", "webdataset": "data/*.tar", "png": "**/*.png"}[config.format]
    size, settings = spec.image.size, manifest["settings"]
    rows = "".join(f"| {key} | {value} |\n" for key, value in settings.items())
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {files}\n"
        "tags: [synthetic, ddpm]\n---\n\n"
        f"# {manifest['count']:,} generated images of {size}x{size} pixels\n\n"
        f"Sampled by ray-ddpm {manifest['version']} from `{manifest['model']}`. Sample *i* is a function of the "
        "settings below and of *i*; checksums are in manifest.json.\n\n"
        f"| setting | |\n| --- | --- |\n{rows}"
    )
