"""Three fits' coefficients and three closed forms' exports on the fixtures' models, bit by bit.

    python -m tests.golden OUT             write what this commit computes on this machine
    python -m tests.golden --compare A B   which bits of two such folders differ
    python -m tests.golden --keep          write `fixtures/golden`, with tolerances for other processors

A refactor leaves every bit as it was: run it before and after on one machine.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import trainmerge as tm
from tests.tolerances import DRAWS, perturbed, spread

WORLD = Path(__file__).parent / "fixtures" / "old_runs"
GOLDEN = Path(__file__).parent / "fixtures" / "golden"
STEPS = 5
TENSOR = tm.Grouping()
CHUNK = tm.Grouping("chunk", chunks=4)
Tensors = dict[str, Tensor]


def encoder(world: Path) -> tm.Recipe:
    """LoRA and full experts of an encoder, as the demo has them."""
    experts = {
        task: tm.Expert(
            str(world / "bert/experts" / task),
            str(world / f"bert/{task}/calibration.jsonl"),
            head=tm.LabelHead(str(world / f"bert/{task}/labels.json")),
        )
        for task in ("mood", "colour", "animal")
    }
    return tm.Recipe(
        str(world / "bert/base"), experts, grouping=tm.Grouping(exclude=["embeddings.*", "pooler.*"])
    )


def language(world: Path, *preprocess: tm.Preprocess, grouping: tm.Grouping = TENSOR) -> tm.Recipe:
    """Two full experts of a language model."""
    experts = {n: tm.Expert(str(world / "llama" / n), str(world / f"llama/{n}.jsonl")) for n in "ab"}
    return tm.Recipe(str(world / "llama/base"), experts, preprocess, grouping)


def fitted(recipe: tm.Recipe, objective: tm.Objective, run: Path, steps: int = STEPS) -> Path:
    """A run of a few steps of Adam, on one thread: another number sums in another order."""
    torch.set_num_threads(1)
    module = tm.MergeModule(
        recipe,
        objective,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.05),
        workspace=str(run / "workspace"),
    )
    files = {name: str(expert.calibration) for name, expert in recipe.experts.items()}
    data = tm.Calibration(files, recipe.base, batch_size=4, max_length=16)
    trainer = tm.make_trainer(run, max_steps=steps, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, run)
    return run


def learned(recipe: tm.Recipe, objective: tm.Objective, run: Path) -> Tensors:
    """The coefficients after the first steps."""
    file = fitted(recipe, objective, run) / "coefficients.safetensors"
    return {"coefficients": tm.load_coefficients(file)().detach()}


def closed(recipe: tm.Recipe, run: Path) -> Tensors:
    """The weights of a merge that nothing is learned for."""
    fitted(recipe, tm.Entropy(), run, steps=0)
    tm.export_run(run, run / "merged")
    return load_file(run / "merged" / "model.safetensors")


CASES: dict[str, Callable[[Path, Path], Tensors]] = {
    "entropy": lambda world, run: learned(encoder(world), tm.Entropy(agreement=5.0), run),
    "alignment": lambda world, run: learned(language(world), tm.Alignment(hidden=1.0, layers=[1]), run),
    "chunks": lambda world, run: learned(language(world, tm.Ties(0.5), grouping=CHUNK), tm.Entropy(), run),
    "ties": lambda world, run: closed(language(world, tm.Ties(0.5)), run),
    "tsv": lambda world, run: closed(language(world, tm.Tsv()), run),
    "regmean": lambda world, run: closed(language(world, tm.RegMean()), run),
}


def results(case: str, world: Path = WORLD) -> Tensors:
    """What this commit computes."""
    with tempfile.TemporaryDirectory() as place:
        return CASES[case](world, Path(place) / "run")


def write(out: Path) -> None:
    """A file for each case."""
    out.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        save_file(results(case), out / f"{case}.safetensors")


def differing(a: Path, b: Path) -> list[str]:
    """Cases and tensors whose bits differ."""
    found = []
    for case in CASES:
        first, second = (load_file(folder / f"{case}.safetensors") for folder in (a, b))
        names = sorted(first.keys() | second.keys())
        found += [f"{case}: {name}" for name in names if not _same_bits(first.get(name), second.get(name))]
    return found


def _same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numpy().tobytes() == b.numpy().tobytes()


def keep(out: Path = GOLDEN) -> None:
    """A file for each case, with tolerances: how far it moves when every weight is off by what sums round."""
    write(out)
    with tempfile.TemporaryDirectory() as place:
        worlds = [perturbed(WORLD, Path(place) / str(draw), draw) for draw in range(DRAWS)]
        for case in CASES:
            file = out / f"{case}.safetensors"
            here, draws = load_file(file), [results(case, world) for world in worlds]
            tolerances = {f"tolerance/{n}": spread(t, [draw[n] for draw in draws]) for n, t in here.items()}
            save_file(here | tolerances, file)


def main(arguments: list[str]) -> int:
    """Write, compare or keep."""
    match arguments:
        case ["--compare", a, b]:
            different = differing(Path(a), Path(b))
            print("\n".join(different) or "the same bits")
            return int(bool(different))
        case ["--keep"]:
            keep()
        case [out]:
            write(Path(out))
        case _:
            print(__doc__)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
