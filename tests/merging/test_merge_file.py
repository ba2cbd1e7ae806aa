"""mergekit's files end to end: gradients, filters, dtypes, mistakes; and the one-line command."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import trainmerge as tm
from tests.cli.test_cli import write_config
from tests.world import languages_recipe, llama, nudge, write_languages, write_world
from trainmerge.cli import main
from trainmerge.merging.read_document import parse_document


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mergekit")
    write_languages(root)
    adapter = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    nudge(adapter, 7)
    adapter.save_pretrained(root / "lora")
    return root


def write(world: Path, file: Path, **content: object) -> Path:
    """A mergekit file; `@x` names the model x of the world."""
    text = yaml.safe_dump(content).replace("@", f"{world}/")
    file.write_text(text)
    return file


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("model*.safetensors") for name, t in load_file(file).items()}


def two(**each: object) -> list[dict[str, object]]:
    return [{"model": f"@{n}", "parameters": {k: v[i] for k, v in each.items()}} for i, n in enumerate("ab")]


def test_a_linear_file_with_filters_gradients_and_dtypes(world: Path, tmp_path: Path) -> None:
    weight = [{"filter": "mlp", "value": [0, 1]}, {"value": 0.25}]
    models = [{"model": "@a", "parameters": {"weight": 1}}, {"model": "@b", "parameters": {"weight": weight}}]
    file = write(
        world, tmp_path / "m.yml", merge_method="linear", models=models, parameters={"normalize": False},
        dtype="float32", out_dtype="bfloat16", tokenizer_source="@base",
    )  # fmt: skip
    tm.merge_file(file, tmp_path / "out")
    a, b, got = tensors(world / "a"), tensors(world / "b"), tensors(tmp_path / "out")
    for name, tensor in got.items():
        share = float(".1." in name) if "mlp" in name else 0.25
        assert torch.equal(tensor, torch.add(a[name], b[name], alpha=share).bfloat16()), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("red cat")["input_ids"]
    assert str(world) not in (tmp_path / "out/mergekit_config.yml").read_text()
    assert str(world) not in (tmp_path / "out/README.md").read_text()


def test_task_arithmetic_is_the_export_of_the_same_coefficients(world: Path, tmp_path: Path) -> None:
    file = write(world, tmp_path / "m.yml", merge_method="task_arithmetic", base_model="@base",
                 models=[{"model": "@base"}, *two(weight=(0.3, 0.3))])  # fmt: skip
    tm.merge_file(file, tmp_path / "out")
    module = tm.MergeModule(languages_recipe(world), initial=0.3, workspace=str(tmp_path / "run/workspace"))
    trainer = tm.make_trainer(tmp_path / "run", max_steps=0, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, tm.Calibration({}, str(world / "base")), trainer, tmp_path / "run")
    tm.export_run(tmp_path / "run", tmp_path / "exported")
    exported = tensors(tmp_path / "exported")
    for name, tensor in tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor, exported[name], rtol=1e-6, atol=1e-7)


def test_adapters_and_slices_over_the_whole_depth(world: Path, tmp_path: Path) -> None:
    names = ["@base+@lora", "@a"]
    sources = [{"model": name, "layer_range": [0, 2], "parameters": {"weight": 0.5}} for name in names]
    content = {"merge_method": "task_arithmetic", "base_model": "@base", "slices": [{"sources": sources}]}
    tm.merge_file(write(world, tmp_path / "m.yml", **content), tmp_path / "out")
    base, a, got = tensors(world / "base"), tensors(world / "a"), tensors(tmp_path / "out")
    factors = load_file(world / "lora/adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    up, down = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
    want = (
        base[f"{name}.weight"] + 0.5 * (2 * up @ down) + 0.5 * (a[f"{name}.weight"] - base[f"{name}.weight"])
    )
    torch.testing.assert_close(got[f"{name}.weight"], want, rtol=1e-5, atol=1e-6)
    other = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(got[other], base[other] + 0.5 * (a[other] - base[other]), rtol=1e-6, atol=1e-7)
    sources[0]["layer_range"] = sources[1]["layer_range"] = [0, 1]
    with pytest.raises(ValueError, match=r"the layers end at 1, and .* has 2"):
        tm.merge_file(write(world, tmp_path / "part.yml", **content), tmp_path / "part")


MISTAKES = [
    ({"merge_method": "tise"}, "no method 'tise'; did you mean 'ties'"),
    ({"merge_method": "passthrough"}, "merge_method: passthrough is not supported: it copies tensors"),
    (
        {"merge_method": "passthrough", "models": None, "slices": [{"sources": []}, {"sources": []}]},
        "passthrough is not supported.*\n.*slices: stacking layers is not supported, and there are 2",
    ),
    ({"dtpye": "bfloat16"}, "no key 'dtpye'; did you mean 'dtype'"),
    ({"parameters": {"densty": 0.5}}, "no setting 'densty'; did you mean 'density'"),
    ({"parameters": {"density": "much"}}, "density is 'much', not a number"),
    ({"parameters": {"normalize": 1}}, "normalize is 1, not true or false"),
    ({"models": [{"model": "@a"}, {"model": "@b", "parameters": {"weight": 1}}]}, "@a: ties needs 'weight'"),
    ({"models": [{"model": "@a", "wieght": 1}]}, "no key 'wieght'"),
    ({"models": [{"model": "@a"}, {"model": "@a"}]}, "@a is listed twice"),
    ({"models": []}, "models must be a list"),
    ({"base_model": None}, "ties needs base_model"),
    ({"dtype": "int8"}, "dtype is 'int8'; it is one of float32"),
    ({"tokenizer": {"sauce": "base"}}, "tokenizer: no key 'sauce'; there are source"),
    ({"tokenizer": "union"}, "tokenizer is 'union', not a mapping"),
    ({"tokenizer": {"source": "base"}, "tokenizer_source": "base"}, "tokenizer_source: write one of them"),
    ({"tokenizer": {"pad_to_multiple_of": 0}}, "pad_to_multiple_of is 0, not a number of rows"),
    ({"tokenizer": {"tokens": {"x": {"source": "@c"}}}}, "tokens.x: @c is none of the models"),
    ({"tokenizer": {"tokens": {"x": {"force": True}}}}, "is not a `source`"),
    ({"tokenizer": {"tokens": {"x": {"source": "@a", "force": 1}}}}, "force is 1, not true or false"),
    ({"tokenizer": {"tokens": {"x": {"source": {"kind": "none"}}}}}, "it is a model, .kind: zero."),
    (
        {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "@a"}}}}},
        "a model_token has a `model`, and a `token` or a `token_id`",
    ),
    ({"chat_template": "llama3"}, "chat_template llama3: its text is mergekit's"),
    ({"chat_template": "chatlm"}, "chat_template is 'chatlm'; it is auto, chatml, a merged model's folder"),
    ({"chat_template": 1}, "chat_template is 1, not a text"),
    (
        {"models": None, "slices": [{"sources": []}, {"sources": []}]},
        "slices: stacking layers is not supported",
    ),
    ({"merge_method": "nearswap", "parameters": {"t": 1}}, "nearswap merges 1 models besides the base"),
    ({"merge_method": "slerp", "models": [{"model": "@a"}]}, "slerp needs 't'"),
]


@pytest.mark.parametrize(("changes", "words"), MISTAKES, ids=[words[:20] for _, words in MISTAKES])
def test_mistakes_are_named(changes: dict[str, object], words: str) -> None:
    content = {"merge_method": "ties", "base_model": "@base", "models": two(weight=(0.5, 0.5)), **changes}
    with pytest.raises(ValueError, match=words.replace("`", ".")):
        parse_document({key: value for key, value in content.items() if value is not None})


def test_a_filter_that_leaves_tensors_out_is_named_with_the_tensor(world: Path, tmp_path: Path) -> None:
    models = two(weight=([{"filter": "mlp", "value": 1}], 0.5))
    file = write(world, tmp_path / "m.yml", merge_method="linear", models=models)
    with pytest.raises(ValueError, match=r"no value of `weight` for .*its filters match other tensors only"):
        tm.merge_file(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_in_one_line(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["merge", str(world / "base"), str(world / "a"), str(world / "b"), "-o", str(tmp_path / "out")]
    words += ["--method", "ties", "--weight", "0.5", "--density", "0.4", "--dtype", "bfloat16"]
    assert main(words) == 0
    file = write(world, tmp_path / "m.yml", merge_method="ties", base_model="@base",
                 models=two(weight=(0.5, 0.5)), parameters={"density": 0.4})  # fmt: skip
    assert main(["merge", str(file), str(tmp_path / "same"), "--dtype", "bfloat16"]) == 0
    same = tensors(tmp_path / "same")
    assert all(torch.equal(tensor, same[name]) for name, tensor in tensors(tmp_path / "out").items())
    before = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert main(words) == 0  # again: it is there
    assert "is this merge already" in capsys.readouterr().out
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == before
    assert main([*words, "--weight", "0.6"]) == 1  # another merge does not replace it


def test_weights_per_expert_and_the_plain_mean(world: Path, tmp_path: Path) -> None:
    base, a, b = (world / name for name in ("base", "a", "b"))
    tm.merge_models(base, [a, b], tmp_path / "mean", "linear")
    tm.merge_models(base, [a, b], tmp_path / "sum", weight=[0.2, 0.7])
    w0, wa, wb = tensors(base), tensors(a), tensors(b)
    for name, tensor in tensors(tmp_path / "mean").items():
        torch.testing.assert_close(tensor, (w0[name] + wa[name] + wb[name]) / 3, rtol=1e-6, atol=1e-7)
    for name, tensor in tensors(tmp_path / "sum").items():
        want = w0[name] + 0.2 * (wa[name] - w0[name]) + 0.7 * (wb[name] - w0[name])
        torch.testing.assert_close(tensor, want, rtol=1e-6, atol=1e-7)


def test_a_configuration_in_one_line_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_world(tmp_path)
    config, out = write_config(tmp_path), tmp_path / "merged"
    words = ["merge", str(config), str(out), "--run", str(tmp_path / "kept")]
    assert main(words) == 0
    tm.export_run(tmp_path / "kept", tmp_path / "exported")
    merged = tensors(out)
    assert all(torch.equal(t, merged[name]) for name, t in tensors(tmp_path / "exported").items())
    capsys.readouterr()
    assert main(words) == 0
    assert "is this run's merge already" in capsys.readouterr().out
    manifest = json.loads((out / "trainmerge_manifest.json").read_text())
    assert set(manifest["run"]["experts"]) == {"mood", "colour", "animal"}


WRONG_WORDS = [
    (["{base}", "{a}"], "BASE EXPERT... -o OUT"),
    (["{base}", "-o", "out"], "BASE EXPERT... -o OUT"),
    (["{base}", "{a}", "{a}", "-o", "out"], "is given twice"),
    (["{base}", "{a}", "{b}", "-o", "out", "--weight", "[1, 2, 3]"], "there are 3 weights for 2 models"),
    (["{base}", "{a}", "-o", "out", "--method", "karcher", "--weight", "1"], "karcher has no weights"),
    (["{base}", "{a}", "-o", "out", "--run", "x"], "--run goes with CONFIG"),
    (["nowhere.yml", "out"], "neither a file nor a folder"),
    (["{file}"], "name a file and the output"),
    (["{file}", "out", "--weight", "0.5"], "--weight goes with models"),
    (["{other}", "out"], "neither a mergekit file"),
]


OTHER_FILES = [
    ("merge_method: linear\nname: one\n---\nmerge_method: linear\n", "as mergekit-multi reads"),
    ("base_model: a\ngate_mode: random\nexperts: []\n", "a file of mergekit-moe; `trainmerge export"),
    ("genome: {models: [a, b]}\ntasks: []\n", "a file of mergekit-evolve; `trainmerge search"),
]


@pytest.mark.parametrize(("text", "words"), OTHER_FILES, ids=["multi", "moe", "evolve"])
def test_mergekits_other_files_are_named(
    tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.yml").write_text(text)
    assert main(["merge", str(tmp_path / "m.yml"), str(tmp_path / "out")]) == 1
    assert words in capsys.readouterr().err
    if "multi" in words:
        with pytest.raises(ValueError, match=words):
            tm.merge_file(tmp_path / "m.yml", tmp_path / "out")


@pytest.mark.parametrize(("words", "error"), WRONG_WORDS, ids=[error[:25] for _, error in WRONG_WORDS])
def test_wrong_words_are_named(
    world: Path, tmp_path: Path, words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(world, tmp_path / "m.yml", merge_method="karcher", models=[{"model": "@a"}, {"model": "@b"}])
    (tmp_path / "other.yml").write_text("a: 1\n")
    places = {name: world / name for name in ("base", "a", "b")} | {
        "file": file,
        "other": tmp_path / "other.yml",
    }
    assert main(["merge", *(word.format(**places) if "{" in word else word for word in words)]) == 1
    assert error in capsys.readouterr().err


def test_help_fits_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) <= 50


def test_a_wider_expert_makes_the_merge_float32_and_not_wider(world: Path, tmp_path: Path) -> None:
    wide = AutoModelForCausalLM.from_pretrained(world / "a").double()
    wide.save_pretrained(tmp_path / "wide")
    with pytest.warns(UserWarning, match="float64 against torch.float32"):
        tm.merge_models(world / "base", [tmp_path / "wide"], tmp_path / "out")
    want = tensors(world / "a")
    got = tensors(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in got.items()} == dict.fromkeys(want, torch.float32)
    for name, tensor in want.items():  # base + 1 * (a - base) is within a rounding of a
        torch.testing.assert_close(got[name], tensor)


def test_a_first_word_that_is_no_path_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "~/base", "a", "b", "-o", "out"]) == 1
    error = capsys.readouterr().err
    assert "~/base: neither a file nor a folder" in error
    assert "~ and $ are no shortcuts here: write the whole path" in error
