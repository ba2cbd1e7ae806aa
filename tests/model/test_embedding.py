"""Sentence embeddings by a folder's modules, against sentence-transformers' own definitions in plain steps.

Legend: `B` examples, `T` tokens, `D` hidden size.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.embedders import TANH, D, write_embedder, write_modules
from trainmerge.checkpoints import load_model, open_checkpoint
from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.similarity import embed_texts
from trainmerge.evaluate.task_texts import TaskTexts
from trainmerge.model.embedding import read_embedding
from trainmerge.model.embedding_settings import unfollowed_settings

TEXTS = ["good", "bad red one", "a good red day", "red"]


@torch.no_grad()
def hidden(folder: Path) -> list[Tensor]:
    """The last hidden states [T, D] of each text alone."""
    module = load_model(open_checkpoint(folder)).module
    tokenize = Tokenizer(str(folder), 32)
    return [module(**tokenize([text])).last_hidden_state[0].double() for text in TEXTS]


def embedded(folder: Path) -> Tensor:
    """What the package computes for all texts together, [B, E]."""
    base = open_checkpoint(folder)
    texts = TaskTexts([Example(text) for text in TEXTS], Tokenizer(str(folder), 32))
    return embed_texts(load_model(base).module, read_embedding(base), texts)


def unit(rows: list[Tensor]) -> Tensor:
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def weighted(states: Tensor) -> Tensor:
    weights = torch.arange(1, len(states) + 1, dtype=torch.float64)[:, None]
    return (weights * states).sum(0) / weights.sum()


POOLED = {
    "cls": lambda states: states[0],
    "max": lambda states: states.amax(0),
    "mean": lambda states: states.mean(0),
    "mean_sqrt_len_tokens": lambda states: states.sum(0) / len(states) ** 0.5,
    "weightedmean": weighted,
    "lasttoken": lambda states: states[-1],
}
OLD = {
    "cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "weightedmean": "weightedmean_tokens",
}  # fmt: skip


def with_pooling(folder: Path, config: dict[str, Any]) -> Path:
    write_embedder(folder, 0, ("Transformer", "Pooling"))
    (folder / "1_Pooling/config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", POOLED)
def test_a_pooling_by_either_key(tmp_path: Path, name: str) -> None:
    new = with_pooling(tmp_path / "new", {"embedding_dimension": D, "pooling_mode": name})
    key = f"pooling_mode_{OLD.get(name, name)}"
    old = with_pooling(tmp_path / "old", {"word_embedding_dimension": D, key: True})
    want = unit([POOLED[name](states) for states in hidden(new)])
    for folder in (new, old):
        torch.testing.assert_close(embedded(folder), want, rtol=0, atol=2e-6)


def test_several_poolings_are_concatenated_as_listed(tmp_path: Path) -> None:
    """`pooling_mode` counts before the older keys, which have an order of their own."""
    listed = {"pooling_mode": ["mean", "cls"], "pooling_mode_max_tokens": True}
    new = with_pooling(tmp_path / "new", listed)
    old = with_pooling(tmp_path / "old", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True})
    states = hidden(new)
    mean_first = unit([torch.cat([own.mean(0), own[0]]) for own in states])
    torch.testing.assert_close(embedded(new), mean_first, rtol=0, atol=2e-6)
    cls_first = unit([torch.cat([own[0], own.mean(0)]) for own in states])
    torch.testing.assert_close(embedded(old), cls_first, rtol=0, atol=2e-6)
    for config in ({"pooling_mode": "median"}, {"pooling_mode_mean_tokens": False}):
        with pytest.raises(ValueError, match=r"1_Pooling/config\.json: poolings (median|of no kind); supp"):
            embedded(with_pooling(tmp_path / "bad", config))


def with_dense(folder: Path, **config: Any) -> dict[str, Tensor]:
    kinds = ("Transformer", "Pooling", "Dense")
    write_embedder(folder, 0, kinds)
    generator = torch.Generator().manual_seed(3)
    layer = {
        "linear.weight": torch.randn(D, D, generator=generator) / 4,
        "linear.bias": torch.randn(D, generator=generator),
    }
    save_file(layer, folder / "2_Dense/model.safetensors")
    settings = {"in_features": D, "out_features": D, "bias": True, "activation_function": TANH, **config}
    (folder / "2_Dense/config.json").write_text(json.dumps(settings))
    return layer


def test_a_dense_layer_with_its_input_added(tmp_path: Path) -> None:
    layer = {name: tensor.double() for name, tensor in with_dense(tmp_path, use_residual=True).items()}
    means = [states.mean(0) for states in hidden(tmp_path)]
    want = [(layer["linear.weight"] @ row + layer["linear.bias"]).tanh() + row for row in means]
    torch.testing.assert_close(embedded(tmp_path), unit(want), rtol=0, atol=2e-6)
    plain = tmp_path / "plain"
    with_dense(plain)
    assert (embedded(plain) - unit(want)).abs().max() > 1e-3
    identities = {read_embedding(open_checkpoint(folder)).identity() for folder in (tmp_path, plain)}
    assert len(identities) == 2


def test_a_dense_layer_of_tokens_is_refused(tmp_path: Path) -> None:
    with_dense(tmp_path, module_input_name="token_embeddings")
    with pytest.raises(
        ValueError, match=r"2_Dense/config\.json: reads or writes token_embeddings, sentence_"
    ):
        read_embedding(open_checkpoint(tmp_path))


@pytest.mark.parametrize("kind", ["StaticEmbedding", "CLIPModel", "WordEmbeddings", "LSTM", "CNN", "Router"])
def test_modules_of_other_kinds_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    write_embedder(tmp_path, 0, ("Transformer", "Pooling"))
    write_modules(tmp_path, (kind, "Pooling"))
    with pytest.raises(ValueError, match=rf"modules\.json: modules that are not supported: {kind}"):
        read_embedding(open_checkpoint(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"Its modules\.json lists {kind} in 0_{kind}, Pooling in 1_"
    ):
        open_checkpoint(tmp_path)


def test_prompts_and_other_similarities_are_named(tmp_path: Path) -> None:
    file = tmp_path / "config_sentence_transformers.json"
    assert list(unfollowed_settings(tmp_path)) == []
    file.write_text(json.dumps({"prompts": {"q": "", "d": "d: "}, "default_prompt_name": "q"}))
    assert list(unfollowed_settings(tmp_path)) == []
    file.write_text(
        json.dumps({"prompts": {"d": "d: "}, "default_prompt_name": "d", "similarity_fn_name": "dot"})
    )
    prompt, measure = unfollowed_settings(tmp_path)
    assert "without the default prompt ('d: ')" in prompt
    assert "similarity_fn_name is 'dot', and similarities are cosines here" in measure
