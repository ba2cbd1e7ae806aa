"""The peak of a fit on the device over what its plan says, on random checkpoints."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import trainmerge as tm
from tests.bench.random_model import write_family
from tests.gpu.llamas import SIZES, TINY
from tests.gpu.setting import Row, Setting, row
from trainmerge.kernels import using
from trainmerge.plan.devices import device_named
from trainmerge.run.recipe_files import calibration_files
from trainmerge.system.memory import Peak

EXPERTS, TOKENS, STEPS = 3, 256, 2


def run(setting: Setting) -> Iterator[Row]:
    """A ratio of each size and backend."""
    sizes = {"tiny": TINY} if setting.tiny else {name: SIZES[name] for name in ("135M", "1.5B")}
    for name, shape in sizes.items():
        with tempfile.TemporaryDirectory() as place:
            write(Path(place), shape, setting)
            for backend in setting.backends:
                with using(backend):
                    ratio = planned_over_measured(Path(place), backend, setting)
                yield row(f"plan_over_measured_{backend}_{name}", ratio, "of allocated bytes")


def write(folder: Path, shape: dict[str, object], setting: Setting) -> None:
    """Base and experts in bfloat16, and texts."""
    from transformers import LlamaConfig

    config = LlamaConfig(**shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    write_family(folder, config, EXPERTS, 8 if setting.tiny else TOKENS)


def planned_over_measured(folder: Path, name: str, setting: Setting) -> float:
    """Of one fit of some steps."""
    texts = str(folder / "texts.jsonl")
    experts = {f"e{k}": tm.Expert(str(folder / f"e{k}"), texts) for k in range(1, EXPERTS + 1)}
    recipe, run_folder = tm.Recipe(str(folder / "base"), experts), folder / f"run-{name}"
    module = tm.MergeModule(recipe, workspace=str(run_folder / "workspace"))
    data = tm.Calibration(calibration_files(recipe), recipe.base, batch_size=2, max_length=TOKENS)
    trainer = tm.make_trainer(
        run_folder, max_steps=STEPS, accelerator="gpu" if setting.cuda else "cpu", devices=1,
        enable_progress_bar=False,
    )  # fmt: skip
    plan = tm.plan_fit(module, data, device=device_named("h100") if setting.cuda else None)
    if not setting.cuda:
        with Peak() as peak:
            tm.fit(module, data, trainer, run_folder)
        return (plan.total - plan.before) / max(1, peak.grown)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(setting.device)
    before = torch.cuda.memory_allocated(setting.device)
    tm.fit(module, data, trainer, run_folder)
    return plan.total / (torch.cuda.max_memory_allocated(setting.device) - before)
