"""Whether a file's classifier is one matrix on a hidden state: for most of transformers' classes it is not.

BERT's applies its pooler first, RoBERTa's a dense layer and tanh, Llama's reads the last token. `LinearHead`
would then be another function than the expert's, in silence.
"""

from collections.abc import Collection
from pathlib import Path

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from trainmerge.checkpoints.meta_model import build_meta_model, shorten
from trainmerge.checkpoints.output import output_of_class
from trainmerge.system.safetensors_file import MappedFile


def beyond_linear(file: str, head: Collection[str], base: Collection[str]) -> str | None:
    """Why the model in `file` is not its backbone and the tensors `head` alone; None if nothing says so.

    `base` are the names of the base's tensors. Raises as `build_meta_model` if a config.json next to the file
    names a class that cannot be built.
    """
    folder = Path(file).parent
    if (folder / "config.json").is_file():
        module = build_meta_model(folder)
        if output_of_class(type(module), module.config).logits:
            return _of_class(module, head)
    ends = tuple(f".{name}" for name in base)
    names = [name for name in MappedFile(file).tensors if name not in head]
    more = [name for name in names if not f".{name}".endswith(ends)]
    return f"it also has {shorten(more)}" if more else None


def _of_class(module: PreTrainedModel, head: Collection[str]) -> str | None:
    """What the class applies between its backbone's hidden states and its logits."""
    prefix, name = f"{module.base_model_prefix}.", type(module).__name__
    outside = [n for n, _ in module.named_parameters() if not n.startswith(prefix) and n not in head]
    pooler = [n for n, _ in module.named_parameters() if n.startswith(prefix) and ".pooler." in n]
    if more := [*outside, *pooler]:
        return f"{name} also applies {shorten(more)}, so it is more than a linear layer on a hidden state"
    kind = module.config.model_type
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return f"{name} reads the last token's hidden state, which LinearHead does not"
    return None
