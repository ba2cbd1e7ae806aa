"""Packed experts from a run to files and back: what is written, refused, loaded, and switched."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import trainmerge as tm
from tests.evaluate.test_own_heads import run_of
from tests.heads_world import write_heads
from tests.mixture_world import write_mixture
from tests.model.test_own_head import TWO
from tests.world import languages_recipe, llama, nudge, write_languages
from trainmerge.checkpoints.meta_model import quiet
from trainmerge.cli import main
from trainmerge.packed import parameter, write

CODECS = ["mask", "emr", "lowrank", "twin", "ternary", "pca", "mask:0.4", "lowrank:4", "ternary:0.2"]


def fitted(recipe: tm.Recipe, run: Path, initial: float = 0.4) -> Path:
    module = tm.MergeModule(recipe, initial=initial, workspace=str(run / "workspace"))
    trainer = tm.make_trainer(run, max_steps=0, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, tm.Calibration({}, recipe.base), trainer, run)
    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`full`, a run of two full experts of a Llama with tied embeddings; `lora`, one of two adapters."""
    root = tmp_path_factory.mktemp("world")
    write_languages(root)
    loras = {}
    for number, name in enumerate("xy"):
        with quiet():
            model = get_peft_model(
                llama(), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
            )
        nudge(model, number)
        model.save_pretrained(root / name)
        loras[name] = tm.Expert(str(root / name), str(root / "a.jsonl"))
    grouping = tm.Grouping(exclude=["*norm*"])
    fitted(languages_recipe(root, grouping=grouping), root / "full")
    fitted(tm.Recipe(str(root / "base"), loras), root / "lora")
    return root


@pytest.fixture(scope="module")
def packed(world: Path) -> Path:
    return tm.export_packed(world / "full", world / "packed", tm.PackedForm("mask"))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def error(made: dict[str, Tensor], base: dict[str, Tensor], expert: dict[str, Tensor]) -> float:
    """The relative error of a task's difference."""
    lost = sum(float((made[n].double() - expert[n].double()).square().sum()) for n in base)
    whole = sum(float((expert[n].double() - base[n].double()).square().sum()) for n in base)
    return (lost / whole) ** 0.5


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_unpacked_has_the_error_that_is_told(codec: str, world: Path, tmp_path: Path) -> None:
    out = tm.export_packed(world / "full", tmp_path / "packed", tm.PackedForm(codec))
    record = json.loads((out / "packed.json").read_text())
    base = weights(world / "base")
    for task in "ab":
        made = dict(tm.load_packed(out, task))
        assert made.keys() == base.keys()
        found = error(made, base, weights(world / task))
        assert found == pytest.approx(record["errors"][task], rel=1e-4)
        assert 0.001 < found < 0.95
    count = sum(tensor.numel() for tensor in base.values())
    assert record["bits"] == pytest.approx(8 * record["bytes"] / (2 * count))
    assert record["options"] == {"codec": codec}
    assert {one["codec"] for one in record["tensors"].values()} == {
        {"twin": "lowrank"}.get(codec, codec).split(":")[0]
    }


def test_an_unpacked_folder_is_an_ordinary_checkpoint(world: Path, packed: Path, tmp_path: Path) -> None:
    out = tm.unpack(packed, "b", tmp_path / "b")
    made, loaded = weights(out), dict(tm.load_packed(packed, "b"))
    assert all(torch.equal(made[name], tensor) for name, tensor in loaded.items())
    assert {path.name for path in (world / "base").iterdir()} <= {path.name for path in out.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model.get_input_embeddings().weight, made["model.embed_tokens.weight"])
    assert tm.Recipe(str(world / "base"), {"b": tm.Expert(str(out))}).open().task_vectors.deltas
    manifest = json.loads((out / "trainmerge_manifest.json").read_text())
    assert manifest["unpacked"] == "b"
    assert (
        str(world)
        not in (packed / "packed.json").read_text() + (packed / "trainmerge_manifest.json").read_text()
    )


def test_unpacking_reads_some_rows_at_a_time(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights(tm.unpack(packed, "a", tmp_path / "whole"))
    monkeypatch.setattr(parameter, "BLOCK", 1)
    stored = tm.open_packed(packed).stored
    sizes = [len(piece) for piece in stored.pieces("model.layers.0.mlp.up_proj.weight", "a")]
    assert sizes == [40, 24]  # rows of 64: whole bytes of bits and of trits
    pieces = weights(tm.unpack(packed, "a", tmp_path / "pieces"))
    assert all(torch.equal(whole[name], tensor) for name, tensor in pieces.items())


def test_excluded_parameters_are_packed_too(world: Path, packed: Path) -> None:
    made, base = dict(tm.load_packed(packed, "a")), weights(world / "base")
    assert not torch.equal(made["model.norm.weight"], base["model.norm.weight"])
    record = json.loads((packed / "packed.json").read_text())
    assert "model.norm.weight" in record["tensors"]


def test_adapters_come_back_exactly(world: Path, tmp_path: Path) -> None:
    form = tm.PackedForm("lowrank", dtype="float32")
    out = tm.export_packed(world / "lora", tmp_path / "packed", form)
    assert max(tm.open_packed(out).errors.values()) < 1e-6
    made, base = dict(tm.load_packed(out, "x")), weights(world / "base")
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(made[name], base[name])  # no expert changes it
    with quiet():
        model = PeftModel.from_pretrained(llama(), world / "x")
    want = model.merge_and_unload().state_dict()
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-5, atol=1e-6)


