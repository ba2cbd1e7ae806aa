"""One forward pass of a batch, through the task's frozen head or the expert's own class if it has one.

Legend: `B` examples, `T` tokens, `D` hidden size, `V` classes or vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainmerge.data.batch import Batch, Outputs
from trainmerge.data.classifier import Classifier
from trainmerge.data.heads import Head, LabelHead
from trainmerge.model.embedding import Embedding
from trainmerge.model.media_forward import (
    Tokenize,
    as_stored,
    backbone,
    has_two_towers,
    is_media_alone,
    label_classifier,
    one_row,
    states,
    tower,
)
from trainmerge.model.own_head import OwnModel


def forward(
    module: nn.Module,
    batch: Batch,
    classifier: Classifier | OwnModel | None,
    layers: Sequence[int] = (),
    embedding: Embedding | None = None,
) -> Outputs:
    """Class logits [B, V] with a classifier, otherwise the model's own logits [B, T, V].

    With an expert's own class the outputs of that, by their `Kind`. With `embedding` sentence embeddings
    [B, E] instead.

    Includes the hidden states of `layers`, by transformers' index; the decoder's, if the model has one. Those
    of a picture without text are one vector, [B, 1, T * D].
    """
    options = {"output_hidden_states": list(layers)} if layers else {}  # transformers stores only these
    if embedding is not None:
        output = backbone(module)(**batch.inputs, **options)
        state, mask = output.last_hidden_state, batch.inputs["attention_mask"].bool()
        rows = embedding(module, state, mask)
        return Outputs(state.new_empty(0), _chosen(output, layers), embedding=rows)
    if is_media_alone(batch.inputs) and "labels" not in batch.inputs:
        return _of_media(module, batch, classifier, layers, options)
    if isinstance(classifier, OwnModel):
        output = classifier.module(**classifier.inputs(batch), **options)
        return Outputs(_own_logits(classifier, batch, output), _chosen(output, layers), classifier.kind)
    if classifier is None:
        output = module(**_model_inputs(module, batch.inputs), **options)
        return Outputs(_logits(output), _chosen(output, layers))
    output = backbone(module)(**batch.inputs, **options)
    mask = batch.inputs["attention_mask"].bool()
    hidden = output.last_hidden_state.to(classifier.weight.dtype)
    return Outputs(classifier(hidden, mask), _chosen(output, layers))


def _of_media(
    module: nn.Module,
    batch: Batch,
    classifier: Classifier | OwnModel | None,
    layers: Sequence[int],
    options: Mapping[str, Any],
) -> Outputs:
    """The outputs of pictures or sounds alone."""
    if isinstance(classifier, Classifier):
        output = tower(module, batch.inputs, options)
        hidden = states(output, classifier).to(classifier.weight.dtype)
        logits = classifier(hidden, torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device))
    else:
        own = module if classifier is None else classifier.module
        output = own(**as_stored(module, batch.inputs), **options)
        logits = _logits(output) if classifier is None else _own_logits(classifier, batch, output)
    found = getattr(output, "hidden_states", None)
    chosen = {layer: found[layer] for layer in layers} if found is not None else {}
    of = classifier.kind if isinstance(classifier, OwnModel) else None
    return Outputs(logits, one_row(chosen, len(batch.mask)), of)


def _logits(output: Any) -> Tensor:
    """The model's own logits; [0] of a model without an output layer."""
    logits: Tensor | None = getattr(output, "logits", None)
    return torch.empty(0) if logits is None else logits


def _own_logits(own: OwnModel, batch: Batch, output: Any) -> Tensor:
    """The outputs of an expert's class, in the form of their `Kind`."""
    if own.kind == "spans":  # padding is no position of an answer
        both = torch.stack([output.start_logits, output.end_logits], dim=1)
        absent = ~batch.inputs["attention_mask"].bool()
        return both.masked_fill(absent[:, None], torch.finfo(both.dtype).min)
    logits: Tensor = output.logits
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1) if own.kind == "labels" else logits


def _model_inputs(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's inputs: a decoder gets the labels shifted by one, so transformers computes no loss.

    Classifiers with a decoder make its inputs themselves, from the text.
    """
    given = dict(inputs)
    labels = given.pop("labels", None)
    if labels is not None and module.can_generate():  # type: ignore[operator]
        own: Any = getattr(module, "prepare_decoder_input_ids_from_labels", None)
        given["decoder_input_ids"] = shifted(labels, module.config) if own is None else own(labels)
    return given


def shifted(labels: Tensor, config: Any) -> Tensor:
    """A decoder's inputs [B, T]: its start token, then the labels [B, T] without their last.

    M2M-100, Whisper and others have no method of their own for it.

    Raises:
        ValueError: config.json names no start token.
    """
    start = config.decoder_start_token_id
    if start is None:
        raise ValueError("the base's config.json names no decoder_start_token_id: set it")
    return torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)


def _chosen(output: Any, layers: Sequence[int]) -> dict[int, Tensor]:
    """The hidden states [B, T, D] of these layers; none if the model gives none.

    Raises:
        ValueError: they have another form, as Gemma 3n's four streams [4, B, T, D], or are not computed, as
            those of Mllama's cross-attention without pictures.
    """
    states = getattr(output, "decoder_hidden_states", None) or getattr(output, "hidden_states", None)
    found = {layer: states[layer] for layer in layers} if states is not None else {}
    for layer, state in found.items():
        if state is None or state.dim() != 3:
            form = "not computed for these examples" if state is None else f"{tuple(state.shape)}"
            raise ValueError(
                f"the hidden states of layer {layer} are {form}, not one vector per token: "
                "align the logits only (hidden: 0)"
            )
    return found


@torch.no_grad()
def build_classifier(head: Head | None, module: nn.Module, tokenize: Tokenize) -> Classifier | None:
    """A task's classifier; `module` must have the base's weights, which embed label texts."""
    if head is None:
        return None
    if isinstance(head, LabelHead) and has_two_towers(module):
        return label_classifier(head, module, tokenize).to(next(module.parameters()).device)
    device = next(module.parameters()).device

    def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        inputs = {name: tensor.to(device) for name, tensor in tokenize(texts).items()}
        return backbone(module)(**inputs).last_hidden_state, inputs["attention_mask"].bool()

    return head.build(encode).to(device)
