"""One step of a fit on a model of 1.5 billion bfloat16 weights with three full experts, within 6 GB.

A Llama of Qwen2-1.5B's sizes with random numbers: neither time nor memory depends on them. What counts is the
process's whole anonymous memory, libraries included; the 12 GB of files are mapped. Needs 13 GB of disk.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.__main__ import figure

EXPERTS, TOKENS, LIMIT = 3, 64, "6GB"


def write(folder: Path) -> None:
    """Base and experts."""
    from transformers import LlamaConfig

    from tests.bench.random_model import write_family

    config = LlamaConfig(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=2048,
        tie_word_embeddings=True, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    write_family(folder, config, EXPERTS, TOKENS)


def step(folder: Path) -> dict[str, float]:
    """One step of the fit, in this process."""
    import trainmerge as tm
    from trainmerge.run.recipe_files import calibration_files
    from trainmerge.system.memory import Peak

    began = time.process_time()
    with Peak() as peak:
        texts = str(folder / "texts.jsonl")
        experts = {f"e{k}": tm.Expert(str(folder / f"e{k}"), texts) for k in range(1, EXPERTS + 1)}
        recipe = tm.Recipe(str(folder / "base"), experts)
        module = tm.MergeModule(recipe, workspace=str(folder / "run" / "workspace"))
        data = tm.Calibration(calibration_files(recipe), recipe.base, batch_size=1, max_length=TOKENS)
        trainer = tm.make_trainer(folder / "run", max_steps=1, accelerator="cpu", enable_progress_bar=False)
        tm.fit(module, data, trainer, folder / "run", memory=LIMIT)
    metrics = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return {"peak": peak.highest, "seconds": time.process_time() - began, "steps": len(metrics)}


def main() -> None:
    """Write the checkpoints, then fit in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        write(Path(place))
        command = [sys.executable, "-m", "tests.bench.large_fit", place]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        *said, last = done.stdout.splitlines()
        print("\n".join(line for line in said if line.startswith("memory")), file=sys.stderr)
        got = json.loads(last)
        assert got["steps"] == 1
        figure("large_fit_peak_gb", got["peak"] / 1e9, "GB", "6")
        figure("large_fit_cpu_seconds", got["seconds"], "s", "")


if __name__ == "__main__":
    match sys.argv[1:]:
        case [place]:
            print(json.dumps(step(Path(place))))
        case _:
            main()
