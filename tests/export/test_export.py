"""An exported checkpoint is the merge in memory, loads in transformers, and appears whole or not at all."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import trainmerge as tm
from tests.bounds import aligned
from tests.fitting.test_fit import fit_world
from tests.opening import open_task_vectors
from tests.world import (
    languages_recipe,
    llama,
    nudge,
    recipe,
    write_languages,
    write_tokenizer,
    write_world,
)
from trainmerge.checkpoints import load_model, open_checkpoint
from trainmerge.cli import main
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.preprocess import apply
from trainmerge.run.folder import RunFolder
from trainmerge.task_vectors import pieces


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    merge = recipe(root, grouping=Grouping(exclude=["embeddings.*", "pooler.*"]))
    fit_world(root, root / "run", steps=3, recipe=merge)
    tm.export_run(root / "run", root / "merged")
    return root


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    return found


def test_merged_logits_in_memory_are_the_exported_checkpoints(world: Path) -> None:
    merge = recipe(world, grouping=Grouping(exclude=["embeddings.*", "pooler.*"]))
    opened = merge.open(world / "run" / "workspace")
    coefficients = tm.load_coefficients(world / "run" / "coefficients.safetensors")
    module = load_model(opened.base).module
    tm.MergedModel(module, opened.task_vectors, coefficients).materialise()
    exported = aligned(AutoModel.from_pretrained(world / "merged"))
    inputs = AutoTokenizer.from_pretrained(world / "merged")(
        ["red cat", "sad dog bird"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(
            aligned(module)(**inputs).last_hidden_state, exported.eval()(**inputs).last_hidden_state
        )


def test_excluded_tensors_are_the_bases_and_merged_ones_are_not(world: Path) -> None:
    base, merged = tensors(world / "base"), tensors(world / "merged")
    assert list(base) == list(merged)
    for name, tensor in base.items():
        kept = name.startswith(("embeddings.", "pooler."))
        assert torch.equal(tensor, merged[name]) == kept, name


def test_the_folder_tells_how_it_was_made(world: Path) -> None:
    folder = world / "merged"
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["tags"] == ["merge", "trainmerge"]
    assert "base_model" not in head, "folders are no ids of the hub"
    assert "| `encoder.layer.0` |" in card
    manifest = json.loads((folder / "trainmerge_manifest.json").read_text())
    assert manifest["files"].keys() == {path.name for path in folder.iterdir()} - {"trainmerge_manifest.json"}
    recipe_again = yaml.safe_load((folder / "trainmerge_recipe.yaml").read_text())["recipe"]
    assert recipe_again["grouping"]["exclude"] == ["embeddings.*", "pooler.*"]


def test_export_again_is_byte_identical(world: Path, tmp_path: Path) -> None:
    tm.export_run(world / "run", tmp_path / "again")
    for path in sorted(world.joinpath("merged").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_an_existing_output_is_refused_then_replaced_when_asked(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is not an export"):
            tm.export_run(world / "run", out, overwrite=overwrite)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    tm.export_run(world / "run", out)
    with pytest.raises(FileExistsError, match="overwrite"):
        tm.export_run(world / "run", out)
    (out / "model.safetensors").unlink()
    tm.export_run(world / "run", out, overwrite=True)
    assert AutoModel.from_pretrained(out) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("place", ["run", "base", "experts/mood", "."])
def test_what_the_merge_is_made_from_is_never_replaced(world: Path, place: str) -> None:
    before = sorted(world.rglob("*"))
    with pytest.raises(ValueError, match="an input of the merge"):
        tm.export_run(world / "run", world / place, overwrite=True)
    assert sorted(world.rglob("*")) == before


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit is an OSError, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from trainmerge.cli import main
sys.exit(main(["export", sys.argv[1], sys.argv[2]]))
"""


def test_a_disk_that_fills_leaves_nothing(world: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(world / "run"), str(tmp_path / "out")],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("trainmerge export: ")
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from trainmerge.export import shards
def write_shard(*arguments, original=shards.write_shard):
    original(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)  # all but the rest of the folder is written
