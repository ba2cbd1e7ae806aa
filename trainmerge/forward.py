"""One forward pass of a batch, through the task's own frozen head where it has one.

Legend: `B` examples, `T` tokens, `D` hidden size, `V` classes or vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from trainmerge.batch import Batch, Outputs
from trainmerge.heads import Classifier, Head

Tokenize = Callable[[Sequence[str]], Mapping[str, Tensor]]  # texts -> input_ids, attention_mask, ... [B, T]


def forward(module: nn.Module, batch: Batch, classifier: Classifier | None) -> Outputs:
    """Class logits [B, V] under a classifier, the model's own logits otherwise."""
    if classifier is None:
        return Outputs(module(**batch.inputs).logits)
    return Outputs(classifier(hidden_states(module, batch.inputs), batch.mask))


def hidden_states(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The backbone's last hidden state, [B, T, D]."""
    backbone = getattr(module, "base_model", module)  # transformers' name for the model below its head
    states: Tensor = backbone(**inputs).last_hidden_state
    return states


@torch.no_grad()
def build_classifier(head: Head | None, module: nn.Module, tokenize: Tokenize) -> Classifier | None:
    """A task's classifier; `module` must hold the base's weights, which embed label texts."""
    if head is None:
        return None
    device = next(module.parameters()).device

    def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        inputs = {name: tensor.to(device) for name, tensor in tokenize(texts).items()}
        return hidden_states(module, inputs), inputs["attention_mask"].bool()

    return head.build(encode).to(device)
