"""What the measurements of mixtures share: training, fitting, shrinking."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import trainmerge as tm
from trainmerge.checkpoints.meta_model import quiet
from trainmerge.run.recipe_files import calibration_files

PLANS = {
    "reap": ("reap", 0),
    "ream": ("ream", 0),
    "learned_rows": ("reap", 150),
    "learned": ("ream", 150),
}  # plan, steps


def train(
    model: nn.Module, draw: Callable[[torch.Generator], Tensor], steps: int, rate: float, seed: int
) -> nn.Module:
    """AdamW on the token ids [B, T] of `draw`."""
    dice = torch.Generator().manual_seed(seed)
    solver = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for step in range(steps):
        for group in solver.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 - step / steps)
        ids = draw(dice)
        model(input_ids=ids, labels=ids).loss.backward()
        solver.step()
        solver.zero_grad()
    return model.eval()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """In this context what is printed goes to stderr: stdout is for figures."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@silent()
def fit(recipe: tm.Recipe, run: Path, steps: int, initial: float = 0.5, length: int = 48) -> Path:
    """A run of Alignment."""
    module = tm.MergeModule(
        recipe,
        tm.Alignment(),
        initial=initial,
        optimizer=partial(torch.optim.Adam, lr=0.02),
        workspace=str(run / "workspace"),
    )
    trainer = tm.make_trainer(run, max_steps=steps, accelerator="cpu", enable_progress_bar=False)
    data = tm.Calibration(calibration_files(recipe), recipe.base, batch_size=4, max_length=length)
    tm.fit(module, data, trainer, run)
    return run


def shrunk(folder: Path, experts: int, texts: Path, held_out: Tensor, out: Path) -> dict[str, float]:
    """Log-perplexity of held-out token ids [B, T], of a mixture and of it with fewer experts by plan."""
    found = {}
    for name, (plan, steps) in {"whole": ("", 0), **PLANS}.items():
        made = folder
        if plan:
            with silent():
                made = tm.shrink(folder, out / name, experts, str(texts), plan, steps=steps)
        with quiet(), torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(made).eval()
            found[name] = float(model(input_ids=held_out, labels=held_out).loss)
    return found
