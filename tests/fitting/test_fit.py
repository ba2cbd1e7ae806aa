"""A fit on a whole small world: it learns, resumes bit for bit after SIGKILL, and refuses what changed."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from datasets import Dataset

import trainmerge as tm
from tests.world import bert, nudge, recipe, write_world
from trainmerge.data.calibration import Calibration
from trainmerge.fitting.module import MergeModule
from trainmerge.run.folder import RunFolder
from trainmerge.run.recipe_files import calibration_files
from trainmerge.run.resume import resume_from

pytestmark = pytest.mark.long

STEPS = 11  # of 4 examples from 40: past the first pass over the data

KILLED = """
import os, signal, sys
import pytorch_lightning as pl
from tests.fitting.test_fit import STEPS, fit_world
from tests.threads import limit_threads

limit_threads()

class Kill(pl.Callback):
    def __init__(self, step, when): self.step, self.when = step, when
    def on_train_batch_start(self, trainer, *_):
        if self.when == "start" and trainer.global_step == self.step: os.kill(os.getpid(), signal.SIGKILL)
    def on_save_checkpoint(self, trainer, *_):
        if self.when == "save" and trainer.global_step == self.step: os.kill(os.getpid(), signal.SIGKILL)

# Right before one file of a step gets its name: its coefficients (the manifest lists them), or its snapshot.
FILES = {"listed": "coefficients.safetensors", "between": "step-" + sys.argv[3] + ".ckpt"}

