"""How many tokens a model has positions for.

A table of positions ends: torch would answer one token more with an index error. Computed ones (rotary) do
not, but the model was not trained beyond `max_position_embeddings`. Relative positions (T5) and recurrent
models have no limit.
"""

import sys
from typing import NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel

KEYS = ("max_position_embeddings", "max_encoder_position_embeddings", "max_seq_len")
DECODER = ("max_target_positions", "max_decoder_position_embeddings")
COUNT = "create_position_ids_from_input_ids"
RECURRENT = ("rwkv",)  # its key is the length of its training texts


class Positions(NamedTuple):
    """The most tokens of a text, and of a decoder's target; None without a limit."""

    text: int | None = None
    target: int | None = None


def positions_of(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Positions:
    """The positions of a model of this class and configuration."""
    settings = config.get_text_config()
    if settings.model_type in RECURRENT:
        return Positions()
    text = _first(settings, KEYS)
    if text is not None and _counted_from_padding(kind):
        text -= (settings.pad_token_id or 0) + 1
    if not config.is_encoder_decoder:
        return Positions(text)
    return Positions(text, _first(config, DECODER) or text)


def _first(settings: PreTrainedConfig, keys: tuple[str, ...]) -> int | None:
    found = [getattr(settings, key, None) for key in keys]
    return next((count for count in found if isinstance(count, int) and count > 0), None)  # XLNet has -1


def _counted_from_padding(kind: type[PreTrainedModel]) -> bool:
    """Whether the first token has the position after the padding token's id, as RoBERTa's."""
    own = vars(sys.modules[kind.__module__])
    counting = [one.__name__ for one in own.values() if isinstance(one, type) and COUNT in vars(one)]
    return COUNT in own or any("Sinusoidal" not in name for name in counting)  # those tables grow
