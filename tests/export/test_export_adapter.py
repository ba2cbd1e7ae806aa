"""Adapters of runs, by command and in Python: card, manifest, rebuilding, and those of full models."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertForSequenceClassification

import trainmerge as tm
from tests.hub_stand_in import use, write_cache
from tests.mixture_world import write_mixture
from tests.ranks import exit_code
from tests.world import bert, languages_recipe, llama, nudge, write_languages, write_tokenizer
from trainmerge.checkpoints.meta_model import quiet
from trainmerge.cli import main
from trainmerge.export import adapter
from trainmerge.system.safetensors_file import sha256

PART = ("q_proj", "down_proj")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`lora`, a run of two adapters from a hub's cache, and `full`, a run of two full experts."""
    root = tmp_path_factory.mktemp("world")
    write_languages(root)
    for number, name in enumerate("ab"):
        with quiet():
            model = get_peft_model(
                llama(), LoraConfig(r=2 + number, lora_alpha=4, target_modules=[*PART[: 2 - number]])
            )
        nudge(model, number)
        model.save_pretrained(root / f"lora-{name}")
        write_cache(root / "cache", f"org/{name}", root / f"lora-{name}")
    write_cache(root / "cache", "org/base", root / "base")
    with pytest.MonkeyPatch.context() as patch:
        use(patch, root / "cache")
        texts = {n: (str(root / f"{n}.jsonl"), str(root / f"{n}-test.jsonl")) for n in "ab"}
        loras = tm.Recipe("org/base", {n: tm.Expert(f"org/{n}", *texts[n]) for n in "ab"})
        for name, own in {"lora": loras, "full": languages_recipe(root)}.items():
            run = root / "runs" / name
            module = tm.MergeModule(own, initial=0.4, workspace=str(run / "workspace"))
            trainer = tm.make_trainer(run, max_steps=0, accelerator="cpu", enable_progress_bar=False)
            tm.fit(module, tm.Calibration({}, own.base), trainer, run)
        tm.export_adapter(root / "runs" / "lora", root / "adapter")
        tm.export_run(root / "runs" / "lora", root / "merged")
    return root


@pytest.fixture(autouse=True)
def cache(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, world / "cache")


def manifest_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "trainmerge_manifest.json").read_text())
    return found


