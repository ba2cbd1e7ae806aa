"""From a recipe to the model in memory: the merged model and every task's classifier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import torch

from trainmerge.checkpoints import hollow_model, load_model
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.data.batch import Batch, Outputs
from trainmerge.data.examples import Example
from trainmerge.data.heads import Classifier
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.model.forward import Tokenize, build_classifier, forward
from trainmerge.model.fsdp import Root, shard_model
from trainmerge.model.merged_model import MergedModel
from trainmerge.preprocess import Calibrator, Informed, apply
from trainmerge.run.recipe import Opened, Recipe
from trainmerge.system import distributed
from trainmerge.task_vectors.quantise import Quantise, quantised

T = TypeVar("T")


@dataclass(frozen=True)
class Resident:
    """The merged model and its tasks' frozen heads. Not an nn.Module: Lightning is to leave it alone."""

    merged: MergedModel
    classifiers: Sequence[Classifier | None]  # K
    root: Root | None = None  # what passes go through, where processes share the model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.merged.module.parameters()).device

    def __call__(self, batch: Batch, layers: Sequence[int] = ()) -> Outputs:
        """A forward pass of the present weights, through the head of the batch's task."""
        passage = (forward, self.merged.module, batch, self.classifiers[batch.expert], layers)
        return within(self.root, *passage)

    def batch(self, expert: int, examples: Sequence[Example], tokenizer: Tokenizer, first: int = 0) -> Batch:
        """These examples on the model's device, numbered from `first`."""
        encoded = tokenizer.encode(examples)
        inputs = {name: tensor.to(self.device) for name, tensor in encoded.inputs.items()}
        ids = torch.arange(first, first + len(examples))
        return Batch(expert, inputs, encoded.mask.to(self.device), ids)


def within(root: Root | None, function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments), where all processes have the weights that it meets."""
    found: T = function(*arguments) if root is None else root(function, *arguments)
    return found


MakeCalibrator = Callable[[Resident], Calibrator]


def load_resident(
    recipe: Recipe,
    opened: Opened,
    coefficients: Coefficients,
    tokenize: Tokenize,
    workspace: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    examples: str = "",
    calibrator: MakeCalibrator | None = None,
    sharded: bool = False,
    quantise: Quantise | None = None,
) -> Resident:
    """Load the base, build the heads, preprocess the task vectors; no merge is written yet.

    The model holds its parameters in `dtype`, or as they are stored. Buffers stay (positions need float32),
    and so do heads. `examples` identifies the calibration examples and `calibrator` runs the experts on them,
    for preprocessors that ask. `sharded` shares the model among all processes, where there are several.
    `quantise` makes the task vectors smaller; teachers stay the experts.
    """
    first = list(takewhile(lambda method: not isinstance(method, Informed), recipe.preprocess))
    if first:  # in the memory that the model will need; found again below
        with distributed.rank_zero_first():
            apply(opened.task_vectors, first, workspace, opened.identity())
    root = None
    if sharded and distributed.world_size() > 1:
        loaded = hollow_model(opened.base, recipe.ignore)
        root = shard_model(loaded, opened.base, opened.layout.groups, torch.device(device), dtype)
    else:
        loaded = load_model(opened.base, recipe.ignore)
    module = loaded.module.to(device)
    classifiers = [
        within(root, build_classifier, expert.head, module, tokenize) for expert in recipe.experts.values()
    ]
    for parameter in module.parameters() if dtype and root is None else ():
        parameter.data = parameter.data.to(dtype)
    merged = MergedModel(module, opened.task_vectors, coefficients, loaded.names)
    resident = Resident(merged, classifiers, root)
    if recipe.preprocess:
        made = calibrator(resident) if calibrator else None
        with distributed.rank_zero_first():
            merged.task_vectors = apply(
                opened.task_vectors, recipe.preprocess, workspace, opened.identity(), examples, made
            )
    if quantise is not None:
        inputs = repr([opened.identity(), recipe.preprocess, examples])
        with distributed.rank_zero_first():
            merged.task_vectors = quantised(merged.task_vectors, quantise, workspace, inputs)
    return resident
