"""A learned merge as mergekit's YAML, where it can say it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainmerge.checkpoints.choice import BASE, UNION
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.merging.tokenizer import TokenizerSettings, TokenSource
from trainmerge.merging.values import parameter_places, value_at
from trainmerge.preprocess import Breadcrumbs, Preprocess, Ties
from trainmerge.run.folder import RunFolder
from trainmerge.run.open_run import open_run
from trainmerge.run.recipe import Recipe
from trainmerge.system.access import check_file_place
from trainmerge.system.atomic import write_whole

Weights = Mapping[str, float]  # parameter -> coefficient


def to_mergekit(run: str | Path, file: str | Path) -> Path:
    """Write a run's merge as a mergekit file: task arithmetic, TIES or Breadcrumbs per parameter.

    A coefficient is written as one number, as a gradient over the layers, or by tensor name, whichever is
    shortest and exact.

    Raises:
        ValueError: says what mergekit's files cannot express.
    """
    check_file_place(file)
    recipe, coefficients, opened = open_run(RunFolder(Path(run)))
    if problems := [*_inexpressible(recipe, coefficients)]:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(f"{run}: a mergekit file cannot express this merge:\n{lines}")
    names = list(opened.base.tensors)
    weights = [_of_expert(coefficients, k, names) for k in range(len(coefficients.experts))]
    dtypes = {info.dtype for info in opened.base.tensors.values() if info.dtype.is_floating_point}
    out = {"out_dtype": str(next(iter(dtypes))).removeprefix("torch.")} if len(dtypes) == 1 else {}
    method, parameters, ties_mean = _method(recipe.preprocess)
    values = [_shortest(own, names) for own in weights]
    if ties_mean:  # the mean of the agreeing, times the common coefficient
        parameters["lambda"], values = values[0], [1.0] * len(values)
    models = [
        {"model": _folder(recipe, name), "parameters": {"weight": value}}
        for name, value in zip(coefficients.experts, values, strict=True)
    ]
    content = {
        "merge_method": method, "base_model": recipe.base, "models": models,
        **({"parameters": parameters} if parameters else {}), "dtype": "float32", **out,
        **_tokenizer(recipe).to_plain(),
    }  # fmt: skip
    write_whole(Path(file), yaml.safe_dump(content, sort_keys=False, width=110))
    return Path(file)


def _inexpressible(recipe: Recipe, coefficients: Coefficients) -> Iterator[str]:
    values = coefficients().detach()
    chunked = [
        name for name in coefficients.layout.groups if len(set(_chunks(coefficients, name, values))) > 1
    ]
    if chunked:
        yield f"rows of one tensor with different coefficients ({chunked[0]}): use one coefficient per tensor"
    if len(recipe.preprocess) > 1:
        yield "several preprocessors in a row"
    for method in recipe.preprocess:
        kind = type(method).__name__
        if not isinstance(method, Ties | Breadcrumbs):
            yield f"{kind} is no method of mergekit, or has other numbers there"
        elif isinstance(method, Ties) and method.scope == "global":
            yield "Ties(scope='global') ranks over all tensors; mergekit ranks within each"
        elif isinstance(method, Ties) and not bool((values == values[0]).all()):
            yield "Ties with different coefficients per expert: mergekit elects signs after weighting"
    if recipe.vocabulary == "shared":
        yield "vocabulary: shared"
    if recipe.align:
        yield "align: mergekit takes the experts' weights as they are"
    if recipe.chat_template is not None or recipe.generation_config is not None:
        yield "chat_template or generation_config of a model"


def _tokenizer(recipe: Recipe) -> TokenizerSettings:
    """The recipe's tokenizer and rows of tokens, with folders in place of names."""
    choice = recipe.choice
    if choice.is_default:
        return TokenizerSettings()
    places = {BASE: recipe.base, UNION: UNION, **{name: _folder(recipe, name) for name in recipe.experts}}
    source = BASE if choice.tokenizer == BASE else places[choice.tokenizer]
    tokens = {
        token: TokenSource(None if row.source is None else places[row.source], row.token, row.force)
        for token, row in choice.tokens
    }
    return TokenizerSettings(source, tokens, choice.pad_to_multiple)


def _chunks(coefficients: Coefficients, name: str, values: Any) -> list[tuple[float, ...]]:
    return [tuple(column) for column in coefficients.of(name, values).T.tolist()]


def _of_expert(coefficients: Coefficients, expert: int, names: Sequence[str]) -> Weights:
    """Each tensor's coefficient; 0 for one that is not merged."""
    values = coefficients().detach()
    groups = coefficients.layout.groups
    return {name: float(values[expert, groups[name][0]]) if name in groups else 0.0 for name in names}


def _shortest(weights: Weights, names: Sequence[str]) -> Any:
    """A number, a gradient, or values by name."""
    located = parameter_places(names)
    numbers = sorted(set(weights.values()))
    if len(numbers) == 1:
        return numbers[0]
    by_depth = {place.depth: weights[name] for name, place in located.items()}
    gradient = [by_depth[depth] for depth in sorted(by_depth)]
    if all(value_at(gradient, place) == weights[name] for name, place in located.items()):
        return gradient
    longest_first = sorted(weights, key=len, reverse=True)  # a filter is a part of a name
    return [{"filter": name, "value": weights[name]} for name in longest_first]


def _method(preprocess: Sequence[Preprocess]) -> tuple[str, dict[str, Any], bool]:
    """mergekit's method, its settings, and whether coefficients are its lambda."""
    match list(preprocess):
        case [Ties(density=density, merge=merge)]:
            return "ties", {"density": density, "normalize": merge == "mean"}, merge == "mean"
        case [Breadcrumbs(density=density, outliers=outliers)]:
            return "breadcrumbs", {"density": density, "gamma": outliers}, False
    return "task_arithmetic", {}, False


def _folder(recipe: Recipe, name: str) -> str:
    path = recipe.experts[name].path
    return f"{recipe.base}+{path}" if (Path(path) / "adapter_config.json").is_file() else path
