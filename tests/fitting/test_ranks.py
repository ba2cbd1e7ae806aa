"""One fit on 1, 2 and 4 processes: the same coefficients, data parallel and sharded.

`run` spawns the processes; each of them does many fits one after another, so that tests only compare.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchjd.aggregation import MGDA, CAGrad, Mean, PCGrad

import trainmerge as tm
from tests.bounds import fitted_bound
from tests.ranks import Ranks, run, sound
from tests.stand_in import CountedLink, behind
from tests.world import languages_recipe, recipe, write_languages, write_world
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.prepare import FitInputs
from trainmerge.model import merged_weights, teacher_recorder
from trainmerge.run.folder import RunFolder
from trainmerge.run.recipe_files import calibration_files
from trainmerge.system import distributed
from trainmerge.task_vectors.link import link_to

pytestmark = pytest.mark.long

STEPS, RATE = 3, 0.05


def world_fit(root: Path, run_folder: Path, processes: int, **settings: Any) -> torch.Tensor:
    """One process's part of a fit; the coefficients that it ends with."""
    settings = dict(settings)
    merge = settings.pop("recipe", None) or recipe(root)
    precision, steps = settings.pop("precision", None), settings.pop("steps", STEPS)
    batch_size = settings.pop("batch_size", 6)
    callbacks, strategy = settings.pop("callbacks", []), settings.pop("strategy", "ddp")
    module = settings.pop("kind", MergeModule)(
        merge,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=RATE),
        workspace=str(RunFolder(run_folder).workspace),
        **settings,
    )
    data = tm.Calibration(calibration_files(merge), merge.base, batch_size=batch_size, max_length=16)
    trainer = tm.make_trainer(
        run_folder, save_every=2, max_steps=steps, accelerator="cpu", enable_progress_bar=False,
        devices=processes, strategy=strategy if processes > 1 else "auto", precision=precision,
        callbacks=callbacks,
    )  # fmt: skip
    tm.fit(module, data, trainer, run_folder)
    return module.coefficients().detach().cpu().clone()


class Checkpointing(tm.MergeModule):
    """With activation checkpointing, which transformers does in train mode only; dropout is 0 in any case."""

    def load(self, *arguments: Any, **settings: Any) -> None:
        super().load(*arguments, **settings)
        self.resident.merged.module.gradient_checkpointing_enable({"use_reentrant": False})
        self.resident.merged.module.train()


def rules() -> dict[str, Any]:
    """Ways to combine the experts' gradients, beside PCGrad and their sum."""
    return {"mean": Mean(), "MGDA": MGDA(), "CAGrad": CAGrad(0.5)}


def cases(root: Path) -> dict[str, dict[str, Any]]:
    """Settings of fits that between them have every objective, rule, kind of expert and precision."""
    heads, words = root / "heads", languages_recipe(root / "words")
    chunks = tm.Grouping("chunk", chunks=3, exclude=["pooler.*"])
    return {
        "entropy": {"root": heads},
        "uneven": {"root": heads, "batch_size": 7, "tasks_per_backward": 2},
        "kept": {"root": heads, "keep_gradients": True},
        "agreement": {
            "root": heads,
            "objective": tm.Entropy(agreement=2.0),
            "recipe": recipe(heads, grouping=chunks),
        },
        "diversity": {
            "root": heads,
            "objective": tm.Entropy(diversity=1.0),
            "batch_size": 7,
            "keep_better": True,
        },
        "rule": {
            "root": heads,
            "combine": PCGrad(),
            "constraint": tm.Box(0.0, 1.0),
            "clip": 0.05,
            "anchor": tm.Anchor(0.1),
        },
        **{name: {"root": heads, "combine": rule} for name, rule in rules().items()},
        "alignment": {
            "root": root / "words",
            "recipe": words,
            "objective": tm.Alignment(hidden=0.5, layers=(0, 1, -1)),
        },
        "checkpointing": {
            "root": root / "words",
            "recipe": words,
            "kind": Checkpointing,
            "objective": tm.Alignment(),
        },
        "preprocessed": {
            "root": heads,
            "recipe": recipe(heads, preprocess=[tm.Ties(0.4)]),
            "keep_better": True,
        },
        "mixed": {"root": heads, "precision": "bf16-mixed"},
        "bfloat16": {"root": root / "words", "recipe": words, "weights": "bfloat16"},
    }


ROUNDED = {
    "mixed": 2e-4,
    "bfloat16": 2e-4,
}  # weight gradients are rounded to bfloat16 before they are added up


