"""Frozen heads: what they compute, and what they refuse.

Legend: `B` examples, `T` tokens, `D` hidden size, `V` classes.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cosine_similarity

from tests.contracts import assert_same_bits
from trainmerge.data.classifier import Classifier, pool
from trainmerge.data.heads import LabelHead, LinearHead
from trainmerge.data.label_texts import read_labels

RIGHT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
LEFT = RIGHT.flip(1)


@pytest.fixture
def hidden(generator):
    return torch.randn(3, 5, 8, generator=generator)


def encoder(hidden, mask):
    """An encoder that knows its texts by number, and is asked for no others."""

    def encode(texts):
        rows = [int(text) for text in texts]
        return hidden[rows], mask[rows]

    return encode


@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
def test_pool(hidden, mask):
    mean = torch.stack([states[keep].mean(0) for states, keep in zip(hidden, mask, strict=True)])
    first = torch.stack([states[keep][0] for states, keep in zip(hidden, mask, strict=True)])
    torch.testing.assert_close(pool(hidden, mask, "mean"), mean)
    assert_same_bits(pool(hidden, mask, "first"), first)


@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_padding_has_no_effect(hidden, mask, pooling):
    classifier = Classifier(hidden[:, 0], None, pooling, normalise=True)
    leaf = hidden.clone().requires_grad_()
    logits = classifier(leaf, mask)
    logits.sum().backward()
    assert leaf.grad[~mask].abs().sum() == 0
    assert leaf.grad[mask].abs().sum() > 0
    other = torch.where(mask[..., None], hidden, 1e3 - hidden)
    assert_same_bits(classifier(other, mask), logits.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mean_of_a_long_text_in_half_precision(dtype):
    """257 tokens of 1000 sum to more than float16 holds, and bfloat16 cannot count to 257."""
    hidden = torch.full((1, 300, 2), 1000.0, dtype=dtype)
    mask = torch.arange(300)[None] < 257
    pooled = pool(hidden, mask, "mean")
    assert pooled.dtype == dtype
    assert_same_bits(pooled, torch.full((1, 2), 1000.0, dtype=dtype))


def test_label_head_is_the_scaled_cosine(hidden, generator):
    labels = torch.randn(4, 5, 8, generator=generator)
    keep = torch.ones(4, 5, dtype=torch.bool)
    keep[2, 3:] = False
    classifier = LabelHead(["2", "0", "3"], scale=7.0).build(encoder(labels, keep))
    logits = classifier(hidden, RIGHT)
    embeddings = pool(labels, keep, "mean")[[2, 0, 3]]
    want = 7 * cosine_similarity(pool(hidden, RIGHT, "mean")[:, None], embeddings[None], dim=-1)
    torch.testing.assert_close(logits, want)
    torch.testing.assert_close(classifier(9 * hidden, RIGHT), want)  # only the direction counts
    assert logits.abs().max() <= 7
    own = LabelHead(["2", "0", "3"], scale=7.0).build(encoder(labels, keep))(labels[[3]], keep[[3]])
    torch.testing.assert_close(own[0, 2], torch.tensor(7.0))


def test_label_head_pools_labels_and_texts_alike(hidden):
    classifier = LabelHead(["0", "1"], scale=1.0, pooling="first").build(encoder(hidden, LEFT))
    logits = classifier(hidden, LEFT)
    first = pool(hidden, LEFT, "first")
    torch.testing.assert_close(logits, cosine_similarity(first[:, None], first[None, :2], dim=-1))


def test_label_head_reads_its_labels_from_a_file(tmp_path, hidden):
    (tmp_path / "labels.json").write_text(json.dumps(["1", "0"]))
    from_file = LabelHead(str(tmp_path / "labels.json"))
    assert from_file.texts() == ["1", "0"]
    got, want = (head.build(encoder(hidden, RIGHT)).weight for head in (from_file, LabelHead(["1", "0"])))
    assert_same_bits(got, want)


@pytest.mark.parametrize(
    "text",
    ["{}", '{"a": 1, "b": 2}', "[]", '["one"]', '["one", 2]', '"ab"', "null", "", "one\ntwo\n"],
)
def test_a_bad_label_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"labels\.json: "):
        read_labels(path)
    with pytest.raises(ValueError, match=r"labels\.json: "):
        LabelHead(str(path)).texts()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_linear_head(tmp_path, hidden, generator, bias, pooling):
    weight, offset = torch.randn(3, 8, generator=generator), torch.randn(3, generator=generator)
    save_file({"score.w": weight, "score.b": offset}, tmp_path / "head.safetensors")
    head = LinearHead(str(tmp_path / "head.safetensors"), "score.w", "score.b" if bias else None, pooling)
    classifier = head.build(encoder(hidden, RIGHT))
    assert_same_bits(classifier.weight, weight)
    want = pool(hidden, RIGHT, pooling) @ weight.T + (offset if bias else 0)
    torch.testing.assert_close(classifier(hidden, RIGHT), want)


def test_linear_head_names_what_is_missing(tmp_path, hidden):
    path = tmp_path / "head.safetensors"
    save_file({"classifier.weight": torch.ones(3, 8), "other": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"head\.safetensors: no tensor \['classifier\.bias'\]") as error:
        LinearHead(str(path)).build(encoder(hidden, RIGHT))
    assert "'other'" in str(error.value)
    with pytest.raises(ValueError, match=r"\['a', 'b'\]"):
        LinearHead(str(path), weight="b", bias="a").build(encoder(hidden, RIGHT))
    assert LinearHead(str(path), bias=None).build(encoder(hidden, RIGHT)).bias is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_head_works_in_the_dtype_of_the_model(hidden, generator, dtype):
    head = Classifier(
        torch.randn(3, 8, generator=generator), torch.randn(3, generator=generator), "mean", False
    )
    logits = head(hidden.to(dtype), RIGHT)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), head(hidden, RIGHT), rtol=3e-2, atol=3e-2)


def test_to_moves_weight_and_bias(hidden):
    head = Classifier(hidden[0, :3], hidden[0, 0, :3], "first", normalise=True)
    moved = head.to(torch.device("meta"))
    assert (moved.weight.device.type, moved.bias.device.type) == ("meta", "meta")
    assert (moved.pooling, moved.normalise) == ("first", True)
    assert head.weight.device.type == "cpu"
    assert head._replace(bias=None).to(torch.device("meta")).bias is None


@pytest.mark.parametrize("labels", [[], ["good"], ["good", "good"], ["good", " "]])
def test_labels_that_are_no_classes(labels):
    with pytest.raises(ValueError, match=r"LabelHead\.labels: "):
        LabelHead(labels).identity()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"classifier.weight": (3, 8)}, "no tensor"),
        ({"classifier.weight": (3, 8), "classifier.bias": (2,)}, "a linear layer has"),
        ({"classifier.weight": (3,), "classifier.bias": (3,)}, "a linear layer has"),
    ],
)
def test_a_file_that_holds_no_linear_layer_is_refused_before_it_is_used(tmp_path, shapes, message):
    path = tmp_path / "head.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    with pytest.raises(ValueError, match=message) as error:
        LinearHead(str(path)).identity()
    assert str(path) in str(error.value)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        LinearHead(str(path)).identity()
