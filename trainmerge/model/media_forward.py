"""Forward passes of pictures and sounds without text, and the label texts' embeddings under CLIP.

Legend: `B` examples, `T` positions, `C` channels, `H` and `W` their rows and columns, `D` hidden size,
`V` classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES

from trainmerge.data.classifier import Classifier
from trainmerge.data.heads import TEXT_SCALE, LabelHead

Tokenize = Callable[[Sequence[str]], Mapping[str, Tensor]]  # texts -> input_ids, attention_mask, ... [B, T]
TWO_TOWERS = frozenset(MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES.values())  # CLIPModel, ...


def has_two_towers(module: nn.Module) -> bool:
    """Whether the model embeds pictures and texts in one space, as CLIP and SigLIP do."""
    return type(module).__name__ in TWO_TOWERS


def is_media_alone(inputs: Mapping[str, Tensor]) -> bool:
    """Whether a model's inputs are a picture or a sound alone."""
    return "input_ids" not in inputs


def backbone(module: nn.Module) -> nn.Module:
    """The model below its head."""
    below: nn.Module = getattr(module, "base_model", module)
    return below


def as_stored(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, with pixels and samples in the dtype of the model's weights."""
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def tower(module: nn.Module, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> Any:
    """The output of the model below its head; of CLIP, of its vision tower and projection."""
    given: Any = module
    if has_two_towers(module):
        return given.get_image_features(**as_stored(module, inputs), **options)
    whole = type(module).__name__.endswith("WithProjection")  # whose base_model lacks the projection
    return (module if whole else backbone(module))(**as_stored(module, inputs), **options)


def states(output: Any, classifier: Classifier) -> Tensor:
    """The states [B, T, D] that a classifier pools.

    Raises:
        ValueError: the model gives no pooled vector, or a map of channels, which has no first position.
    """
    if classifier.pooling == "pooled":
        vector = getattr(output, "image_embeds", None)
        vector = getattr(output, "pooler_output", None) if vector is None else vector
        if vector is None:
            raise ValueError("pooling: pooled needs a model with a pooled output: use mean or first")
        return vector[:, None]  # type: ignore[no-any-return]
    hidden: Tensor = output.last_hidden_state
    if hidden.dim() == 4:  # [B, C, H, W]
        if classifier.pooling == "first":
            raise ValueError(
                f"pooling: first needs a first position, and the model gives a map {tuple(hidden.shape)}: "
                "use pooled, or mean"
            )
        hidden = hidden.flatten(2).transpose(1, 2)
    return hidden


def state_numbers(module: nn.Module, inputs: Mapping[str, Tensor], layers: Sequence[int]) -> int:
    """Numbers in these layers' states of one example, T * D each; `module` is on the meta device."""
    if not layers:
        return 0
    one = {name: value[:1].to("meta") for name, value in inputs.items()}
    with torch.no_grad():
        states = tower(module, one, {"output_hidden_states": list(layers)}).hidden_states
    return sum(states[layer].numel() for layer in layers)


def one_row(hidden: Mapping[int, Tensor], examples: int) -> dict[int, Tensor]:
    """Each layer's states [B, ...] as one vector per example, [B, 1, T * D]: all its patches together.

    So transformers' forms, [B, T, D] and [B, C, H, W], need no mask.
    """
    return {layer: state.reshape(examples, 1, -1) for layer, state in hidden.items()}


def label_classifier(head: LabelHead, module: nn.Module, tokenize: Tokenize) -> Classifier:
    """CLIP's zero-shot classifier: logits = scale x cosine (+ SigLIP's bias), frozen.

    Radford et al., CLIP, ICML 2021, figure 3; Zhai et al., SigLIP, ICCV 2023, algorithm 1.

    Raises:
        ValueError: the model has no `logit_scale`, and the head none of its own.
    """
    towers: Any = module
    masked = not towers.config.model_type.startswith("siglip")  # whose texts are padded, unmasked

    def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        inputs = {name: tensor.to(towers.device) for name, tensor in tokenize(texts).items()}
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")[: 1 + masked]}
        embedded: Tensor = towers.get_text_features(**given).pooler_output[:, None]
        return embedded, torch.ones(embedded.shape[:2], dtype=torch.bool, device=towers.device)

    embeddings = head.embeddings(encode).float()
    if head.scale != TEXT_SCALE:
        return Classifier(head.scale * embeddings, None, "pooled", normalise=True)
    scale, bias = (getattr(towers, name, None) for name in ("logit_scale", "logit_bias"))
    if scale is None:
        raise ValueError(f"{type(module).__name__} has no logit_scale: set the head's `scale`")
    offset = None if bias is None else bias.detach().float().expand(len(embeddings))
    return Classifier(scale.detach().float().exp() * embeddings, offset, "pooled", normalise=True)
