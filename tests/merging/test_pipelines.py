"""Folders of diffusers: components as plain state dicts, LoRAs averaged on products, out as folder or LoRA.

SELMA (Li et al., arXiv 2403.06952): a merged layer's output is the base's plus the mean of the adapters'.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import trainmerge as tm
from tests import pipeline_world as world
from tests.pipeline_world import CONV, FC, OUT, TEXT_Q, Q, factors, pipeline, product
from trainmerge.cli.program import main

UNET = "unet/diffusion_pytorch_model.safetensors"


def read(folder: Path, part: str = "unet") -> dict[str, Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pipeline(tmp_path / "base", 0)


def diffusers_form(layers: dict[str, int], seed: int, parts: dict[str, str]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for layer, rank in layers.items():
        up, down = factors(layer, rank, seed)
        key = f"{parts[layer]}{layer}"
        made |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    return made


def older(made: dict[str, Tensor]) -> dict[str, Tensor]:
    """`processor.to_q_lora.down.weight`, `lora_linear_layer.up.weight`, as diffusers wrote until 0.20."""
    found = {}
    for key, tensor in made.items():
        name = key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
        if "attn1" in name:
            name = name.replace("attn1.", "attn1.processor.").replace("to_out.0.lora.", "to_out_lora.")
            name = name.replace("to_q.lora.", "to_q_lora.")
        elif "text_encoder" in name:
            name = name.replace(".q_proj.lora.", ".to_q_lora.").replace(
                ".fc1.lora.", ".fc1.lora_linear_layer."
            )
        found[name] = tensor
    return found


def kohya(made: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for key, tensor in made.items():
        part, _, rest = key.partition(".")
        layer, _, factor = rest.partition(".lora_")
        place = "lora_unet_" if part == "unet" else "lora_te_"
        kind = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[factor]
        found[f"{place}{layer.replace('.', '_')}.{kind}"] = tensor
    return found


PARTS = {Q: "unet.", OUT: "unet.", CONV: "unet.", TEXT_Q: "text_encoder.", FC: "text_encoder."}
FORMS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "diffusers": dict, "older diffusers": older, "kohya": kohya,
}  # fmt: skip


def skill(file: Path, seed: int, rank: int = 2, form: str = "diffusers", alpha: float | None = None) -> Path:
    made = FORMS[form](diffusers_form(dict.fromkeys(PARTS, rank), seed, PARTS))
    if alpha is not None:
        modules = {re.split(r"[._]lora(_linear_layer)?[._](?:A|B|down|up)[.]", key)[0] for key in made}
        made |= {f"{module}.alpha": torch.tensor(alpha) for module in modules}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in made.items()}, file)
    return file


def test_components_are_merged_as_state_dicts_and_the_rest_is_copied(base: Path, tmp_path: Path) -> None:
    experts = [pipeline(tmp_path / f"e{k}", k, ("unet", "text_encoder")) for k in (1, 2)]
    out = tm.merge_models(base, experts, tmp_path / "out", weight=[0.7, 0.5])
    for part in ("unet", "text_encoder"):
        start, merged = read(base, part), read(out, part)
        found = tm.merge_state_dicts(
            start, {f"e{k}": read(own, part) for k, own in enumerate(experts)}, {"e0": 0.7, "e1": 0.5}
        )
        for name, tensor in merged.items():
            torch.testing.assert_close(tensor, found[name], rtol=1e-6, atol=1e-6)
    assert (out / "vae/diffusion_pytorch_model.safetensors").read_bytes() == (
        base / "vae/diffusion_pytorch_model.safetensors"
    ).read_bytes() or all(torch.equal(t, read(base, "vae")[n]) for n, t in read(out, "vae").items())
    for file in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"):
        assert json.loads((out / file).read_text()) == json.loads((base / file).read_text())
    card = (out / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert str(tmp_path) not in card.replace("\\", "")


def test_one_hot_is_the_expert_bit_for_bit(base: Path, tmp_path: Path) -> None:
    expert = pipeline(tmp_path / "expert", 1)
    out = tm.merge_models(base, [expert], tmp_path / "out", method="linear", weight=[0.0, 1.0])
    assert all(torch.equal(tensor, read(expert)[name]) for name, tensor in read(out).items())


@pytest.mark.parametrize("form", FORMS)
def test_loras_are_averaged_on_products(base: Path, tmp_path: Path, form: str) -> None:
    """W x + mean_k s_k B_k (A_k x), in every key form, with each LoRA's own rank and alpha."""
    first = skill(tmp_path / "a/pytorch_lora_weights.safetensors", 1, rank=2, form=form)
    second = skill(tmp_path / "b.safetensors", 2, rank=3, form=form, alpha=1.5)
    out = tm.merge_models(base, [first.parent, second], tmp_path / "out")
    for layer, prefix in PARTS.items():
        part = prefix.removesuffix(".")
        start, merged = (read(folder, part)[f"{layer}.weight"].double() for folder in (base, out))
        change = (product(layer, 2, 1, 1.0) + product(layer, 3, 2, 0.5)) / 2
        torch.testing.assert_close(merged, start + change, rtol=1e-5, atol=1e-5)
        inputs = torch.randn(5, start[0].numel(), dtype=torch.float64)
        wanted = inputs @ start.flatten(1).T + inputs @ change.flatten(1).T
        torch.testing.assert_close(inputs @ merged.flatten(1).T, wanted, rtol=1e-5, atol=1e-4)
    untouched = "down_blocks.0.attentions.0.proj_in.weight"
    assert torch.equal(read(out)[untouched], read(base)[untouched])


