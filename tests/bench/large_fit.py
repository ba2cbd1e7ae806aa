"""One step of a fit on a model of 1.5 billion bfloat16 weights with three full experts, within 6 GB.

Names and shapes are Qwen2-1.5B's, numbers are random and repeat: neither time nor memory depends on
them. What counts is the process's whole anonymous memory, libraries included; the 12 GB of files are mapped.
Needs 13 GB of disk.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.bench.__main__ import figure
from tests.world import WORDS, write_tokenizer

EXPERTS, TOKENS, LIMIT = 3, 128, "6GB"
POOL = 1 << 24  # random numbers that every weight is cut from


def write_checkpoint(folder: Path, seed: int) -> None:
    """A configuration and weights; experts (seeds from 1) are near the base (seed 0)."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from trainmerge.storage import write_safetensors

    config = Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=2048,
        tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Qwen2ForCausalLM(config).named_parameters()}
    pool = 0.02 * torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    own = pool + 1e-3 * torch.randn(POOL, generator=torch.Generator().manual_seed(seed)) if seed else pool
    narrow = own.bfloat16()

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for i, (name, shape) in enumerate(shapes.items()):
            count = shape.numel()
            numbers = narrow.roll(i).repeat(-(-count // POOL))[:count]
            yield name, numbers.view(shape) if len(shape) > 1 else numbers.abs() + 0.5

    specs = {name: (torch.bfloat16, tuple(shape)) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", specs, weights(), {"format": "pt"})
    write_tokenizer(folder)


def step(folder: Path) -> dict[str, float]:
    """One step of the fit, in this process."""
    import time

    import trainmerge as tm
    from trainmerge.memory import Peak
    from trainmerge.recipe import calibration_files

    began = time.process_time()
    with Peak() as peak:
        texts = folder / "texts.jsonl"
        experts = {f"e{k}": tm.Expert(str(folder / f"e{k}"), str(texts)) for k in range(1, EXPERTS + 1)}
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
        folder = Path(place)
        for k in range(EXPERTS + 1):
            write_checkpoint(folder / (f"e{k}" if k else "base"), k)
        text = json.dumps({"text": " ".join(WORDS[i % len(WORDS)] for i in range(TOKENS))})
        (folder / "texts.jsonl").write_text(f'{text}\n{text[:-3]} cat"}}\n')
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