shards.write_shard = write_shard
from trainmerge.cli import main
main(["export", *sys.argv[1:]])
"""


def test_a_killed_export_leaves_no_output_and_the_next_one_clears_up(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(world / "run"), str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 2  # the folder aside, and its lock, which the kernel has dropped
    tm.export_run(world / "run", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tm.verify_export(world / "run", out) == len(tensors(out))


LIGHT = """
import sys
from trainmerge.cli import main
assert main(["export", *sys.argv[1:]]) == 0
print([name for name in ("transformers", "pytorch_lightning", "peft") if name in sys.modules])
"""


@pytest.mark.parametrize("change", ["nothing", "copied"])
def test_export_needs_no_transformers_unless_files_were_touched(
    world: Path, tmp_path: Path, change: str
) -> None:
    if (
        change == "copied"
    ):  # the same contents under other inodes: they are hashed, the headers compared again
        for file in world.glob("experts/mood/*"):
            copy = file.with_suffix(".copy")
            shutil.copyfile(file, copy)
            copy.replace(file)
    command = [sys.executable, "-c", LIGHT, str(world / "run"), str(tmp_path / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == str([] if change == "nothing" else ["transformers", "peft"])
    assert tm.verify_export(world / "run", tmp_path / "out")


def flip_a_bit(out: Path) -> None:
    file = out / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def rename_a_tensor(out: Path) -> None:
    content = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(content.replace(b"pooler.dense.bias", b"pooler.dense.bits"))


def add_weights(out: Path) -> None:
    (out / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (flip_a_bit, "differs in 1 of"),
        (rename_a_tensor, "pooler.dense.bias is missing"),
        (add_weights, "pytorch_model.bin is not part of the export"),
        (lambda out: (out / "model.safetensors").unlink(), "model.safetensors is missing"),
    ],
)
def test_verify_names_what_differs(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    words: str,
) -> None:
    command = ["export", str(world / "run"), str(tmp_path / "out"), "--verify", "true"]
    assert main(command) == 0
    assert "bit for bit" in capsys.readouterr().out
    spoil(tmp_path / "out")
    assert main(command) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "method", [tm.Ties(0.4), tm.Ties(0.4, "parameter", "mean"), tm.Dare(0.5), tm.Pcb(0.3)]
)
def test_a_rule_inside_the_pass_writes_what_kept_task_vectors_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: tm.Preprocess
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 100)
    merge = languages_recipe(write_languages(tmp_path), preprocess=[method], grouping=Grouping("chunk", 3))
    fit_world(tmp_path, tmp_path / "run", steps=0, recipe=merge)
    run = RunFolder(tmp_path / "run")
    tm.export_run(run.path, tmp_path / "by-rule", workers=3)
    assert not list(run.workspace.glob("*"))
    opened = merge.open()
    apply(opened.task_vectors, [method], run.workspace, opened.identity(), run.examples())
    tm.export_run(run.path, tmp_path / "kept")
    for file in sorted((tmp_path / "kept").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "by-rule" / file.name).read_bytes()
    assert tm.verify_export(run.path, tmp_path / "by-rule")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_language_models_in_shards_tied_and_not(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    base = llama(tied).to(dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    write_tokenizer(tmp_path / "base")
    for k in range(2):
        expert = llama(tied)
        nudge(expert, k)
        expert.to(dtype).save_pretrained(tmp_path / f"expert{k}", max_shard_size="40KB")
    opened = open_checkpoint(tmp_path / "base")
    vectors = open_task_vectors(opened, {f"e{k}": tmp_path / f"expert{k}" for k in range(2)})
    layout = Grouping("chunk", chunks=3).layout(vectors.shapes)
    coefficients = Coefficients(vectors.experts, layout, torch.rand(2, len(layout.labels)))
    module = load_model(opened)
    tm.MergedModel(module.module, vectors, coefficients, module.names).materialise()
    tm.export_merge(opened, vectors, coefficients, tmp_path / "out")
    exported = aligned(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert exported.dtype == dtype
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == sorted(
        path.name for path in (tmp_path / "out").iterdir()
    )
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(aligned(module.module)(ids).logits, exported.eval()(ids).logits)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_pickled_base_becomes_safetensors(tmp_path: Path, shards: int) -> None:
    write_world(tmp_path)
    base = tmp_path / "base"
    state = tensors(base)
    (base / "model.safetensors").unlink()
    names = sorted(state)
    parts = {f"pytorch_model-0000{i + 1}-of-0000{shards}.bin": names[i::shards] for i in range(shards)}
    if shards == 1:
        parts = {"pytorch_model.bin": names}
    for file, held in parts.items():
        torch.save({name: state[name] for name in held}, base / file)
    if shards > 1:
        weight_map = {name: file for file, held in parts.items() for name in held}
        (base / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    fit_world(tmp_path, tmp_path / "run", steps=1, recipe=recipe(tmp_path, allow_pickle=True))
    tm.export_run(tmp_path / "run", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin*"))
    assert AutoModel.from_pretrained(tmp_path / "out", use_safetensors=True) is not None
    assert tensors(tmp_path / "out").keys() == state.keys()
