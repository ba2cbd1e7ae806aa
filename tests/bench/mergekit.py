"""Every method of mergekit's files, by us and by mergekit 0.1.5, on the same bfloat16 models.

Base and three experts of a small Llama of real shapes (`LAYERS` layers of width 256). mergekit computes
most methods in the models' dtype; so each is compared twice: as the file is, `dtype: bfloat16`, and with
mergekit's arithmetic in float32, `dtype: float32, out_dtype: bfloat16`, against `faithful`, where only the
formulas can differ. A distance is in units of the last place of bfloat16 of the largest of both numbers and
the base's. Methods that draw at random are compared by the L1 norm of what they add. CPU time is
that of the merge in a process that has merged before, one thread. Memory of whole exports is in `export`.

`MK=VENV/bin` names an environment with mergekit==0.1.5.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from tests.bench.__main__ import figure

LAYERS = int(os.environ.get("LAYERS", "2"))
EXPERTS = 3
ARITHMETIC = {"weight": [0.3, 0.25, 0.4]}
SETTINGS: Mapping[str, tuple[int, dict, dict]] = {  # number of experts, settings of each, of all
    "linear": (3, ARITHMETIC, {}),
    "slerp": (1, {}, {"t": [0.2, 0.7]}),
    "nuslerp": (2, {"weight": [0.3, 0.25]}, {}),
    "multislerp": (3, ARITHMETIC, {}),
    "karcher": (3, {}, {}),
    "task_arithmetic": (3, ARITHMETIC, {}),
    "ties": (3, ARITHMETIC, {"density": 0.5}),
    "dare_linear": (1, {"weight": [1.0]}, {"density": 0.5}),
    "dare_ties": (1, {"weight": [1.0]}, {"density": 0.5}),
    "breadcrumbs": (3, ARITHMETIC, {"density": 0.9}),
    "breadcrumbs_ties": (3, ARITHMETIC, {"density": 0.9}),
    "della": (1, {"weight": [1.0]}, {"density": 0.5}),
    "della_linear": (1, {"weight": [1.0]}, {"density": 0.5}),
    "sce": (3, {}, {"select_topk": 0.5}),
    "model_stock": (3, {}, {}),
    "arcee_fusion": (1, {}, {}),
    "nearswap": (1, {}, {"t": 0.0005}),
    "ram": (3, {}, {}),
    "ramplus_tl": (3, {}, {}),
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
BASELESS = ("linear", "multislerp", "karcher", "nuslerp")


def write_models(place: Path) -> None:
    """A base and experts, bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=256, intermediate_size=688, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        )
    ).to(torch.bfloat16)  # fmt: skip
    model.save_pretrained(place / "base")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for k in range(EXPERTS):
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(state[name].float() + 1e-3 * torch.randn(tensor.shape))
        model.save_pretrained(place / f"expert{k}")


def document(method: str, place: Path, wide: bool) -> dict:
    """mergekit's file for a method."""
    count, each, shared = SETTINGS[method]
    models = [
        {"model": str(place / f"expert{k}"), "parameters": {key: values[k] for key, values in each.items()}}
        for k in range(count)
    ]
    dtypes = {"dtype": "float32", "out_dtype": "bfloat16"} if wide else {"dtype": "bfloat16"}
    base = {} if method in BASELESS else {"base_model": str(place / "base")}
    return {"merge_method": method, "models": models, "parameters": shared, **base, **dtypes}


def merge_all(place: Path, theirs: bool) -> None:
    """Merge by every method, twice; prints one JSON line per merge."""
    torch.set_num_threads(1)
    side = place / ("theirs" if theirs else "ours")
    merge = by_mergekit if theirs else by_us
    file = place / "document.yml"
    file.write_text(yaml.safe_dump(document("ties", place, False)))
    merge(file, side / "first", False)  # imports everything
    for wide in (False, True):
        for method in SETTINGS:
            file.write_text(yaml.safe_dump(document(method, place, wide)))
            began = time.process_time()
            merge(file, side / f"{method}-{'wide' if wide else 'plain'}", wide)
            seconds = time.process_time() - began
            print(json.dumps({"method": method, "wide": wide, "seconds": seconds}), flush=True)


def by_us(file: Path, out: Path, wide: bool) -> None:
    """Our merge of a file; with mergekit's rules where the arithmetic is the same."""
    import trainmerge as tm

    tm.merge_file(file, out, faithful=wide, dtype="bfloat16")


def by_mergekit(file: Path, out: Path, wide: bool) -> None:
    """mergekit's own merge of a file."""
    del wide
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    configuration = MergeConfiguration.model_validate(yaml.safe_load(file.read_text()))
    run_merge(configuration, str(out), MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()
            if not file.name.startswith("trainmerge")}  # fmt: skip


def apart(ours: Mapping, theirs: Mapping, base: Mapping) -> tuple[float, float, float]:
    """The largest distance in ulp of bfloat16, the largest absolute one, the share of numbers that differ."""
    ulps = absolute = 0.0
    differing = size = 0
    for name, own in ours.items():
        a, b, c = (side[name].double() for side in (ours, theirs, base))
        distance = (a - b.bfloat16().double()).abs()
        unit = 2.0 ** (torch.stack([a, b, c]).abs().amax(0).clamp_min(1e-30).log2().floor() - 7)
        ulps, absolute = max(ulps, float((distance / unit).max())), max(absolute, float(distance.max()))
        differing += int((distance > 0).sum())
        size += own.numel()
    return ulps, absolute, differing / size


def norm(merged: Mapping, base: Mapping) -> float:
    """The L1 norm of what a merge adds."""
    return sum(float((merged[name].double() - base[name].double()).abs().sum()) for name in base)


def run(python: str, place: Path, side: str) -> dict[tuple[str, bool], dict]:
    """One side's merges in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "tests.bench.mergekit", side, str(place)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(line["method"], line["wide"]): line for line in lines}


def main() -> None:
    """Both sides, and their distances."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_models(place)
        ours = run(sys.executable, place, "ours")
        theirs = run(f"{os.environ['MK']}/python", place, "theirs")
        base = tensors(place / "base")
        for method in SETTINGS:
            for wide, word in ((False, "plain"), (True, "wide")):
                pair = [tensors(place / side / f"{method}-{word}") for side in ("ours", "theirs")]
                if method in RANDOM:
                    figure(f"{method}_{word}_l1", norm(pair[0], base) / norm(pair[1], base), "ratio", "")
                    continue
                ulps, absolute, share = apart(*pair, base)
                figure(f"{method}_{word}_ulp", ulps, "ulp", "1" if wide else "")
                figure(f"{method}_{word}_absolute", absolute, "absolute", "")
                figure(f"{method}_{word}_differing", share, "share", "")
            cpu = theirs[method, False]["seconds"] / ours[method, False]["seconds"]
            figure(f"{method}_cpu", cpu, "ratio, theirs over ours", "")
            figure(f"{method}_cpu_seconds", ours[method, False]["seconds"], "s", "")


if __name__ == "__main__":
    match sys.argv[1:]:
        case [side, place]:
            merge_all(Path(place), theirs=side == "theirs")
        case _:
            main()
