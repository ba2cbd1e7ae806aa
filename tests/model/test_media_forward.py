"""Pictures without text through towers and heads, against transformers' own forward."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.bounds import assert_within
from tests.family_settings import CLIP, CONVNEXT, SWIN, VISION, picture
from tests.picture_world import build, clip, siglip
from tests.world import write_tokenizer
from trainmerge.data.batch import Batch
from trainmerge.data.classifier import Classifier
from trainmerge.data.heads import LabelHead, LinearHead
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.model.forward import build_classifier, forward

EPS = torch.finfo(torch.float32).eps
LABELS = ["red cat", "blue", "green dog bird"]
TEMPLATES = ["good {}", "a {} fish", "happy {}"]


def batch() -> Batch:
    inputs = picture()
    count = len(inputs["pixel_values"])
    return Batch(0, inputs, torch.ones(count, 1, dtype=torch.bool), torch.arange(count))


def tokenizer(folder: Path, module: nn.Module) -> Tokenizer:
    module.save_pretrained(folder)  # type: ignore[operator]
    write_tokenizer(folder)
    return Tokenizer(str(folder), 16)


def close(got: Tensor, want: Tensor, terms: int) -> None:
    """Within two sums of so many terms, each at most the largest logit."""
    assert_within(got, want, 4 * terms * EPS * want.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("make", [clip, siglip])
def test_label_head_is_transformers_logits_per_image(tmp_path: Path, make: Callable[[], Any]) -> None:
    module = make().eval()
    tokenize = tokenizer(tmp_path, module)
    classifier = build_classifier(LabelHead(LABELS), module, tokenize)
    got = forward(module, batch(), classifier).logits
    texts = dict(tokenize.transformers(LABELS, padding=True, return_tensors="pt"))
    if make is siglip:  # padded to all 12 positions, and unmasked
        texts = {"input_ids": nn.functional.pad(texts["input_ids"], (0, 12 - texts["input_ids"].shape[1]))}
    else:
        texts.pop("token_type_ids", None)
    want = module(**texts, **picture()).logits_per_image
    assert want.std() > 0.01  # not all alike
    close(got, want, 32)


@torch.no_grad()
def test_templates_are_averaged_as_unit_vectors(tmp_path: Path) -> None:
    """The zero-shot head of CLIP's paper, and of AdaMerging's benchmark, in float64."""
    module = clip().eval()
    tokenize = tokenizer(tmp_path, module)
    classifier = build_classifier(LabelHead(LABELS, templates=TEMPLATES), module, tokenize)
    rows = []
    for label in LABELS:
        inputs = tokenize([template.replace("{}", label) for template in TEMPLATES])
        inputs.pop("token_type_ids", None)
        embedded = module.get_text_features(**inputs).pooler_output.double()
        mean = (embedded / embedded.norm(dim=-1, keepdim=True)).mean(dim=0)
        rows.append(mean / mean.norm())
    pictures = module.get_image_features(**picture()).pooler_output.double()
    pictures = pictures / pictures.norm(dim=-1, keepdim=True)
    want = module.logit_scale.double().exp() * pictures @ torch.stack(rows).T
    close(forward(module, batch(), classifier).logits.double(), want, 32)


@torch.no_grad()
def test_a_scale_of_ones_own_replaces_clips(tmp_path: Path) -> None:
    module = clip().eval()
    tokenize = tokenizer(tmp_path, module)
    own = build_classifier(LabelHead(LABELS), module, tokenize)
    given = build_classifier(LabelHead(LABELS, scale=7.0), module, tokenize)
    assert own is not None
    assert given is not None
    assert_within(own.weight / module.logit_scale.exp(), given.weight / 7.0, 4 * EPS)


def test_identity_without_templates_is_that_of_older_versions(tmp_path: Path) -> None:
    plain = LabelHead(["red", "blue"])
    assert plain.identity() == "LabelHead(labels=['red', 'blue'], scale=20.0, pooling='mean') ['red', 'blue']"
    (tmp_path / "templates.json").write_text('["a {}"]')
    listed, filed = (
        LabelHead(["red", "blue"], templates=t) for t in (["a {}"], str(tmp_path / "templates.json"))
    )
    assert listed.identity() == filed.identity() == f"{plain.identity()} ['a {{}}']"


@pytest.mark.parametrize("templates", [["no place"], ["{} {}"], [3], "none.json"])
def test_unusable_templates_are_refused(templates: Any) -> None:
    with pytest.raises(ValueError, match=r"template|none\.json"):
        LabelHead(["red", "blue"], templates=templates).identity()


TOWERS: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "ViT": ("ViTModel", VISION, "first"),
    "DeiT": ("DeiTModel", VISION, "first"),
    "DINOv2": ("Dinov2Model", VISION, "pooled"),
    "Swin": ("SwinModel", SWIN, "pooled"),
    "ConvNeXt": ("ConvNextModel", CONVNEXT, "pooled"),
    "BEiT": ("BeitModel", VISION, "pooled"),
    "CLIP": ("CLIPVisionModelWithProjection", CLIP["vision_config"], "pooled"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_linear_heads_read_each_towers_own_vector(tmp_path: Path, name: str) -> None:
    kind, settings, pooling = TOWERS[name]
    module = build(kind, dict(settings)).eval()
    output = module(**picture(), output_hidden_states=True)
    vector = {
        "first": lambda: output.last_hidden_state[:, 0],
        "pooled": lambda: output["image_embeds" if "image_embeds" in output else "pooler_output"],
    }[pooling]()
    weight, bias = torch.randn(5, vector.shape[-1]), torch.randn(5)
    save_file({"classifier.weight": weight, "classifier.bias": bias}, tmp_path / "head.safetensors")
    head = LinearHead(str(tmp_path / "head.safetensors"), pooling=pooling)  # type: ignore[arg-type]
    found = forward(module, batch(), build_classifier(head, module, dict), layers=(0, -1))
    close(found.logits, nn.functional.linear(vector, weight, bias), vector.shape[-1])
    for layer in (0, -1):  # all patches of a picture are one vector
        assert torch.equal(found.hidden[layer][:, 0], output.hidden_states[layer].flatten(1))


def test_a_map_of_channels_has_no_first_position() -> None:
    module = build("ConvNextModel", dict(CONVNEXT))
    head = Classifier(torch.zeros(2, 32), None, "first", normalise=False)
    with pytest.raises(ValueError, match="first needs a first position"):
        forward(module, batch(), head)
    mean = forward(module, batch(), head._replace(weight=torch.eye(32), pooling="mean")).logits
    maps = module(**picture()).last_hidden_state
    close(mean, maps.mean(dim=(2, 3)), maps[0, 0].numel())


@torch.no_grad()
def test_pixels_take_the_weights_dtype() -> None:
    module = build("ViTForImageClassification", dict(VISION)).bfloat16()
    assert forward(module, batch(), None).logits.dtype == torch.bfloat16