def test_one_lora_of_several_is_exact(base: Path, tmp_path: Path) -> None:
    skills = [skill(tmp_path / f"{k}.safetensors", k, rank=k, form="kohya", alpha=1.0) for k in (1, 2)]
    folder = tm.merge_models(base, skills, tmp_path / "out", weight=[0.25, 0.75])
    file = tm.merge_models(base, skills, tmp_path / "one.safetensors", weight=[0.25, 0.75])
    one = load_file(file)
    assert one[f"unet.{Q}.lora_A.weight"].shape == (3, 8)
    assert one[f"unet.{CONV}.lora_A.weight"].shape == (3, 4, 3, 3)
    again = tm.merge_models(base, [file], tmp_path / "again", weight=1.0)
    for part in ("unet", "text_encoder"):
        for name, tensor in read(again, part).items():
            torch.testing.assert_close(tensor, read(folder, part)[name], rtol=1e-5, atol=1e-5)
    cut = load_file(tm.merge_models(base, skills, tmp_path / "cut.safetensors", rank=1))
    change = (product(Q, 1, 1, 1.0) + product(Q, 2, 2, 0.5)) / 2
    up, down = cut[f"unet.{Q}.lora_B.weight"].double(), cut[f"unet.{Q}.lora_A.weight"].double()
    tail = torch.linalg.svdvals(change)[1:].square().sum()
    assert float((up @ down - change).square().sum()) == pytest.approx(float(tail), rel=1e-4)


def test_alphas_of_diffusers_metadata(base: Path, tmp_path: Path) -> None:
    made = diffusers_form({Q: 2, OUT: 2}, 1, PARTS)
    settings = {"unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_out.0": 1}, "unet.use_rslora": False}
    file = tmp_path / "skill.safetensors"
    save_file(made, file, metadata={"lora_adapter_metadata": json.dumps(settings)})
    out = tm.merge_models(base, [file], tmp_path / "out", weight=1.0)
    for layer, scale in ((Q, 3.0), (OUT, 0.5)):
        start, merged = (read(folder)[f"{layer}.weight"].double() for folder in (base, out))
        torch.testing.assert_close(merged - start, product(layer, 2, 1, scale), rtol=1e-4, atol=1e-5)


def test_a_component_alone(tmp_path: Path) -> None:
    config = {"_class_name": "DiTTransformer2DModel", "num_layers": 1}
    states = [world.weights(world.DIT, seed) for seed in range(3)]
    folders = [world.component(tmp_path / f"dit{k}", state, config) for k, state in enumerate(states)]
    out = tm.merge_models(
        folders[0], folders[1:], tmp_path / "out", method="ties", parameters={"density": 0.5}
    )
    merged = load_file(out / "diffusion_pytorch_model.safetensors")
    vectors = tm.TaskVectors.from_state_dicts(states[0], {"1": states[1], "2": states[2]})
    assert merged.keys() == vectors.deltas.keys()
    name = "transformer_blocks.0.attn1.to_q.weight"
    file = tmp_path / "skill.safetensors"
    up, down = torch.randn(8, 2), torch.randn(2, 8)
    save_file({f"{name[:-7]}.lora_A.weight": down, f"{name[:-7]}.lora_B.weight": up}, file)
    skilled = tm.merge_models(folders[0], [file], tmp_path / "skilled", weight=1.0)
    found = load_file(skilled / "diffusion_pytorch_model.safetensors")[name]
    torch.testing.assert_close(found, states[0][name] + up @ down, rtol=1e-5, atol=1e-5)


def test_a_fine_tuned_component_of_a_pipeline(base: Path, tmp_path: Path) -> None:
    own = pipeline(tmp_path / "expert", 1) / "unet"
    out = tm.merge_models(base, [own], tmp_path / "out", method="linear", weight=[0.0, 1.0])
    assert all(torch.equal(tensor, read(own.parent)[name]) for name, tensor in read(out).items())


def test_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expert = pipeline(tmp_path / "expert", 1)
    main(["merge", str(base), str(expert), "-o", str(tmp_path / "out"), "--shard-size", "1KB"])
    assert (tmp_path / "out/unet/diffusion_pytorch_model.safetensors.index.json").is_file()
    main(["merge", str(base), str(expert), "-o", str(tmp_path / "out"), "--shard-size", "1KB"])
    assert "is this merge already" in capsys.readouterr().out


