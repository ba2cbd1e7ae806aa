"""A merge as mergekit's YAML describes it: read and checked, all mistakes in one error."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trainmerge.merging.methods import KNOWN, METHODS, STACKING, Method, kind_of
from trainmerge.merging.values import fault
from trainmerge.run.config import read_yaml

KEYS: Sequence[str] = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer",
)  # fmt: skip
REFUSED = {
    "modules": "merge each module's folder by a file of its own",
    "chat_template": "write the template into the merged folder's chat_template.jinja",
    "input_model_parameters": "write them under each model's `parameters`",
    "tokens": "a tokenizer's tokens cannot be chosen one by one",
}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Document:
    """A merge of models by a method.

    Args:
        method: Its name in `METHODS`.
        models: Folder -> settings of this model alone.
        base: The base model's folder.
        parameters: Settings for all models.
        dtype: The dtype of the result; mergekit computes in it too.
        out_dtype: The same, and counts before `dtype`.
        tokenizer: The folder whose tokenizer the result has; None is the base model's, or the first's.
    """

    method: str
    models: Mapping[str, Mapping[str, Any]]
    base: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if problems := [*self._problems()]:
            raise ValueError("\n".join(problems))

    @property
    def definition(self) -> Method:
        """The method."""
        return METHODS[self.method]

    @property
    def merged(self) -> list[str]:
        """The folders that are merged, in order: without the base model, unless the method merges it."""
        others = [name for name in self.models if name != self.base]
        first = [self.base] if self.base and self.definition.with_base else []
        if self.definition.base == "merged":
            return [self.base, *others] if self.base and self.base not in self.models else [*self.models]
        return [*first, *others]

    @property
    def based(self) -> bool:
        """Whether the merge is of differences from the base model."""
        method = self.definition
        return self.base is not None and method.base != "merged" and not method.with_base

    @property
    def unused(self) -> list[str]:
        """Settings that the method does not have, and `int8_mask`: they have no effect."""
        own = {*self.definition.shared, *self.definition.each} - {"int8_mask"}
        if self.method == "task_arithmetic":
            own -= {"density", "rescale"}
        given = {key for parameters in (self.parameters, *self.models.values()) for key in parameters}
        return sorted(given - own)

    def _problems(self) -> Iterator[str]:
        if self.method in STACKING:
            yield f"merge_method: {self.method} stacks layers, which is not supported; use mergekit for it"
            return
        if self.method not in METHODS:
            yield f"merge_method: no method {self.method!r}{_near(str(self.method), METHODS)}"
            return
        method = self.definition
        if method.base == "required" and self.base is None:
            yield f"merge_method {self.method} needs base_model, the model that the others are compared with"
        count = len(self.merged)
        if count < method.least or (method.most is not None and count > method.most):
            wanted = f"{method.least}" if method.least == method.most else f"{method.least} or more"
            what = (
                "models, the base model among them" if method.with_base else "models besides the base model"
            )
            yield f"merge_method {self.method} merges {wanted} {what}; the file has {count}"
        yield from self._mistaken()
        for key, value in (("dtype", self.dtype), ("out_dtype", self.out_dtype)):
            if value is not None and value not in DTYPES:
                yield f"{key} is {value!r}; it is one of {', '.join(DTYPES)}"
        if self.tokenizer == "union":
            yield "tokenizer_source: union is not supported; name `base`, or a model's folder"

    def _mistaken(self) -> Iterator[str]:
        """Wrong settings."""
        method = self.definition
        for where, given in (
            ("parameters", self.parameters),
            *((f"models.{n}", p) for n, p in self.models.items()),
        ):
            for key, value in given.items():
                if key not in KNOWN:
                    yield f"{where}: no setting {key!r}{_near(str(key), KNOWN)}"
                elif wrong := fault(value, kind_of(key)):
                    yield f"{where}: {key} {wrong}"
                elif (
                    where != "parameters"
                    and key in method.shared
                    and key not in method.each
                    and key != "int8_mask"
                ):
                    yield f"{where}: {key} is a setting of all models; move it to `parameters`"
        for key, default in method.shared.items():
            if default is None and key not in self.parameters:
                yield f"parameters: {self.method} needs {key!r}"
        for key, default in method.each.items():
            if default is None and key not in self.parameters:
                for name in self.merged:
                    if key not in self.models.get(name, {}):
                        yield f"models.{name}: {self.method} needs {key!r}"


def read_document(path: Path) -> Document:
    """Read a mergekit file.

    Raises:
        ValueError: lists everything that is wrong with it.
    """
    content = read_yaml(path)
    try:
        return parse_document(content)
    except ValueError as error:
        lines = "\n".join(f"  {line}" for line in str(error).splitlines())
        raise ValueError(f"{path}: not a merge that can be done:\n{lines}") from error


def parse_document(content: Any) -> Document:
    """A document from plain data.

    Raises:
        ValueError: as `read_document`.
    """
    if not isinstance(content, Mapping) or "merge_method" not in content:
        raise ValueError("a mergekit file is a mapping with the key `merge_method`")
    problems = [*_unknown(content, KEYS)]
    sources, shared = _sources(content, problems)
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
    if problems:
        raise ValueError("\n".join(problems))
    base = texts["base_model"]
    tokenizer = _tokenizer(content)
    return Document(
        str(content["merge_method"]), models, base, shared, texts["dtype"], texts["out_dtype"],
        None if tokenizer == "base" else tokenizer,
    )  # fmt: skip


def _sources(content: Mapping[str, Any], problems: list[str]) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The models, and the settings of all; one slice over the whole depth is the same as `models`."""
    shared = content.get("parameters") or {}
    if not isinstance(shared, Mapping):
        problems.append(f"parameters is {shared!r}, not a mapping")
        shared = {}
    if "slices" not in content:
        found = content.get("models")
        if not isinstance(found, list) or not found or not all(isinstance(one, Mapping) for one in found):
            problems.append("models must be a list of entries `- model: FOLDER`")
            return [], shared
        return found, shared
    slices = content["slices"]
    whole = isinstance(slices, list) and len(slices) == 1 and isinstance(slices[0], Mapping)
    sources = slices[0].get("sources") if whole else None
    if (
        "models" in content
        or not isinstance(sources, list)
        or not all(isinstance(s, Mapping) for s in sources)
    ):
        problems.append(
            "slices: stacking layers is not supported; one slice over all layers, or `models`, is"
        )
        return [], shared
    ranges = {str(source.get("layer_range")) for source in sources}
    if len(ranges) > 1 or not _from_zero(sources[0].get("layer_range") if sources else None):
        problems.append("slices: every source must have all layers; parts of the depth are not supported")
    own = slices[0].get("parameters") or {}
    return sources, {**shared, **(own if isinstance(own, Mapping) else {})}


def _from_zero(layers: Any) -> bool:
    return isinstance(layers, list) and len(layers) == 2 and layers[0] == 0


def last_layer(content: Any) -> int | None:
    """The number of layers that a file with one slice names; None without slices."""
    slices = content.get("slices") if isinstance(content, Mapping) else None
    return int(slices[0]["sources"][0]["layer_range"][1]) if slices else None


def _tokenizer(content: Mapping[str, Any]) -> str | None:
    new = content.get("tokenizer")
    if new is None:
        return content.get("tokenizer_source")
    if not isinstance(new, Mapping) or new.keys() - {"source"}:
        raise ValueError("tokenizer: only its key `source` is supported")
    source: str | None = new.get("source")
    return source


def _unknown(given: Mapping[str, Any], known: Sequence[str], where: str = "") -> Iterator[str]:
    for key in given:
        if key in REFUSED:
            yield f"{where}{key} is not supported: {REFUSED[key]}"
        elif key not in known:
            yield f"{where}no key {key!r}{_near(str(key), known)}"


def _near(word: str, known: "Mapping[str, Any] | Sequence[str]") -> str:
    found = get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else f"; there are {', '.join(known)}"