class TwoMachines(tm.MergeModule):
    """As if the processes were on two machines, each with a model of its own in shards."""

    def inputs(self, data: tm.Calibration) -> FitInputs:
        return replace(super().inputs(data), machine=distributed.world_size() // 2)


def fits_on_machines(root: Path, names: Sequence[str]) -> dict[str, Any]:
    """One of four processes' part of these cases, on two machines."""
    ended = {}
    for name in names:
        settings = {**cases(root)[name], "kind": TwoMachines, "sharded": True, "shard_over": "machine"}
        ended[name] = world_fit(settings.pop("root"), root / "machines" / name, 4, **settings)
    return ended


def fits(root: Path, processes: int, sharded: bool, names: Sequence[str]) -> dict[str, Any]:
    """One process's part of all these cases: coefficients of each."""
    ended = {}
    for name in names:
        settings = cases(root)[name]
        folder = root / f"{processes}{'s' if sharded else ''}" / name
        ended[name] = world_fit(settings.pop("root"), folder, processes, sharded=sharded, **settings)
    return ended


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    write_world(root / "heads")
    write_languages(root / "words")
    return root


@pytest.fixture(scope="module")
def ended(worlds: Path) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Kind of run -> each rank's coefficients of every case."""
    names = list(cases(worlds))
    started = {
        "1": Ranks(1, fits, worlds, 1, False, names),
        "2": Ranks(2, fits, worlds, 2, False, names),
        "4": Ranks(4, fits, worlds, 4, False, ["uneven", "diversity"]),
        "2 sharded": Ranks(2, fits, worlds, 2, True, ["agreement", "alignment"]),
        "4 sharded": Ranks(4, fits, worlds, 4, True, names),
        "two machines": Ranks(4, fits_on_machines, worlds, ["kept", "agreement", "alignment"]),
    }
    return {kind: sound(ranks.join()) for kind, ranks in started.items()}


@pytest.mark.parametrize("kind", ["2", "4", "2 sharded", "4 sharded", "two machines"])
def test_any_number_of_processes_ends_with_the_same_coefficients(
    ended: dict[str, list[dict[str, torch.Tensor]]], kind: str
) -> None:
    alone = ended["1"][0]
    for results in ended[kind]:
        for name, coefficients in results.items():
            assert torch.equal(coefficients, ended[kind][0][name]), name  # of every rank, to the bit
            apart = (coefficients - alone[name]).abs().max().item()
            assert apart < ROUNDED.get(name, fitted_bound(STEPS, RATE)), name


def recording(root: Path, folder: Path, processes: int, sharded: bool) -> tuple[int, bytes]:
    """One process's part of recording the experts: its forward passes, and what all of them wrote."""
    teacher_recorder.TOKENS = 16  # three batches of each of two experts
    passes: list[Any] = []
    note(teacher_recorder.Recorder, "_signals", passes)
    objective = tm.Alignment(hidden=0.5, layers=(1,))
    world_fit(
        root, folder, processes, sharded=sharded, steps=1, recipe=languages_recipe(root), objective=objective
    )
    (file,) = RunFolder(folder).workspace.glob("teachers-*")
    return len(passes), file.read_bytes()


def test_recording_the_experts_is_shared_by_the_processes(tmp_path: Path) -> None:
    write_languages(tmp_path)
    ((alone, wanted),) = run(1, recording, tmp_path, tmp_path / "1", 1, False)
    assert alone == 6
    for sharded in (False, True):
        results = run(2, recording, tmp_path, tmp_path / f"2{sharded}", 2, sharded)
        for passes, written in results:
            assert passes == 4  # two rounds an expert
            assert written == wanted


class Streaming(tm.MergeModule):
    """With task vectors that are copied ahead of their use, as for a GPU."""

    def load(self, *arguments: Any, **settings: Any) -> None:
        merged_weights.link_to = behind(CountedLink())
        try:
            super().load(*arguments, **settings)
        finally:
            merged_weights.link_to = link_to


def note(place: Any, name: str, calls: list[Any]) -> None:
    """Keep the arguments of each call of a function."""
    function = getattr(place, name)
    setattr(place, name, lambda *given, **more: (calls.append(given), function(*given, **more))[1])


def fit_with(
    root: Path, folder: Path, processes: int, sharded: bool, backend: str, precision: Any
) -> tuple[torch.Tensor, int]:
    """One process's part of a fit by other kernels than eager ones, and how often these ran."""
    from trainmerge.kernels import compiled, triton_kernels, using

    compiled.SMALL, compiled.ROW = 1, 4  # or the world's parameters are eager's
    runs: list[Any] = []
    if backend == "compiled":
        note(compiled, "_run", runs)
    else:
        note(triton_kernels, "_launch_merge", runs)
        note(triton_kernels, "_launch_inner", runs)
    with using(backend):
        ended = world_fit(root, folder, processes, sharded=sharded, precision=precision, kind=Streaming)
    assert not compiled._failed
    return ended, len(runs)


@pytest.mark.parametrize(("backend", "least"), [("compiled", 100), ("triton", 2 * STEPS)])
def test_so_do_all_kernels(worlds: Path, ended: dict[str, Any], backend: str, least: int) -> None:
    for processes, sharded, case in ((1, False, "entropy"), (2, True, "entropy"), (2, False, "mixed")):
        precision = cases(worlds)[case].get("precision")
        folder = worlds / f"{backend}{processes}{sharded}{case}"
        arguments = worlds / "heads", folder, processes, sharded, backend, precision
        for coefficients, runs in run(processes, fit_with, *arguments):
            apart = (coefficients - ended["1"][0][case]).abs().max()
            assert apart < ROUNDED.get(case, fitted_bound(STEPS, RATE)), (processes, sharded, case)
            assert runs >= least
