"""A fit's step beside fusion_bench's layer-wise AdaMerging: the same models, images, heads and loss.

CLIP ViT-B/32's vision tower with eight experts, every parameter merged, one image a task (or `IMAGES`), one
thread: where merging weighs most. `FB` names the folder of a Python that has fusion-bench 0.2.33 (`pip
install torch fusion-bench==0.2.33` in an environment of its own); `PEER_MODELS` a folder to keep or find the
models in. CPU seconds count; memory is anonymous memory, theirs above the loaded experts, ours above the
imports.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.__main__ import figure

EXPERTS, STEPS, IMAGES = 8, 3, int(os.environ.get("IMAGES", "1"))  # a task and step
CLASSES = (397, 196, 45, 10, 10, 43, 10, 47)  # of SUN397, Cars, RESISC45, EuroSAT, SVHN, GTSRB, MNIST, DTD


def write_models(folder: Path) -> None:
    """Base, experts and data, random, unless they are there."""
    if (folder / "data.safetensors").exists():
        return
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig()).eval()
    model.save_pretrained(folder / "base")
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for k in range(EXPERTS):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(base[name] + 1e-3 * torch.randn(parameter.shape))
        model.save_pretrained(folder / f"expert{k}")
    data = {"visual_projection": torch.randn(512, 768) * 768**-0.5, "logit_scale": torch.tensor([100.0])}
    for k, classes in enumerate(CLASSES):
        data[f"head.t{k}"] = torch.nn.functional.normalize(torch.randn(classes, 512), dim=-1)
        data[f"images.t{k}"] = torch.randn(STEPS * IMAGES, 3, 224, 224)
    save_file(data, folder / "data.safetensors")


def ours(folder: Path) -> dict[str, object]:
    """Steps of the resident merge: CPU seconds, those of merge and gradient, memory, coefficients."""
    import torch
    from safetensors import safe_open
    from transformers import CLIPVisionModel

    import trainmerge as tm
    from tests.bench.fit_step import Clock
    from tests.opening import open_task_vectors
    from trainmerge.checkpoints import open_checkpoint
    from trainmerge.objectives.entropy import entropy
    from trainmerge.system.memory import Peak

    torch.set_num_threads(1)
    data = safe_open(folder / "data.safetensors", "pt")
    projection, scale = data.get_tensor("visual_projection"), data.get_tensor("logit_scale")
    heads = [data.get_tensor(f"head.t{k}") for k in range(EXPERTS)]
    images = [data.get_slice(f"images.t{k}")[: STEPS * IMAGES] for k in range(EXPERTS)]
    merge, inner = Clock(tm.MergedModel._write), Clock(tm.MergedModel._collect)
    tm.MergedModel._write = lambda *given: merge.of(*given)  # type: ignore[method-assign, assignment, return-value]
    tm.MergedModel._collect = lambda *given: inner.of(*given)  # type: ignore[method-assign, assignment, return-value]
    seconds, merging = [], []
    with Peak() as peak:
        base = open_checkpoint(folder / "base")
        vectors = open_task_vectors(base, {f"t{k}": folder / f"expert{k}" for k in range(EXPERTS)})
        coefficients = tm.Coefficients(vectors.experts, tm.Grouping().layout(vectors.shapes), 0.3)
        model = CLIPVisionModel.from_pretrained(folder / "base").train()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        merged = tm.MergedModel(model, vectors, coefficients)
        merged.keep_gradients = True
        optimizer = torch.optim.Adam(coefficients.parameters(), lr=1e-3)
        for step in range(STEPS):
            began, before = time.process_time(), merge.seconds + inner.seconds
            merged.materialise()
            for k in range(EXPERTS):
                pixels = images[k][step * IMAGES : (step + 1) * IMAGES]
                features = torch.nn.functional.normalize(model(pixels).pooler_output @ projection.T, dim=-1)
                entropy(scale * features @ heads[k].T).mean().backward()
            optimizer.zero_grad()
            coefficients.backward(merged.gradient())
            optimizer.step()
            seconds.append(time.process_time() - began)
            merging.append(merge.seconds + inner.seconds - before)
    return {
        "seconds": statistics.median(seconds), "merging": statistics.median(merging), "bytes": peak.grown,
        "names": list(coefficients.layout.groups), "coefficients": coefficients().tolist(),
    }  # fmt: skip


def run(python: str, script: list[str], folder: Path, kernels: str = "eager") -> dict:
    """What a process prints last."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRAINMERGE_KERNELS": kernels
    }  # fmt: skip
    done = subprocess.run(
        [python, *script, str(folder)], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(folder: Path, theirs: str) -> None:
    """Both, one after the other."""
    write_models(folder)
    own, fused = (
        run(sys.executable, ["-m", "tests.bench.peer_fit"], folder, by) for by in ("eager", "compiled")
    )
    # -P: beside that script lies a kernels.py, which transformers would take for the package of that name
    peer = run(theirs, ["-P", "tests/bench/fusion_bench_fit.py"], folder)
    order = [own["names"].index(name) for name in peer["names"]]
    pairs = zip(own["coefficients"], peer["coefficients"], strict=True)
    apart = max(abs(a[i] - b[j]) for a, b in pairs for j, i in enumerate(order))
    images, bar = ("one_image", "1.7") if IMAGES == 1 else (f"{IMAGES}_images", "1")
    for suffix, one in (("", own), ("_compiled", fused)):
        ratio = peer["seconds"] / one["seconds"]
        figure(f"fusion_bench_over_ours_cpu_{images}{suffix}", ratio, "ratio", bar)
        ratio = peer["merging"] / one["merging"]
        figure(f"fusion_bench_over_ours_merge_and_gradient{suffix}", ratio, "ratio", "10")
    figure("ours_over_fusion_bench_memory_above_experts", own["bytes"] / peer["bytes"], "ratio", "0.5")
    figure("fusion_bench_coefficients_apart", apart, f"after {STEPS} steps", "1e-5")


def main() -> None:
    """In `PEER_MODELS`, or a folder that goes away."""
    if not (binaries := os.environ.get("FB")):
        print("peer_fit: left out, FB names no environment with fusion-bench", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(os.environ.get("PEER_MODELS", place))
        compare(folder, str(Path(binaries) / "python"))


if __name__ == "__main__":
    match sys.argv[1:]:
        case [folder]:
            print(json.dumps(ours(Path(folder))))
        case _:
            main()