def test_one_expert_with_its_own_coefficient_is_exact(world: Path, tmp_path: Path) -> None:
    recipe = tm.Recipe(str(world / "base"), {"a": tm.Expert(str(world / "a"), str(world / "a.jsonl"))})
    run = fitted(recipe, tmp_path / "run", 1.0)
    out = tm.export_packed(run, tmp_path / "packed", tm.PackedForm("mask", dtype="float32"))
    expert = weights(world / "a")
    for name, tensor in tm.load_packed(out, "a"):
        torch.testing.assert_close(tensor, expert[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("head", ["Bert", "Llama"])
def test_tasks_keep_their_own_heads_and_a_model_switches(head: str, tmp_path: Path) -> None:
    recipe, models = write_heads(tmp_path, head, {"a": TWO["a"], "b": {**TWO["b"], "num_labels": 2}})
    run = run_of(recipe, tmp_path / "run")
    packed = tm.open_packed(
        tm.export_packed(run, tmp_path / "packed", tm.PackedForm(budget="4", dtype="float32"))
    )
    assert packed.tasks == ("a", "b")
    assert max(packed.errors.values()) < 1e-6  # room for everything
    tokens = torch.arange(2, 12).view(2, 5)
    model = AutoModelForSequenceClassification.from_pretrained(
        tm.unpack(tmp_path / "packed", "a", tmp_path / "out")
    )
    assert type(model) is type(models["a"])
    for task in "aba":
        packed.switch(model, task)
        with torch.no_grad():
            torch.testing.assert_close(
                model.eval()(tokens).logits, models[task].eval()(tokens).logits, rtol=1e-4, atol=1e-5
            )
    assert model.state_dict().keys() == dict(packed.load("a")).keys()


def test_a_base_in_memory_switches_to_the_unpacked_weights(packed: Path) -> None:
    opened, model = tm.open_packed(packed), llama()
    for task in "ab":
        opened.switch(model, task)
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in opened.load(task))


@pytest.mark.parametrize("family", ["Qwen3-MoE", "DeepSeek-V3", "gpt-oss"])
def test_a_mixture_in_memory_switches_expert_by_expert(family: str, tmp_path: Path) -> None:
    """Also where only some of the matrices that fill one parameter are changed."""
    write_mixture(tmp_path, family)
    base, tuned = weights(tmp_path / "base"), weights(tmp_path / "a")
    some = {name for name in base if "gate_proj" not in name}
    save_file({n: tuned[n] if n in some else base[n] for n in base}, tmp_path / "a" / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    experts = {"a": tm.Expert(str(tmp_path / "a"))}
    run = fitted(tm.Recipe(str(tmp_path / "base"), experts), tmp_path / "run", 1.0)
    packed = tm.open_packed(tm.export_packed(run, tmp_path / "packed", tm.PackedForm("mask")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    packed.switch(model, "a")
    unpacked = {name: own.clone() for name, own in packed.load("a")}
    model.save_pretrained(tmp_path / "switched")
    switched = weights(tmp_path / "switched")
    assert switched.keys() == unpacked.keys()
    assert any(not torch.equal(own, base[name]) for name, own in switched.items() if ".experts." in name)
    for name, own in switched.items():
        assert torch.equal(own, unpacked[name]), name


def test_a_model_of_another_shape_is_left_alone(packed: Path) -> None:
    model = llama()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(3, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"the model is no 'a' of .*lacks model.layers.0.mlp.up_proj.weight"):
        tm.open_packed(packed).switch(model, "a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_base_is_refused_and_a_moved_one_is_named(world: Path, packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "packed")
    with pytest.raises(FileNotFoundError, match="its base is not at"):
        tm.open_packed(tmp_path / "packed")
    shutil.copytree(world / "base", tmp_path / "base")
    same = tm.open_packed(tmp_path / "packed", tmp_path / "base")
    assert same.tasks == ("a", "b")
    with pytest.raises(ValueError, match=r"is not the base that .* was packed with"):
        tm.open_packed(packed, world / "a")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"num_attention_heads": 2', '"num_attention_heads": 4'))
    with pytest.raises(ValueError, match="other checksums"):
        tm.load_packed(tmp_path / "packed", "a", tmp_path / "base")


def test_damaged_folders_are_refused(world: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no task 'c'; it has a, b"):
        tm.load_packed(packed, "c")
    with pytest.raises(FileNotFoundError, match="is no folder of packed experts"):
        tm.open_packed(world / "base")
    out = tmp_path / "packed"
    for change, message in (
        ({"version": 2}, "version 2, this trainmerge reads 1"),
        ({"files": ["../packed.safetensors"]}, "damaged"),
        ({"tasks": ["a", "a"]}, "damaged"),
        ({"more": 1}, "damaged"),
        ({"tensors": {"w": {"shape": [2], "dtype": "F32", "codec": "mask"}}}, "not tensors of its base: w"),
    ):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(packed, out)
        record = json.loads((out / "packed.json").read_text())
        (out / "packed.json").write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=message):
            tm.open_packed(out, world / "base")
    shutil.rmtree(out)
    shutil.copytree(packed, out)
    file = out / "packed.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not whole"):
        tm.open_packed(out, world / "base")


def test_a_packed_folder_is_no_expert(world: Path, packed: Path) -> None:
    with pytest.raises(ValueError, match=r"packed experts, no transformers folder. Unpack one of them"):
        tm.Recipe(str(world / "base"), {"a": tm.Expert(str(packed))}).open()


def test_shards_hold_what_one_file_does(
    world: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "SHARD", 1 << 13)
    out = tm.export_packed(world / "full", tmp_path / "shards", tm.PackedForm("mask"))
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"packed-00001-of-{len(files):05}.safetensors"
    whole, parts = load_file(packed / "packed.safetensors"), {}
    for file in files:
        parts |= load_file(out / file)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in parts.items())
    one, other = dict(tm.load_packed(packed, "a")), dict(tm.load_packed(out, "a"))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_budgets_between_one_model_and_all(world: Path, tmp_path: Path) -> None:
    size = sum(tensor.nbytes for tensor in weights(world / "base").values())
    errors = []
    for number, times in enumerate((1.03, 1.1, 1.3, 1.7, 2.2)):
        out = tm.export_packed(world / "full", tmp_path / str(number), tm.PackedForm(budget=str(times)))
        record = json.loads((out / "packed.json").read_text())
        assert 0.7 * (times - 1) * size < record["bytes"] <= (times - 1) * size or times > 2
        errors.append(max(record["errors"].values()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.8
    assert errors[-1] < 0.01  # 16 bits per weight
    out = tm.export_packed(world / "full", tmp_path / "bytes", tm.PackedForm("ternary", "20KB"))
    record = json.loads((out / "packed.json").read_text())
    assert record["bytes"] <= 20_000
    assert {one["codec"] for one in record["tensors"].values()} <= {"none", "ternary", "dense"}


def test_the_commands(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(world / "full"), str(tmp_path / "packed")
    assert main(["export", run, out, "--as", "packed", "--codec", "emr"]) == 0
    assert "bits per weight and task" in capsys.readouterr().out
    assert main(["unpack", out, "a", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "config.json").is_file()
    before = (tmp_path / "packed" / "packed.safetensors").read_bytes()
    assert main(["export", run, out, "--as", "packed", "--verify"]) == 0  # as it was made
    assert "tensors are the packed experts of" in capsys.readouterr().out
    assert (tmp_path / "packed" / "packed.safetensors").read_bytes() == before
    tensors = load_file(tmp_path / "packed" / "packed.safetensors")
    tensors["a/b"] += 1
    save_file(tensors, tmp_path / "packed" / "packed.safetensors", {"format": "pt"})
    assert main(["export", run, out, "--as", "packed", "--verify"]) == 1
    assert "It differs in packed.safetensors" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"packed", "a"}
    assert main(["export", run, out, "--as", "packed", "--codec", "emr"]) == 1  # it is there
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--as", "packed"], "name a codec (mask, emr, lowrank, twin, ternary, pca), or a budget"),
        (["--as", "packed", "--codec", "zip"], "packed.codec is 'zip'"),
        (["--as", "packed", "--codec", "lowrank:x"], "'x' in 'lowrank:x' is no number"),
        (["--as", "packed", "--codec", "lowrank:1.5"], "1.5 is no whole number"),
        (["--as", "packed", "--codec", "lowrank:0"], "lowrank.rank must be at least 1"),
        (["--as", "packed", "--codec", "ternary:2"], "ternary.share must be in (0, 1]"),
        (["--as", "packed", "--codec", "emr:1"], "emr takes no number"),
        (["--as", "packed", "--budget", "0.5"], "packed.budget must be at least 1"),
        (["--as", "packed", "--budget", "20 apples"], "is not a size"),
        (["--as", "packed", "--budget", "1.0"], "are too few"),
        (["--as", "packed", "--codec", "mask", "--rank", "2"], "--rank does not apply to --as packed"),
        (["--codec", "mask"], "--codec does not apply to --as checkpoint, but to --as packed"),
        (["--as", "adapter", "--budget", "2"], "--budget does not apply to --as adapter"),
    ],
)
def test_what_does_not_fit_is_refused(
    words: list[str], message: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(world / "full"), str(tmp_path / "out"), *words]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
