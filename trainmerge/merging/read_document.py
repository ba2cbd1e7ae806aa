"""mergekit's YAML -> a document."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainmerge.merging.document import Document, near, stacking
from trainmerge.merging.methods import STACKING
from trainmerge.merging.tokenizer import read_tokenizer
from trainmerge.run.config import read_yaml
from trainmerge.system.json_file import read_bytes

KEYS: Sequence[str] = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template",
)  # fmt: skip
REFUSED = {
    "modules": "merge each module's folder by a file of its own",
    "input_model_parameters": "write them under each model's `parameters`",
}


def read_document(path: Path) -> Document:
    """Read a mergekit file.

    Raises:
        ValueError: lists everything that is wrong with it.
    """
    check_single(path)
    content = read_yaml(path)
    try:
        return parse_document(content)
    except ValueError as error:
        lines = "\n".join(f"  {line}" for line in str(error).splitlines())
        raise ValueError(f"{path}: not a merge that can be done:\n{lines}") from error


def check_single(path: Path) -> None:
    """Raise ValueError for a file with several documents, as mergekit-multi reads."""
    try:
        events = yaml.parse(read_bytes(path, "Check the path.").decode("utf-8", "replace"))
        count = sum(isinstance(event, yaml.DocumentStartEvent) for event in events)
    except yaml.YAMLError:
        return  # `read_yaml` says what is wrong
    if count > 1:
        raise ValueError(
            f"{path}: several documents in one file, as mergekit-multi reads, are not supported: write each "
            "into a file of its own; a later one names the folder of an earlier merge"
        )


def parse_document(content: Any) -> Document:
    """A document from plain data.

    Raises:
        ValueError: as `read_document`.
    """
    if not isinstance(content, Mapping) or "merge_method" not in content:
        raise ValueError("a mergekit file is a mapping with the key `merge_method`")
    method = content["merge_method"]
    problems = [*([stacking(method)] if method in STACKING else []), *_unknown(content, KEYS)]
    sources, shared, layers = _sources(content, problems)
    models: dict[str, Mapping[str, Any]] = {}
    for source in sources:
        name, own = source.get("model"), source.get("parameters") or {}
        if not isinstance(name, str) or not isinstance(own, Mapping):
            problems.append(f"models: {source!r} is not a `model` with `parameters`")
        elif name in models:
            problems.append(f"models: {name} is listed twice; add up its weights")
        else:
            problems += [*_unknown(source, ("model", "parameters", "layer_range"), f"models.{name}: ")]
            models[name] = own
    texts = {key: content.get(key) for key in ("base_model", "dtype", "out_dtype")}
    problems += [
        f"{key} is {v!r}, not a text" for key, v in texts.items() if v is not None and not isinstance(v, str)
    ]
    tokenizer = read_tokenizer(content, problems)
    if problems:
        raise ValueError("\n".join(problems))
    return Document(
        str(method), models, texts["base_model"], shared, texts["dtype"], texts["out_dtype"],
        tokenizer, layers,
    )  # fmt: skip


def _sources(
    content: Mapping[str, Any], problems: list[str]
) -> tuple[Sequence[Any], Mapping[str, Any], int | None]:
    """The models, and the settings of all; one slice over the whole depth is the same as `models`."""
    shared = content.get("parameters") or {}
    if not isinstance(shared, Mapping):
        problems.append(f"parameters is {shared!r}, not a mapping")
        shared = {}
    if "slices" not in content:
        found = content.get("models")
        if not isinstance(found, list) or not found or not all(isinstance(one, Mapping) for one in found):
            problems.append("models must be a list of entries `- model: FOLDER`")
            return [], shared, None
        return found, shared, None
    slices = content["slices"]
    whole = isinstance(slices, list) and len(slices) == 1 and isinstance(slices[0], Mapping)
    sources = slices[0].get("sources") if whole else None
    if (
        "models" in content
        or not isinstance(sources, list)
        or not all(isinstance(s, Mapping) for s in sources)
    ):
        problems.append(
            f"slices: stacking layers is not supported{_count(slices)}; one slice over all layers, or "
            "`models`, is"
        )
        return [], shared, None
    ranges = [source.get("layer_range") for source in sources]
    if not ranges or any(one != ranges[0] or not _from_zero(one) for one in ranges):
        problems.append("slices: every source must have all layers; parts of the depth are not supported")
        return [], shared, None
    own = slices[0].get("parameters") or {}
    return sources, {**shared, **(own if isinstance(own, Mapping) else {})}, ranges[0][1]


def _count(slices: Any) -> str:
    return f", and there are {len(slices)} slices" if isinstance(slices, list) and len(slices) > 1 else ""


def _from_zero(layers: Any) -> bool:
    return isinstance(layers, list) and len(layers) == 2 and layers[0] == 0 and type(layers[1]) is int


def _unknown(given: Mapping[str, Any], known: Sequence[str], where: str = "") -> Iterator[str]:
    for key in given:
        if key in REFUSED:
            yield f"{where}{key} is not supported: {REFUSED[key]}"
        elif key not in known:
            yield f"{where}no key {key!r}{near(str(key), known)}"