def weights(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*.safetensors")}


def test_the_command_prints_every_module_and_verifies(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(world / "runs" / "lora"), str(tmp_path / "out"), "--as", "adapter", "--rank", "2"]
    with pytest.warns(
        UserWarning, match=r"misses .*, most of it in model.layers.\d.self_attn.q_proj \([\d.]+%\)"
    ):
        assert main([*words, "--verify"]) == 0
    printed = capsys.readouterr().out
    manifest = manifest_of(tmp_path / "out")
    modules = manifest["adapters"]["."]["modules"]  # type: ignore[index]
    assert set(modules) == {
        f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")
    }
    for name, one in modules.items():
        assert name in printed
        assert f"{one['error']:.3g}" in printed
    assert "8 tensors are the adapters of" in printed
    assert manifest["adapter"] == {"as": "adapter", "rank": 2}
    assert manifest["bytes"] == {
        "adapter_model.safetensors": (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    }
    assert (
        main(["export", str(world / "runs" / "lora"), str(tmp_path / "out"), "--verify"]) == 0
    )  # as it was made


def test_an_adapter_that_was_changed_does_not_verify(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "adapter", tmp_path / "out")
    assert tm.verify_export(world / "runs" / "lora", tmp_path / "out") == 8
    config = tmp_path / "out" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 5', '"lora_alpha": 6'))
    with pytest.raises(ValueError, match=r"is not the export of .*differs in adapter_config.json"):
        tm.verify_export(world / "runs" / "lora", tmp_path / "out")


def test_the_card_is_the_hubs_for_an_adapter(world: Path) -> None:
    text = (world / "adapter" / "README.md").read_text()
    card = ModelCard(text)
    head = card.data.to_dict()
    assert (head["base_model"], head["base_model_relation"]) == ("org/base", "adapter")
    assert (head["library_name"], head["pipeline_tag"]) == ("peft", "text-generation")
    assert head["tags"] == ["lora", "merge", "trainmerge"]
    assert "4 modules of rank 2 to 5 (exact), relative error" in text
    assert "PeftModel.from_pretrained" in text
    assert str(world) not in text
    config = json.loads((world / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert len(config["revision"]) == 40
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("source", ["adapter", "adapter/README.md"])
def test_an_adapter_is_rebuilt_from_its_card(source: str, world: Path, tmp_path: Path) -> None:
    assert main(["rebuild", str(world / source), str(tmp_path / "again")]) == 0
    assert weights(tmp_path / "again") == weights(world / "adapter")
    for name in ("adapter_config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (world / "adapter" / name).read_bytes()
    assert tm.verify_export(world / "runs" / "lora", tmp_path / "again") == 8


def test_a_merge_of_full_experts_by_rank_with_a_patch(world: Path, tmp_path: Path) -> None:
    out, run = tmp_path / "out", world / "runs" / "full"
    words = ["export", str(run), str(out), "--as", "adapter", "--rank", "4", "--rest", "patch", "--verify"]
    with pytest.warns(UserWarning, match=r"the adapter misses .*% of the change, most of it in model.layers"):
        assert main(words) == 0
    text = (out / "README.md").read_text()
    assert "load_file(" in text
    assert "in the patch" in text
    patch = load_file(out / "trainmerge_rest.safetensors")
    assert "model.norm.weight" in patch
    assert set(manifest_of(out)["bytes"]) == {"adapter_model.safetensors", "trainmerge_rest.safetensors"}  # type: ignore[call-overload]
    with pytest.warns(UserWarning, match="the adapter misses"):
        assert main([*words[:7], "--rest", "leave", "--overwrite"]) == 0
    assert not (out / "trainmerge_rest.safetensors").exists()


def test_each_expert_has_a_folder(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", str(world / "runs" / "lora"), str(out), "--as", "adapters", "--verify"]) == 0
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"a", "b"}
    assert "16 tensors" in capsys.readouterr().out
    head = ModelCard((out / "README.md").read_text()).data.to_dict()
    assert "base_model" not in head  # it is the merge
    assert manifest_of(out)["adapters"].keys() == {"a", "b"}  # type: ignore[attr-defined]
    with torch.no_grad(), quiet():
        tokens = torch.arange(2, 12).view(2, 5)
        merged = type(llama()).from_pretrained(world / "merged").eval()
        own = PeftModel.from_pretrained(
            type(llama()).from_pretrained(world / "base").eval(), world / "lora-a"
        )
        got = PeftModel.from_pretrained(merged, out / "a")(tokens).logits
        assert float((got - own(tokens).logits).abs().max()) < 1e-5 * float(got.abs().max())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "4"], "--rank does not apply to --as checkpoint, but to --as adapter or"),
        (["--as", "adapter", "--task", "a"], "--task does not apply to --as adapter"),
        (
            ["--as", "adapter", "--shard-size", "1GB", "--workers", "2"],
            "--workers does not apply",
        ),
        (["--as", "adapter", "--rank", "2", "--energy", "0.9"], "exclude each other"),
        (["--as", "adapter", "--energy", "90"], "adapter.energy must be in"),
        (["--as", "adapter"], "tensors that a LoRA does not hold"),
        (["--as", "adapter", "--rest", "leave"], "name a --rank"),
        (["--as", "lora"], "as"),
    ],
)
def test_what_does_not_fit_is_refused(
    words: list[str], message: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(world / "runs" / "full"), str(tmp_path / "out"), *words]) != 0
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_adapter_is_no_expert(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "adapter", tmp_path / "out")
    tm.Recipe("org/base", {"x": tm.Expert(str(tmp_path / "out"))}).open()
    (tmp_path / "out" / "trainmerge_manifest.json").unlink()
    with pytest.raises(ValueError, match="an export that is not whole"):
        tm.Recipe("org/base", {"x": tm.Expert(str(tmp_path / "out"))}).open()


