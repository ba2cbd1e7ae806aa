"""What learning on smaller task vectors costs: the demo's fit on exact, int8 and ternary ones, and scores.

The experts are the demo's LoRA adapters, merged to full checkpoints first: low-rank ones are small already.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from tests.bench.__main__ import figure

FORMS = {
    "exact": "null",
    "int8": "{class_path: trainmerge.Int8}",
    "ternary": "{class_path: trainmerge.Ternary, init_args: {density: 0.2}}",
}


def merged_adapters(place: Path) -> Path:
    """The demo's configuration with full experts."""
    from peft import PeftModel
    from transformers import AutoModel

    from trainmerge.run.config import read_settings

    config = read_settings(Path("configs/demo.yaml"))
    base = config["recipe"]["base"]
    for name, expert in config["recipe"]["experts"].items():
        folder = place / name
        PeftModel.from_pretrained(AutoModel.from_pretrained(base), expert["path"]).merge_and_unload(
            safe_merge=True
        ).save_pretrained(folder)
        expert["path"] = str(folder)
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    return place / "config.yaml"


def trainmerge(*arguments: str) -> None:
    """Run one command; its output goes to stderr, where figures are not."""
    subprocess.run([sys.executable, "-m", "trainmerge.cli", *arguments], check=True, stdout=sys.stderr)


def main() -> None:
    """Three fits, their scores, coefficients and files."""
    import trainmerge as tm

    with tempfile.TemporaryDirectory() as place:
        config = merged_adapters(Path(place))
        recipe = yaml.safe_load(config.read_text())["recipe"]
        files = [Path(expert["path"], "model.safetensors") for expert in recipe["experts"].values()]
        sizes = {"exact": sum(file.stat().st_size for file in files)}
        found = {}
        for form, quantise in FORMS.items():
            run = Path(place) / f"run-{form}"
            trainmerge("fit", "--config", str(config), "--run", str(run), "--model.quantise", quantise)
            trainmerge("evaluate", str(run), "--compare", "false")
            found[form] = tm.load_coefficients(run / "coefficients.safetensors")().detach()
            score = json.loads((run / "scores.json").read_text())["learned"]["mean"]
            figure(f"quantised_{form}_accuracy", score, "accuracy", "")
            for file in (run / "workspace").glob("quantised-*"):
                sizes[form] = file.stat().st_size
            apart = (found[form] - found["exact"]).abs()
            if form != "exact":
                figure(f"quantised_{form}_coefficients_apart", float(apart.mean()), "mean", "")
                figure(f"quantised_{form}_bytes", sizes[form] / sizes["exact"], "of the experts'", "")


if __name__ == "__main__":
    main()
