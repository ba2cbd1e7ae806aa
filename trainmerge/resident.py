"""From a recipe to the model in memory: the merged model and every task's classifier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainmerge.batch import Batch, Outputs
from trainmerge.checkpoints import load_model
from trainmerge.coefficients import Coefficients
from trainmerge.examples import Example
from trainmerge.forward import Tokenize, build_classifier, forward
from trainmerge.heads import Classifier
from trainmerge.merged_model import MergedModel
from trainmerge.preprocess import Calibrator, apply
from trainmerge.quantise import Quantise, quantised
from trainmerge.recipe import Opened, Recipe
from trainmerge.tokenizer import Tokenizer


@dataclass(frozen=True)
class Resident:
    """The merged model and its tasks' frozen heads. Not an nn.Module: Lightning is to leave it alone."""

    merged: MergedModel
    classifiers: Sequence[Classifier | None]  # K

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.merged.module.parameters()).device

    def __call__(self, batch: Batch, layers: Sequence[int] = ()) -> Outputs:
        """A forward pass of the present weights, through the head of the batch's task."""
        return forward(self.merged.module, batch, self.classifiers[batch.expert], layers)

    def batch(self, expert: int, examples: Sequence[Example], tokenizer: Tokenizer, first: int = 0) -> Batch:
        """These examples on the model's device, numbered from `first`."""
        encoded = tokenizer.encode(examples)
        inputs = {name: tensor.to(self.device) for name, tensor in encoded.inputs.items()}
        ids = torch.arange(first, first + len(examples))
        return Batch(expert, inputs, encoded.mask.to(self.device), ids)


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
    quantise: Quantise | None = None,
) -> Resident:
    """Load the base, build the heads, preprocess the task vectors; no merge is written yet.

    The model holds its parameters in `dtype`, or as they are stored. Buffers stay (positions need float32),
    and so do heads. `examples` identifies the calibration examples and `calibrator` runs the experts on them,
    for preprocessors that ask. `quantise` makes the task vectors smaller; teachers stay the experts.
    """
    loaded = load_model(opened.base, recipe.ignore)
    module = loaded.module.to(device)
    classifiers = [build_classifier(expert.head, module, tokenize) for expert in recipe.experts.values()]
    for parameter in module.parameters() if dtype else ():
        parameter.data = parameter.data.to(dtype)
    merged = MergedModel(module, opened.task_vectors, coefficients, loaded.names)
    resident = Resident(merged, classifiers)
    if recipe.preprocess:
        made = calibrator(resident) if calibrator else None
        merged.task_vectors = apply(
            opened.task_vectors, recipe.preprocess, workspace, opened.identity(), examples, made
        )
    if quantise is not None:
        inputs = repr([opened.identity(), recipe.preprocess, examples])
        merged.task_vectors = quantised(merged.task_vectors, quantise, workspace, inputs)
    return resident