def write_dora(file: Path) -> None:
    up, down = factors(Q, 2, 1)
    made = {f"unet.{Q}.lora_A.weight": down, f"unet.{Q}.lora_B.weight": up}
    save_file({**made, f"unet.{Q}.lora_magnitude_vector": torch.ones(8)}, file)


def test_what_is_refused(base: Path, tmp_path: Path) -> None:
    def refused(expert: Path, words: str, **settings: object) -> None:
        with pytest.raises(ValueError, match=words):
            tm.merge_models(base, [expert], tmp_path / "out", **settings)  # type: ignore[arg-type]

    refused(
        pipeline(tmp_path / "v", 1, prediction="v_prediction"), "predicts v_prediction, the base's epsilon"
    )
    other = pipeline(tmp_path / "gelu", 1)
    (other / "unet/config.json").write_text('{"_class_name": "UNet2DConditionModel", "act_fn": "gelu"}')
    refused(other, "unet: act_fn is 'gelu', the base's is 'silu'")
    write_dora(tmp_path / "dora.safetensors")
    refused(tmp_path / "dora.safetensors", "magnitude_vector is no factor of a LoRA")
    save_file({"unet.nowhere.lora_A.weight": torch.ones(1, 8)}, tmp_path / "half.safetensors")
    refused(tmp_path / "half.safetensors", "one factor of two")
    sgm = {f"lora_unet_input_blocks_1_1.lora_{side}.weight": torch.ones(2, 2) for side in ("up", "down")}
    save_file(sgm, tmp_path / "sgm.safetensors")
    refused(tmp_path / "sgm.safetensors", "no such layer.*save_lora_weights")
    refused(pipeline(tmp_path / "same", 0), "changed a weight")
    refused(pipeline(tmp_path / "words", 1), "not for folders of diffusers", tokenizer="base")
    file = pipeline(tmp_path / "variant", 1) / UNET
    file.rename(file.with_suffix(".fp16.safetensors"))
    refused(tmp_path / "variant", "variants.*without a variant")
    with pytest.raises(ValueError, match="not a LoRA, and a file is one LoRA"):
        tm.merge_models(base, [tmp_path / "v2"], tmp_path / "x.safetensors") if pipeline(
            tmp_path / "v2", 1
        ) else None


@pytest.mark.filterwarnings("default")
def test_with_diffusers_itself(tmp_path: Path) -> None:
    """A U-Net with two LoRAs by diffusers, and with their merge as folder and as LoRA, say the same."""
    diffusers = pytest.importorskip("diffusers")
    from peft import LoraConfig

    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8,
             "cross_attention_dim": 8, "attention_head_dim": 4,
             "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip
    unet = diffusers.UNet2DConditionModel(**shape).eval()
    unet.save_pretrained(tmp_path / "base")
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 8))
    for k, rank in enumerate((2, 3)):
        config = LoraConfig(r=rank, lora_alpha=4, target_modules=["to_q", "to_out.0", "conv1"])
        unet.add_adapter(config, f"s{k}")
        for name, parameter in unet.named_parameters():
            if f".s{k}." in name:
                torch.nn.init.normal_(parameter, std=0.3)
        unet.save_lora_adapter(tmp_path / f"s{k}", adapter_name=f"s{k}")
    unet.set_adapters(["s0", "s1"], [0.5, 0.5])
    with torch.no_grad():
        wanted = unet(*inputs).sample
    skills = [tmp_path / "s0", tmp_path / "s1"]
    folder = tm.merge_models(tmp_path / "base", skills, tmp_path / "out")
    merged = diffusers.UNet2DConditionModel.from_pretrained(folder).eval()
    one = tm.merge_models(tmp_path / "base", skills, tmp_path / "one.safetensors")
    adapted = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        plain = adapted(*inputs).sample
        adapted.load_lora_adapter(load_file(one), prefix=None)
        found = [merged(*inputs).sample, adapted(*inputs).sample]
    assert float((plain - wanted).norm() / wanted.norm()) > 0.05
    for sample in found:
        torch.testing.assert_close(sample, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("default")
def test_a_tiny_dit_with_diffusers_itself(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")

    def dit(seed: int) -> object:
        torch.manual_seed(seed)
        return diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=2, num_layers=2, sample_size=4,
            patch_size=2, num_embeds_ada_norm=5, norm_num_groups=2,
        ).eval()  # fmt: skip

    models = [dit(seed) for seed in range(3)]
    for k, model in enumerate(models):
        model.save_pretrained(tmp_path / f"d{k}")  # type: ignore[attr-defined]
    experts = [tmp_path / "d1", tmp_path / "d2"]
    out = tm.merge_models(tmp_path / "d0", experts, tmp_path / "out", weight=[0.3, 0.6])
    merged = diffusers.DiTTransformer2DModel.from_pretrained(out).state_dict()
    states = [model.state_dict() for model in models]  # type: ignore[attr-defined]
    for name, tensor in merged.items():
        base, one, two = (state[name].double() for state in states)
        wanted = base + 0.3 * (one - base) + 0.6 * (two - base)
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-6)