def kill(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(FILES[sys.argv[4]]): os.kill(os.getpid(), 9)

if sys.argv[4] in FILES: sys.addaudithook(kill)

fit_world(sys.argv[1], sys.argv[2], callbacks=[Kill(int(sys.argv[3]), sys.argv[4])])
"""


def build(root: str | Path, run: str | Path, **settings: object) -> tuple[MergeModule, Calibration]:
    merge = settings.pop("recipe", None) or recipe(Path(root))
    module = tm.MergeModule(
        merge,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        workspace=str(RunFolder(Path(run)).workspace),
        **settings,
    )
    return module, tm.Calibration(calibration_files(merge), merge.base, batch_size=4, max_length=16)


def fit_world(
    root: str | Path, run: str | Path, steps: int = STEPS, callbacks: list | None = None, **settings: object
) -> MergeModule:
    module, data = build(root, run, **settings)
    trainer = tm.make_trainer(
        run, save_every=4, max_steps=steps, accelerator="cpu", callbacks=callbacks, enable_progress_bar=False
    )
    tm.fit(module, data, trainer, run)
    return module


def learned(run: Path) -> torch.Tensor:
    return tm.load_coefficients(RunFolder(run).coefficients)().detach()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    return root


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    fit_world(world, world / "finished")
    return world / "finished"


def test_fit_lowers_the_loss_and_leaves_a_folder_that_explains_itself(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert sum(line["loss"] for line in lines[-3:]) < sum(line["loss"] for line in lines[:3])
    manifest = json.loads((finished / "manifest.json").read_text())
    assert set(manifest["checksums"]) == {"base", "mood", "colour", "animal"}
    assert manifest["versions"]["torch"] == torch.__version__
    for name in ("README.md", "recipe.yaml", "coefficients.safetensors"):
        assert (finished / name).stat().st_size
    (checkpoint,) = (finished / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{STEPS}.ckpt"
    assert (
        checkpoint.stat().st_size < 60_000
    )  # the 3 x 39 coefficients and Adam's two moments, never the model
    assert torch.load(checkpoint, weights_only=True)["state_dict"].keys() == {"coefficients.raw"}


@pytest.mark.parametrize(
    "kills",
    [[(4, "listed")], [(5, "start"), (9, "start")], [(4, "save"), (8, "save"), (11, "between")]],
)
def test_killed_runs_end_with_the_same_bits(world: Path, finished: Path, tmp_path: Path, kills: list) -> None:
    run = tmp_path / "run"
    for step, when in kills:
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(world), str(run), str(step), when], check=False
        )
        assert done.returncode == -signal.SIGKILL
    fit_world(world, run)
    assert torch.equal(learned(run), learned(finished))
    for kept in ("metrics.jsonl", "trajectory.bin"):
        assert (run / kept).read_bytes() == (finished / kept).read_bytes()


def test_a_finished_run_goes_on_when_more_steps_are_asked_for(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    fit_world(world, tmp_path / "run", steps=6)
    fit_world(world, tmp_path / "run")
    assert torch.equal(learned(tmp_path / "run"), learned(finished))


def test_sigterm_saves_at_the_end_of_the_step(world: Path, finished: Path, tmp_path: Path) -> None:
    class Terminate(pl.Callback):
        def on_train_batch_start(self, trainer: object, *_: object) -> None:
            if trainer.global_step == 6:
                signal.raise_signal(signal.SIGTERM)

    from trainmerge.fitting.snapshots import Preempted

    with pytest.raises(Preempted, match="after step 7"):
        fit_world(world, tmp_path / "run", callbacks=[Terminate()])
    fit_world(world, tmp_path / "run")
    assert torch.equal(learned(tmp_path / "run"), learned(finished))


def test_the_same_with_worker_processes(world: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    module, data = build(world, run)
    data.num_workers = 1
    tm.fit(
        module, data, tm.make_trainer(run, max_steps=STEPS, accelerator="cpu", enable_progress_bar=False), run
    )
    assert torch.equal(learned(run), learned(finished))


def test_resume_words(finished: Path, tmp_path: Path) -> None:
    folder = RunFolder(finished)
    assert resume_from(folder, "auto") == folder.checkpoints / f"step-{STEPS}.ckpt"
    assert resume_from(RunFolder(tmp_path), "auto") is None
    assert resume_from(RunFolder(tmp_path), "never") is None
    with pytest.raises(ValueError, match="already has a run"):
        resume_from(folder, "never")
    with pytest.raises(ValueError, match="no such checkpoint"):
        resume_from(folder, str(tmp_path / "absent.ckpt"))


def test_a_damaged_checkpoint_is_named(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit_world(world, run, steps=4)
    checkpoint = run / "checkpoints" / "step-4.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"step-4\.ckpt: not a snapshot that this run saved"):
        fit_world(world, run)


def test_changed_settings_are_refused(world: Path, finished: Path) -> None:
    with pytest.raises(
        ValueError, match=r"different experts, data or settings:\n  anchor\.weight: 0\.0 then, 0\.5 now"
    ):
        fit_world(world, finished, anchor=tm.Anchor(0.5))


def test_changed_experts_are_refused(tmp_path: Path) -> None:
    write_world(tmp_path)
    fit_world(tmp_path, tmp_path / "run", steps=2)
    other = bert()
    nudge(other, 99)
    other.save_pretrained(tmp_path / "experts" / "mood")
    with pytest.raises(ValueError, match="checksums"):
        fit_world(tmp_path, tmp_path / "run", steps=4)
    with pytest.raises(ValueError, match=r"weights of \['mood'\] changed since the fit"):
        tm.export_run(tmp_path / "run", tmp_path / "out")


def test_nan_weights_are_found_before_the_first_step(tmp_path: Path) -> None:
    write_world(tmp_path)
    broken = bert()
    with torch.no_grad():
        broken.encoder.layer[1].output.dense.weight[3, 4] = float("nan")
    broken.save_pretrained(tmp_path / "experts" / "colour")
    with pytest.raises(ValueError, match=r"colour: encoder\.layer\.1\.output\.dense\.weight"):
        fit_world(tmp_path, tmp_path / "run")
    assert not (tmp_path / "run" / "coefficients.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_the_fit_and_does_not_keep_its_folder(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    module, data = build(world, run)
    module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=1e30)
    trainer = tm.make_trainer(run, save_every=1, max_steps=5, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(ValueError, match="step 2: the loss of mood, colour, animal is not finite"):
        tm.fit(module, data, trainer, run)
    assert bool(learned(run).isfinite().all())  # of step 1
    for file in ("coefficients.safetensors", "checkpoints/step-1.ckpt"):
        (run / file).unlink()  # as if step 1 had failed: nothing was saved, so other settings may begin here
    fit_world(world, run)
    assert torch.equal(learned(run), learned(finished))


def test_a_fit_that_is_stopped_early_keeps_its_steps(world: Path, finished: Path, tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            trainer.should_stop = trainer.global_step == 6

    fit_world(world, tmp_path / "run", callbacks=[Stop()])
    assert RunFolder(tmp_path / "run").latest() == tmp_path / "run" / "checkpoints" / "step-6.ckpt"
    fit_world(world, tmp_path / "run")
    assert torch.equal(learned(tmp_path / "run"), learned(finished))


def test_a_fit_that_moves_nothing_says_so(world: Path, tmp_path: Path) -> None:
    module, data = build(world, tmp_path / "run")
    module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=1e-9)
    trainer = tm.make_trainer(tmp_path / "run", max_steps=1, accelerator="cpu", enable_progress_bar=False)
    with pytest.warns(UserWarning, match="coefficients changed by"):
        tm.fit(module, data, trainer, tmp_path / "run")


@pytest.mark.parametrize(
    ("granularity", "constraint", "methods"),
    [("task", tm.Box(0.0, 1.0), ()), ("block", tm.Sigmoid(), ()), ("chunk", tm.Free(), (tm.Ties(0.3),))],
)
def test_other_recipes_fit_too(
    world: Path, tmp_path: Path, granularity: str, constraint: object, methods: tuple
) -> None:
    grouping = tm.Grouping(
        granularity, chunks=3 if granularity == "chunk" else 1, exclude=["embeddings.*", "pooler.*"]
    )
    merge = replace(recipe(world), grouping=grouping, preprocess=methods)
    module = fit_world(world, tmp_path / "run", steps=3, recipe=merge, constraint=constraint)
    assert not torch.equal(module.coefficients().detach(), module.start)
    tm.export_run(tmp_path / "run", tmp_path / "out")


def test_missing_calibration_is_named(world: Path) -> None:
    experts = dict(recipe(world).experts)
    experts["mood"] = replace(experts["mood"], calibration=None)
    with pytest.raises(ValueError, match=r"\['mood'\] have no `calibration`"):
        fit_world(world, world / "never", recipe=recipe(world, experts=experts))
    assert not (world / "never").exists()


def test_experts_in_another_order_are_refused(world: Path, finished: Path) -> None:
    experts = dict(reversed(recipe(world).experts.items()))
    with pytest.raises(ValueError, match="experts: "):
        fit_world(world, finished, recipe=recipe(world, experts=experts))


def test_data_in_another_order_than_the_experts_are_refused(world: Path, tmp_path: Path) -> None:
    module, _ = build(world, tmp_path / "run")
    files = dict(reversed(calibration_files(recipe(world)).items()))
    with pytest.raises(ValueError, match="the data have the experts"):
        module.load(tm.Calibration(files, str(world / "base")))


def test_a_schedule_that_was_not_there_is_refused(world: Path, finished: Path) -> None:
    with pytest.raises(ValueError, match="lr_scheduler"):
        fit_world(world, finished, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 5))


def test_a_schedule_resumes_too(world: Path, tmp_path: Path) -> None:
    schedule = {"lr_scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5)}
    fit_world(world, tmp_path / "whole", steps=7, **schedule)
    for steps in (3, 7):
        fit_world(world, tmp_path / "parts", steps=steps, **schedule)
    assert torch.equal(learned(tmp_path / "whole"), learned(tmp_path / "parts"))


def test_a_path_goes_back_and_other_things_are_refused(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit_world(world, run, steps=4)
    early = tmp_path / "early.ckpt"
    early.write_bytes((run / "checkpoints" / "step-4.ckpt").read_bytes())
    fit_world(world, run, steps=8)
    module, data = build(world, run)
    trainer = tm.make_trainer(run, max_steps=6, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, run, resume=str(early))
    assert RunFolder(run).latest() == run / "checkpoints" / "step-6.ckpt"
    module, data = build(world, tmp_path / "other", anchor=tm.Anchor(1.0))
    trainer = tm.make_trainer(tmp_path / "other", max_steps=6, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(
        ValueError, match=r"early\.ckpt was made with different experts, data or settings:\n  anchor"
    ):
        tm.fit(module, data, trainer, tmp_path / "other", resume=str(early))
    assert not (tmp_path / "other").exists()


def test_mixed_precision_with_low_rank_experts(world: Path, tmp_path: Path) -> None:
    module, data = build(world, tmp_path / "run")
    trainer = tm.make_trainer(
        tmp_path / "run", max_steps=2, accelerator="cpu", enable_progress_bar=False, precision="bf16-mixed"
    )
    tm.fit(module, data, trainer, tmp_path / "run")
    assert module.coefficients.raw.dtype == torch.float32
    assert not torch.equal(module.coefficients().detach(), module.start)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "bf16-true"}, "would round the coefficients"),
        ({"max_steps": -1}, "set trainer.max_steps"),
        ({"save_every": 0}, "save_every"),
        ({"default_root_dir": "elsewhere"}, "run folder"),
        ({"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}, "model.clip"),
    ],
)
def test_settings_that_cannot_work(world: Path, tmp_path: Path, settings: dict, message: str) -> None:
    module, data = build(world, tmp_path / "run")
    given = {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, **settings}
    with pytest.raises(ValueError, match=message):
        tm.fit(module, data, tm.make_trainer(tmp_path / "run", **given), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_anchor_pulls_back_to_the_start(world: Path, tmp_path: Path) -> None:
    far = fit_world(world, tmp_path / "free", steps=8)
    near = fit_world(world, tmp_path / "anchored", steps=8, anchor=tm.Anchor(1e4))
    moved = [(module.coefficients().detach() - module.start).abs().mean() for module in (far, near)]
    assert moved[1] < 0.5 * moved[0]


def test_a_saved_dataset_calibrates_too(world: Path, tmp_path: Path) -> None:
    experts = dict(recipe(world).experts)
    texts = Dataset.from_dict({"text": ["red cat", "sad dog", "two birds"]})
    texts.save_to_disk(tmp_path / "saved")
    experts["mood"] = replace(experts["mood"], calibration=str(tmp_path / "saved"))
    fit_world(world, tmp_path / "run", steps=2, recipe=recipe(world, experts=experts))
