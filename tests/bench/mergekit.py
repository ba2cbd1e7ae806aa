"""Every method of mergekit's files, by us and by mergekit 0.1.5, on the same bfloat16 models.

Base and three experts of a small Llama of real shapes (`LAYERS` layers of width 256). mergekit computes
most methods in the models' dtype; so each is compared twice: as the file is, `dtype: bfloat16`, and with
mergekit's arithmetic in float32, `dtype: float32, out_dtype: bfloat16`, against `faithful`, where only the
formulas can differ. A distance is in units of the last place of bfloat16 of the largest of both numbers and
the base's. Methods that rank entries are compared a third time, on float64 models, where no two entries
are equally large. Methods that draw at random are compared by the L1 norm of what they add. CPU
time is that of the merge in a process that has merged before, one thread; memory is how far its anonymous
memory rises in the merge. Memory of whole exports is in `export`.

`MK=VENV/bin` names an environment with mergekit==0.1.5.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from tests.bench.__main__ import figure
from trainmerge.system.memory import anonymous

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
RANKED = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce", "arcee_fusion")
KINDS = ("plain", "wide", "double")  # bfloat16 models: as most files are, and wide sums; float64 models
BASELESS = ("linear", "multislerp", "karcher", "nuslerp")


def write_models(place: Path, dtype: torch.dtype) -> None:
    """A base and experts."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=256, intermediate_size=688, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        )
    ).to(dtype)  # fmt: skip
    model.save_pretrained(place / "base")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for k in range(EXPERTS):
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(state[name].to(wide) + 1e-3 * torch.randn(tensor.shape, dtype=wide))
        model.save_pretrained(place / f"expert{k}")


def document(method: str, root: Path, kind: str) -> dict:
    """mergekit's file for a method."""
    count, each, shared = SETTINGS[method]
    place = root / ("float64" if kind == "double" else "bfloat16")
    models = [
        {"model": str(place / f"expert{k}"), "parameters": {key: values[k] for key, values in each.items()}}
        for k in range(count)
    ]
    dtypes = {
        "plain": {"dtype": "bfloat16"},
        "wide": {"dtype": "float32", "out_dtype": "bfloat16"},
        "double": {},
    }[kind]
    base = {} if method in BASELESS else {"base_model": str(place / "base")}
    return {"merge_method": method, "models": models, "parameters": shared, **base, **dtypes}


def merge_all(place: Path, theirs: bool) -> None:
    """Merge by every method, in every way; prints one JSON line per merge."""
    torch.set_num_threads(1)
    side = place / ("theirs" if theirs else "ours")
    merge = by_mergekit if theirs else by_us
    file = place / "document.yml"
    file.write_text(yaml.safe_dump(document("ties", place, "plain")))
    merge(file, side / "first", False)  # imports everything
    for kind in KINDS:
        for method in RANKED if kind == "double" else SETTINGS:
            file.write_text(yaml.safe_dump(document(method, place, kind)))
            memory, began = Memory(), time.process_time()
            merge(file, side / f"{method}-{kind}", kind != "plain")
            seconds, rise = time.process_time() - began, memory.stop()
            print(json.dumps({"method": method, "kind": kind, "seconds": seconds, "rise": rise}), flush=True)


class Memory:
    """How far this process's anonymous memory rises, looked at every 2 ms by a thread.

    Memory that is free at the start is returned first.
    """

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.start = self.most = anonymous()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self) -> None:
        while not self.ended.wait(0.002):
            self.most = max(self.most, anonymous())

    def stop(self) -> int:
        """End watching; the rise in bytes."""
        self.ended.set()
        self.thread.join()
        return self.most - self.start


def by_us(file: Path, out: Path, wide: bool) -> None:
    """Our merge of a file; with mergekit's rules where the arithmetic is the same."""
    import trainmerge as tm

    tm.merge_file(file, out, faithful=wide)


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


def run(python: str, place: Path, side: str) -> dict[tuple[str, str], dict]:
    """One side's merges in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "tests.bench.mergekit", side, str(place)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(line["method"], line["kind"]): line for line in lines}


def main() -> None:
    """Both sides, and their distances."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for dtype in (torch.bfloat16, torch.float64):
            write_models(place / str(dtype).removeprefix("torch."), dtype)
        ours = run(sys.executable, place, "ours")
        theirs = run(f"{os.environ['MK']}/python", place, "theirs")
        for method in SETTINGS:
            compare(method, place)
            one, other = ours[method, "plain"], theirs[method, "plain"]
            figure(f"{method}_cpu", other["seconds"] / one["seconds"], "ratio, theirs over ours", "")
            figure(f"{method}_cpu_seconds", one["seconds"], "s", "")
            figure(f"{method}_memory", one["rise"] / 1e6, "MB", "")
            figure(f"{method}_memory_theirs", other["rise"] / 1e6, "MB", "")


def compare(method: str, place: Path) -> None:
    """Both sides' merges by a method."""
    for kind in KINDS if method in RANKED else KINDS[:2]:
        base = tensors(place / ("float64" if kind == "double" else "bfloat16") / "base")
        ours, theirs = (tensors(place / side / f"{method}-{kind}") for side in ("ours", "theirs"))
        if method in RANDOM:
            figure(f"{method}_{kind}_l1", norm(ours, base) / norm(theirs, base), "ratio", "")
        elif kind == "double":
            figure(f"{method}_double_relative", relative(ours, theirs), "relative", "1e-12")
        else:
            ulps, absolute, share = apart(ours, theirs, base)
            figure(f"{method}_{kind}_ulp", ulps, "ulp", "1" if kind == "wide" else "")
            figure(f"{method}_{kind}_absolute", absolute, "absolute", "")
            figure(f"{method}_{kind}_differing", share, "share", "")


def relative(ours: Mapping, theirs: Mapping) -> float:
    """The largest distance in a tensor over its largest number, the largest of all tensors."""
    return max(
        float((own.double() - theirs[name].double()).abs().max() / own.abs().max())
        for name, own in ours.items()
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case [side, place]:
            merge_all(Path(place), theirs=side == "theirs")
        case _:
            main()
