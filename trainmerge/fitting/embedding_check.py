"""Checks of a fit that compares sentence embeddings, before it reads a weight."""

import warnings
from collections.abc import Iterator
from pathlib import Path

from trainmerge.checkpoints import read_modules
from trainmerge.data.calibration import Calibration
from trainmerge.fitting.module import MergeModule
from trainmerge.model.embedding import Embedding, embedding_of, read_embedding
from trainmerge.model.embedding_settings import prompts_of, unfollowed_settings
from trainmerge.system.json_file import read_json

REMEDY = "Download or save it again."
SETTINGS = "sentence_bert_config.json"


def embedding_problems(module: MergeModule, data: Calibration) -> list[str]:
    """Why base, experts or data have no comparable sentence embeddings; none if the fit needs none."""
    pooling = module.objective.asks.embedding
    if pooling is None:
        return []
    base = module.opened.base
    problems = [
        f"{file}: one example has no similarity to another: give two or more"
        for file, examples in zip(data.files.values(), data.examples, strict=True)
        if len(examples) < 2
    ]
    if data.batch_size < 2:
        problems.append("data.batch_size is 1: similarities need two or more examples per step")
    try:
        embedding = read_embedding(base, pooling)
    except (ValueError, FileNotFoundError) as error:
        return [*problems, str(error)]
    if pooling == "modules":
        for name, expert in module.recipe.experts.items():
            problems += _other_modules(name, Path(expert.path), embedding)
        problems += _text_problems(base.path, data)
    if base.config.get("is_encoder_decoder") and "EncoderModel" not in str(base.config.get("architectures")):
        problems.append(
            f"{base.path}: an encoder-decoder, whose last states are the decoder's: save the encoder alone"
        )
    return problems


def _other_modules(name: str, folder: Path, embedding: Embedding) -> Iterator[str]:
    """An expert whose folder embeds in another way than the base's; an adapter's may lack the modules."""
    if not read_modules(folder):
        return
    try:
        own = embedding_of(folder)
    except (ValueError, FileNotFoundError) as error:
        yield f"{name}: {error}"
        return
    if own.identity() != embedding.identity():
        yield (
            f"{name}: {folder / 'modules.json'} embeds in another way than the base: {own.identity()}, not "
            f"{embedding.identity()}. Train it from this base, or leave it out"
        )


def _text_problems(base: Path, data: Calibration) -> Iterator[str]:
    """What sentence-transformers would do to a text and a fit does not."""
    settings = read_json(base / SETTINGS, REMEDY) if (base / SETTINGS).is_file() else {}
    longest = settings.get("max_seq_length")
    if isinstance(longest, int) and longest < data.max_length:
        warnings.warn(
            f"{base / SETTINGS}: texts have {longest} tokens at most, data.max_length is {data.max_length}: "
            f"set it to {longest}, so that texts are embedded as they will be",
            stacklevel=2,
        )
    if settings.get("do_lower_case") is True and data.tokenize(["A"])["input_ids"].tolist() != (
        data.tokenize(["a"])["input_ids"].tolist()
    ):
        yield (
            f"{base / SETTINGS}: do_lower_case is set, and the tokenizer keeps capitals: write the texts in "
            "lower case, and set it to false"
        )
    used = [text for text in prompts_of(base).values() if text]
    if used and _leaves_prompts_out(base):
        yield (
            f"{base}: its pooling leaves out prompts ({used[0]!r}), which is not supported: set "
            "include_prompt to true in the configuration of Pooling, or remove the prompts"
        )
        return
    for line in unfollowed_settings(base):
        warnings.warn(line, stacklevel=2)


def _leaves_prompts_out(base: Path) -> bool:
    files = [base / module.place / "config.json" for module in read_modules(base) if module.kind == "Pooling"]
    return any(read_json(file, REMEDY).get("include_prompt") is False for file in files)
