"""Which keys of config.json change a model's function, its decoding, or nothing in a merge."""

import inspect
import re
import sys
from functools import cache
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from trainmerge.checkpoints.config_values import flat_values
from trainmerge.task_vectors.parameter_names import matches

SILENT = (
    # where a checkpoint is from, and how it is stored
    "transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "auto_map",
    "_commit_hash", "*attn_implementation*", "*experts_implementation*", "tokenizer_class", "model_type",
    "quantization_config", "finetuning_task", "pruned_heads", "unsloth*",
    "pretraining_tp", "chunk_size_feed_forward",
    "sinusoidal_pos_embds",  # DistilBERT's positions are in the file
    "is_composition", "slow_but_exact", "deterministic_*", "reorder_and_upcast_attn", "median_filter_width",
    # training
    "*drop*", "initializer_*", "*_initializer_range", "init_std", "init_device", "*_init_value",
    "sparse_pred*", "*aux_loss*", "*z_loss*", "*jitter*",
    "mask_time_*", "mask_feature_*", "apply_spec_augment", "gradient_checkpointing", "problem_type",
    "*loss_reduction", "ctc_zero_infinity", "label_smoothing",
    # what a call returns
    "use_cache", "return_dict", "use_return_dict", "output_*", "torchscript",
    # compared as shapes, as ties, or as layer_types
    "vocab_size", "intermediate_size", "n_inner", "tie_word_embeddings", "use_sliding_window",
    "max_window_layers", "sliding_window_pattern", "num_labels",
)  # fmt: skip
DECODING = (
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "forced_*_token_id", "task_specific_params", "suppress_tokens", "begin_suppress_tokens", "max_length",
    "min_length", "num_beams", "no_repeat_ngram_size", "length_penalty", "early_stopping", "prefix",
)  # fmt: skip
LABELS = ("id2label", "label2id")
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")  # learnt positions are compared as shapes
FREE_OF_LENGTH = ("default", "linear", "llama3", "proportional")  # rotary embeddings that ignore the length


def decides_function(base: PreTrainedModel, key: str) -> bool:
    """Whether another value of a key makes these weights another function.

    It does if the model's own code reads the key.
    """
    words = _words(base)
    if is_one_of(key, ("pad_token_id",)):  # RoBERTa's positions count from it
        return "create_position_ids_from_input_ids" in words
    if is_one_of(key, (*DECODING, *LABELS)):
        return False
    if is_one_of(key, LENGTHS):
        values = flat_values(base.config)
        kinds = {value for name, value in values.items() if name.endswith("rope_type")}
        return not kinds <= set(FREE_OF_LENGTH)
    return "rope_parameters" in key.split(".") or _names_of(base.config, key) & words != set()


def is_known(base: PreTrainedModel, expert: PreTrainedConfig, key: str) -> bool:
    """Whether a key that does not change the function says something about this model."""
    if is_one_of(key, LABELS):
        names = type(base).__name__, *(expert.architectures or [])
        return all("Classification" in name for name in names)
    return is_one_of(key, (*DECODING, *LENGTHS)) or hasattr(base.config, key.rpartition(".")[2])


def _names_of(config: PreTrainedConfig, key: str) -> set[str]:
    """The names by which a model's code may read a key: its own, and aliases such as GPT-2's `n_head`."""
    leaf = key.rpartition(".")[2]
    parts = [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]
    return {leaf} | {a for part in parts for a, name in part.attribute_map.items() if name == leaf}


def _words(model: PreTrainedModel) -> set[str]:
    """Every word of the code that computes this model: of its modules' classes, and of plain functions."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    own = {kind for kind in kinds if kind.__module__.startswith("transformers.models.")}
    modules = {sys.modules[kind.__module__] for kind in own}
    functions = [
        found
        for module in modules
        for found in vars(module).values()
        if inspect.isfunction(found) and found.__module__ == module.__name__
    ]
    return set().union(*(_words_of(found) for found in (*own, *functions)))


@cache
def _words_of(code: Any) -> frozenset[str]:
    try:
        return frozenset(re.findall(r"\w+", inspect.getsource(code)))
    except (OSError, TypeError):  # no source there, or a class made while running
        return frozenset()


def is_one_of(key: str, patterns: tuple[str, ...]) -> bool:
    """Whether a key, without the part that it is of, matches one of the fnmatch patterns."""
    return bool(matches(key.rpartition(".")[2], patterns))
