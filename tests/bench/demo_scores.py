"""The demo for benches that score merges by test texts and learn nothing."""

from pathlib import Path

import yaml


def scored_demo(folder: Path) -> Path:
    """The demo's configuration with its test files for validation, as a file in a folder."""
    content = yaml.safe_load(Path("configs/demo.yaml").read_text())
    content["recipe"]["each"]["validation"] = content["recipe"]["each"]["test"]
    content["model"]["objective"] = {"class_path": "trainmerge.Entropy"}  # which records no expert
    config = folder / "demo.yaml"
    config.write_text(yaml.safe_dump(content))
    return config
