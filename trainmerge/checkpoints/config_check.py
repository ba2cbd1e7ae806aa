"""Whether an expert's config.json gives its weights the meaning that the base's gives them.

A merge has the base's configuration. So what changes a model's function must be equal in base and experts:
the rotary base, the number of heads, an activation, a multiplier. What changes decoding or the names of
classes is a warning. What matters in training only is not compared.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from trainmerge.checkpoints.choice import TokenizerChoice
from trainmerge.checkpoints.config_keys import LABELS, SILENT, decides_function, is_known, is_one_of
from trainmerge.checkpoints.config_values import flat_values, same_value
from trainmerge.checkpoints.model_config import read_model_config
from trainmerge.system.hub import cached_config
from trainmerge.system.json_file import read_json

ABSENT = "absent"
OF_TOKENS = ("*_token_id", "*_token_index")
OF_HEADS = (*LABELS, "pad_token_id")  # what a head of its own reads from its own configuration
GENERATION = "generation_config.json"
# Keys that change no generated text: what is returned beside it, the cache, padding
SAME_TEXT = ("_", "transformers_", "output_", "return_dict", "use_cache", "pad_token")


def configuration_mismatches(
    base: PreTrainedModel,
    expert: PreTrainedConfig,
    file: Path,
    own_head: bool = False,
    choice: TokenizerChoice = TokenizerChoice(),  # noqa: B008 - frozen
) -> list[str]:
    """One line per key of the expert's configuration, in `file`, that changes the model's function.

    With `own_head`, its labels and its padding token stay its own, so they may differ. Warns of keys that
    change decoding or the names of classes, and of a head of its own with the base's classes in another
    order. Keys that only one version of transformers writes, defaults, and keys that the model's code does
    not read are equal or left out. A `choice` of the tokenizer decides the ids of tokens.
    """
    problems, noted = [], []
    for key, ours, theirs in _differences(base.config, expert):
        if own_head and key == "id2label" and _names(ours) == _names(theirs):
            warnings.warn(
                f"{file}: {key} is {theirs!r}, the base has {ours!r}: the same labels in another order. Each "
                "head keeps its own: the merge has the base's, an export with --task the expert's",
                stacklevel=2,
            )
        what = f"{key} is {theirs!r}, the base has {ours!r}"
        if decides_function(base, key):
            problems.append(
                f"{file}: {what}: the merge has the base's value, under which these weights are "
                f"another model. Leave it out; or, if it was trained with the base's value, set {key} "
                f"to that in {file.name}"
            )
        elif is_known(base, expert, key) and not _settled(key, own_head, choice):
            noted.append(what)
    if noted and not problems:
        warnings.warn(
            f"{file}: {'; '.join(noted)}. The merge has the base's values; edit its config.json if others "
            "are right",
            stacklevel=2,
        )
    return problems


def _names(labels: Any) -> list[str]:
    return sorted(map(str, labels.values())) if isinstance(labels, Mapping) else []


def _settled(key: str, own_head: bool, choice: TokenizerChoice) -> bool:
    """Whether another value of a key is no news: a head has its own, or the choice of a tokenizer decides."""
    return (own_head and is_one_of(key, OF_HEADS)) or (not choice.is_default and is_one_of(key, OF_TOKENS))


def recorded_mismatches(
    base: PreTrainedModel,
    base_folder: Path,
    adapter: Path,
    recorded: object,
    choice: TokenizerChoice = TokenizerChoice(),  # noqa: B008 - frozen
) -> list[str]:
    """`configuration_mismatches` of a config.json in the adapter's folder and of the base that it names.

    `recorded` is its `base_model_name_or_path`; one that is neither a folder on disk nor an id in the hub's
    cache is not compared.
    """
    folders = [adapter]
    place = cached_config(recorded) if isinstance(recorded, str) and recorded else None
    if place is not None and place.absolute() != base_folder.absolute():
        folders.append(place)
    problems = []
    for folder in folders:
        if (folder / "config.json").is_file():
            config, file = read_model_config(folder), folder / "config.json"
            if config.model_type == base.config.model_type:
                problems += configuration_mismatches(base, config, file, choice=choice)
            else:
                problems.append(
                    f"{file}: model_type is {config.model_type!r}, the base has {base.config.model_type!r}: "
                    "the adapter was trained on another base. Leave it out"
                )
    return problems


def warn_of_generation(
    base: Path,
    base_config: PreTrainedConfig,
    expert: Path,
    own: PreTrainedConfig,
    choice: TokenizerChoice = TokenizerChoice(),  # noqa: B008 - frozen
) -> None:
    """Warn if the settings of generation differ: what ends an answer, sampling.

    Raises:
        ValueError: a generation_config.json that transformers cannot parse.
    """
    if choice.generation_config or not any((folder / GENERATION).is_file() for folder in (base, expert)):
        return  # chosen, or config.json has been compared
    ours, theirs = _generation(base, base_config), _generation(expert, own)
    different = [
        f"{key} is {theirs.get(key)!r}, the base has {ours.get(key)!r}"
        for key in sorted(ours.keys() | theirs.keys())
        if not key.startswith(SAME_TEXT) and not same_value(key, ours.get(key), theirs.get(key))
        if not _settled(key, False, choice)
    ]
    if different:
        warnings.warn(
            f"{expert / GENERATION}: {'; '.join(different)}. The merge has the base's {GENERATION}; edit it "
            "after the export if the expert's is right, or set generation_config to the expert's name",
            stacklevel=2,
        )


def _generation(folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
    if not (folder / GENERATION).is_file():
        values: dict[str, Any] = GenerationConfig.from_model_config(config).to_dict()
        return values
    read_json(folder / GENERATION, "Download or save it again, or remove it.")
    try:
        values = GenerationConfig.from_pretrained(folder, local_files_only=True).to_dict()
    except Exception as error:  # whatever a class of transformers makes of foreign settings
        raise ValueError(
            f"{folder / GENERATION}: transformers cannot parse it: {error}. Correct or remove it."
        ) from error
    return values


def _differences(base: PreTrainedConfig, expert: PreTrainedConfig) -> Iterator[tuple[str, Any, Any]]:
    """Key, the base's value and the expert's, of all keys that are compared."""
    ours, theirs = flat_values(base), flat_values(expert)
    for key in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(key, ABSENT), theirs.get(key, ABSENT)
        if not is_one_of(key, SILENT) and not same_value(
            key, *(None if v == ABSENT else v for v in (one, other))
        ):
            yield key, one, other
