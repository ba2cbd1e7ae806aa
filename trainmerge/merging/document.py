"""A merge as mergekit's YAML describes it, with all mistakes in one error."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from trainmerge.merging.methods import KNOWN, METHODS, STACKING, Method, setting_type
from trainmerge.merging.tokenizer import TokenizerSettings
from trainmerge.merging.values import setting_fault

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
        tokenizer: Whose tokenizer and chat template the result has.
        layers: The number of layers that the file names, in a slice over all of them; None without.
        vocabulary: `shared` merges the common rows of embeddings, by their number; as in a recipe.
    """

    method: str
    models: Mapping[str, Mapping[str, Any]]
    base: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: TokenizerSettings = TokenizerSettings()  # noqa: RUF009 - frozen
    layers: int | None = None
    vocabulary: Literal["same", "shared"] = "same"

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
            yield stacking(self.method)
            return
        if self.method not in METHODS:
            yield f"merge_method: no method {self.method!r}{near(str(self.method), METHODS)}"
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
        yield from self.tokenizer.problems(self.models, self.base)
        if self.vocabulary == "shared" and self.tokenizer.chooses_rows:
            yield "vocabulary is shared, which matches rows by their number: leave it out, or `tokenizer`"
        for key, value in (("dtype", self.dtype), ("out_dtype", self.out_dtype)):
            if value is not None and value not in DTYPES:
                yield f"{key} is {value!r}; it is one of {', '.join(DTYPES)}"

    def _mistaken(self) -> Iterator[str]:
        """Wrong settings."""
        method = self.definition
        for where, given in (
            ("parameters", self.parameters),
            *((f"models.{n}", p) for n, p in self.models.items()),
        ):
            for key, value in given.items():
                if key not in KNOWN:
                    yield f"{where}: no setting {key!r}{near(str(key), KNOWN)}"
                elif wrong := setting_fault(value, setting_type(key)):
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


def stacking(method: str) -> str:
    """Why a method of layer stacking is refused."""
    return (
        f"merge_method: {method} is not supported: it copies tensors as they are, most often layers of "
        "several models into a deeper one, and merges nothing; use mergekit for it"
    )


def near(word: str, known: "Mapping[str, Any] | Sequence[str]") -> str:
    """A hint: the nearest known word, or all of them."""
    found = get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else f"; there are {', '.join(known)}"
