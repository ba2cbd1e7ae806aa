"""What a checkpoint's model puts out, decided by its class: this decides the measure of `evaluate`."""

from collections.abc import Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal, NamedTuple

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from trainmerge.checkpoints.meta_model import architecture_of
from trainmerge.checkpoints.model_config import read_model_config
from trainmerge.checkpoints.positions import Positions, positions_of

Kind = Literal[
    "causal language model",
    "masked language model",
    "bidirectional language model",
    "sequence-to-sequence model",
    "classifier",
    "token classifier",
    "question-answering model",
    "model without an output layer",
    "model with another output",
]

DEPTHS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers", "num_stages")  # keys of config.json


def _classes(names: Mapping[str, Any]) -> frozenset[str]:
    """The class names in one of transformers' own lists; a value is one name or several."""
    values = [[value] if isinstance(value, str) else value for value in names.values()]
    return frozenset(name for value in values for name in value)


CAUSAL = _classes(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MASKED = _classes(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
TARGETS = _classes(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
TARGETS |= _classes(auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES)
PICTURES = _classes(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
TWO_TOWERS = _classes(auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES)
ONE_ROW: dict[str, Kind] = {  # endings that transformers uses for nothing else
    "ForSequenceClassification": "classifier",
    "ForImageClassification": "classifier",
    "ForImageClassificationWithTeacher": "classifier",  # the mean of two heads' logits
    "ForAudioClassification": "classifier",
    "ForTokenClassification": "token classifier",
    "ForQuestionAnswering": "question-answering model",
}

UNCOMPARED = {  # ending of a class -> why its outputs are compared by no objective and scored by no measure
    "ForCTC": "labels frames, whose number only its own convolutions know, so padding cannot be left out",
    "ForObjectDetection": "gives boxes without an order: those of two models have to be matched first",
    "ForSemanticSegmentation": "gives a map of classes, not one row per example or token",
    "ForUniversalSegmentation": "gives masks without an order: those of two models have to be matched first",
    "ForMultipleChoice": "reads several texts per example, one per choice",
    "ForPreTraining": "has two outputs: save base and experts as ...ForMaskedLM",
}
HEADS_ONLY = "is compared under experts' own heads: set `head: own` for each of them"

VARIABLE = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)  # *args and **kwargs

ENDS = (
    "classifies by the last position, which is padding for all but the longest text of a batch: it is not "
    "supported. Train with summary_type `first`"
)


class Output(NamedTuple):
    """A model's class, and the kind of its output.

    Args:
        architecture: The name of its transformers class.
        kind: What it puts out.
        labels: The number of classes of a classifier of its own.
        problem: That classifier's `problem_type` in config.json, if it has one.
        hidden: The hidden size, if config.json names it.
        layers: The decoder's layers, or the encoder's without one, if config.json names their number.
        reads: `tokens`, `media` (pictures or sounds alone) or `both` (CLIP's towers).
        embedding: The size of its pooled output, if config.json names it.
        needs: Inputs besides `input_ids` that its forward has no default for: BLIP-2's pictures.
        ends: Whether it classifies by the last position, which is padding in a batch (XLNet).
        positions: How many tokens it has positions for.
    """

    architecture: str
    kind: Kind
    labels: int | None = None
    problem: str | None = None
    hidden: int | None = None
    layers: int | None = None
    reads: Literal["tokens", "media", "both"] = "tokens"
    embedding: int | None = None
    ends: bool = False
    needs: tuple[str, ...] = ()
    positions: Positions = Positions()

    @property
    def uncompared(self) -> str:
        """Why no objective compares its outputs; empty if one does."""
        if self.kind == "question-answering model":
            return HEADS_ONLY
        if self.kind != "model with another output":
            return ""
        endings = (why for ending, why in UNCOMPARED.items() if self.architecture.endswith(ending))
        return next(endings, "has outputs that no objective compares")

    @property
    def choices(self) -> bool:
        """Whether an example of it is several texts, which no data here are."""
        return self.architecture.endswith("ForMultipleChoice")

    @property
    def logits(self) -> bool:
        """Whether it has an output layer of its own."""
        return self.kind != "model without an output layer"

    @property
    def classes(self) -> bool:
        """Whether its logits are one row per example, [B, V], not one per token."""
        return self.kind == "classifier"


def output_of(path: Path) -> Output:
    """The kind of a checkpoint's output, from config.json alone. Raises as `build_meta_model`."""
    config = read_model_config(path)
    return output_of_class(architecture_of(config), config)


def output_of_class(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Output:
    """The kind of output of a model of this class and configuration."""
    found, text = _kind(kind, config), config.get_text_config()
    towers = kind.__name__ in TWO_TOWERS
    if towers:  # examples are pictures, and the texts are their labels
        text = getattr(config, "vision_config", text)
    hidden = getattr(text, "hidden_size", None)
    inputs = signature(kind.forward).parameters
    required = [n for n, one in inputs.items() if one.default is one.empty and one.kind not in VARIABLE]
    projected = towers or kind.__name__.endswith("WithProjection")
    return Output(
        kind.__name__,
        found,
        labels=config.num_labels if found == "classifier" else None,
        problem=config.problem_type if found == "classifier" else None,
        hidden=hidden,
        layers=next((n for name in DEPTHS if (n := getattr(text, name, None)) is not None), None),
        reads="both" if towers else "tokens" if "input_ids" in inputs else "media",
        embedding=getattr(config, "projection_dim", hidden) if projected else hidden,
        ends="sequence_summary" in names_in_forward(kind) and getattr(config, "summary_type", "") == "last",
        needs=tuple(name for name in required if name not in ("self", "input_ids")),
        positions=positions_of(kind, config),
    )


def names_in_forward(kind: type[PreTrainedModel]) -> tuple[str, ...]:
    """The attributes that a class's forward names itself."""
    code: Any = kind.forward
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__
    return tuple(code.__code__.co_names)


def _kind(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Kind:
    name = kind.__name__
    headless: Any = transformers.MODEL_MAPPING.get(type(config), None)
    if kind is headless or name.endswith(("EncoderModel", "WithProjection")):
        return "model without an output layer"
    if own := next((task for ending, task in ONE_ROW.items() if name.endswith(ending)), None):
        return own
    if config.is_encoder_decoder:
        return "sequence-to-sequence model" if name in TARGETS else "model with another output"
    if name in MASKED or name.endswith("ForMaskedLM"):
        return "masked language model"
    if name in CAUSAL | TARGETS | PICTURES or name.endswith(("ForCausalLM", "ForConditionalGeneration")):
        return "causal language model" if _sees_the_past_only(config) else "bidirectional language model"
    return "model with another output"


def _sees_the_past_only(config: PreTrainedConfig) -> bool:
    """False for a next-token head over an encoder: BERT's, unless config.json makes it a decoder."""
    is_encoder = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return not is_encoder or bool(getattr(config, "is_decoder", False))