def killed(words: list[str]) -> None:
    """`extract`, killed when the factors are written and the rest of the folder is not."""
    original = adapter._write

    def write(*arguments: Any) -> str:
        original(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    adapter._write = write
    main(["extract", *words])


def test_a_killed_command_leaves_no_adapter(world: Path, tmp_path: Path) -> None:
    words = [str(world / "base"), str(world / "lora-a"), str(tmp_path / "out")]
    assert exit_code(killed, words) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir())  # the folder aside
    tm.extract(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").glob(".*"))


def test_a_lora_of_a_full_model(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["extract", str(world / "base"), str(world / "a"), str(out), "--rank", "3", "--rest", "leave"]
    with pytest.warns(UserWarning, match="the adapter misses"):
        assert main(words) == 0
    assert "model.norm.weight" in capsys.readouterr().out
    base, expert = (load_file(world / name / "model.safetensors") for name in ("base", "a"))
    modules = manifest_of(out)["adapters"]["."]["modules"]  # type: ignore[index]
    assert len(modules) == 14
    made = load_file(out / "adapter_model.safetensors")
    for module, one in modules.items():
        change = expert[f"{module}.weight"].double() - base[f"{module}.weight"].double()
        squares = torch.linalg.svdvals(change).square()
        assert one["error"] == pytest.approx(float(squares[3:].sum() / squares.sum()) ** 0.5, rel=1e-6)
        up, down = (made[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "BA")
        left = float((change - up @ down).norm() / change.norm())
        assert left == pytest.approx(one["error"], rel=1e-6)
    head = ModelCard((out / "README.md").read_text()).data.to_dict()
    assert head["tags"] == ["lora", "trainmerge"]
    assert str(world) not in (out / "README.md").read_text()
    with pytest.warns(UserWarning, match="the adapter misses"):
        assert main([*words, "--overwrite"]) == 0


def test_an_adapter_of_a_smaller_rank_from_its_factors(world: Path, tmp_path: Path) -> None:
    tm.extract(world / "base", world / "lora-b", tmp_path / "same")
    same = manifest_of(tmp_path / "same")["adapters"]["."]["modules"]  # type: ignore[index]
    assert {one["how"] for one in same.values()} == {"exact"}
    with pytest.warns(UserWarning, match="the adapter misses"):
        tm.extract(world / "base", world / "lora-b", tmp_path / "less", tm.AdapterForm(rank=1))
    less = manifest_of(tmp_path / "less")["adapters"]["."]["modules"]  # type: ignore[index]
    assert {(one["how"], one["rank"]) for one in less.values()} == {("recompressed", 1)}


def test_an_own_head_is_named_where_it_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with quiet():
        bert().save_pretrained(tmp_path / "base")
        write_tokenizer(tmp_path / "base")
        torch.manual_seed(0)
        expert = BertForSequenceClassification(bert().config)
        expert.bert.load_state_dict(bert().state_dict(), strict=False)
        nudge(expert, 3)
        expert.save_pretrained(tmp_path / "expert")
    words = [str(tmp_path / name) for name in ("base", "expert", "out")]
    with pytest.warns(UserWarning, match="the adapter misses"):
        assert main(["extract", *words, "--rank", "2", "--rest", "leave"]) == 0
    assert "own head, classifier.bias, classifier.weight" in capsys.readouterr().out
    assert "`classifier.weight`" in (tmp_path / "out" / "README.md").read_text()


def test_of_a_mixture_attention_is_factored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mixture(tmp_path, "DeepSeek-V3")
    base, tuned, out = (str(tmp_path / name) for name in ("base", "a", "out"))
    words = ["extract", base, tuned, out, "--rank", "64"]
    for rest, said in {(): "tensors that a LoRA does not hold", ("--rest", "patch"): "share a"}.items():
        assert main([*words, *rest]) == 1
        assert re.search(said, capsys.readouterr().err)
    assert main([*words, "--rest", "leave"]) == 0
    modules = {name.rpartition(".lora")[0] for name in load_file(Path(out) / "adapter_model.safetensors")}
    assert {name.split(".")[-2] for name in modules} == {"self_attn", "model"}  # and lm_head
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).merge_and_unload()
    want = dict(AutoModelForCausalLM.from_pretrained(tuned).named_parameters())
    for name in (name.removeprefix("base_model.model.") for name in modules):
        torch.testing.assert_close(model.get_parameter(f"{name}.weight"), want[f"{name}.weight"])
