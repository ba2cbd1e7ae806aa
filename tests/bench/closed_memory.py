"""Peak memory of merging three experts of 500 M bfloat16 parameters without learning, tensor by tensor.

Task arithmetic, TIES, DARE and TSV-M, each by a fit of no steps and its export, in a process of its own. The
checkpoints are random numbers with the names and shapes of a Llama; memory is counted as in `fit_memory`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.__main__ import figure
from trainmerge.memory import Peak

LAYERS, HIDDEN, MIDDLE, VOCABULARY, EXPERTS = 28, 1024, 4096, 32000, 3
METHODS = ("linear", "ties", "dare", "tsv")


def write_checkpoint(folder: Path, seed: int, scale: float) -> None:
    """A Llama's configuration and random weights, written as they are drawn; experts are near the base."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainmerge.storage import write_safetensors

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=MIDDLE, num_hidden_layers=LAYERS,
        num_attention_heads=16, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            value = 0.02 * torch.randn(shape, generator=base)
            if seed:
                value += scale * torch.randn(shape, generator=own)
            yield name, value.bfloat16()

    specs = {name: (torch.bfloat16, tuple(shape)) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", specs, weights(), {"format": "pt"})


def merge(method: str, folder: Path) -> dict[str, float]:
    """A fit of no steps and its export."""
    import trainmerge as tm

    steps = {"linear": [], "ties": [tm.Ties()], "dare": [tm.Dare()], "tsv": [tm.Tsv()]}[method]
    experts = {f"e{k}": tm.Expert(str(folder / f"e{k}")) for k in range(1, EXPERTS + 1)}
    recipe = tm.Recipe(str(folder / "base"), experts, preprocess=steps)
    run = folder / f"run-{method}"
    with Peak() as peak:
        start = time.process_time()
        module = tm.MergeModule(recipe, initial=0.3, workspace=str(run / "workspace"))
        trainer = tm.make_trainer(run, max_steps=0, accelerator="cpu", enable_progress_bar=False)
        tm.fit(module, tm.Calibration({}, recipe.base), trainer, run)
        tm.export_run(run, folder / f"merged-{method}")
        seconds = time.process_time() - start
    return {"bytes": peak.grown, "seconds": seconds}


def main() -> None:
    """Write the checkpoints, then one process a method."""
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    with tempfile.TemporaryDirectory() as place:
        for k in range(EXPERTS + 1):
            folder = Path(place) / (f"e{k}" if k else "base")
            folder.mkdir()
            write_checkpoint(folder, k, 1e-3)
        for method in METHODS:
            command = [sys.executable, "-m", "tests.bench.closed_memory", method, place]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            got = json.loads(done.stdout.splitlines()[-1])
            figure(f"closed_peak_{method}", got["bytes"] / 1e9, "GB", "1.5")
            figure(f"closed_cpu_seconds_{method}", got["seconds"], "s", "")


if __name__ == "__main__":
    match sys.argv[1:]:
        case [method, place]:
            print(json.dumps(merge(method, Path(place))))
        case _:
            main()
