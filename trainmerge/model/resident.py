"""A recipe -> the model in memory: the merged model and every task's classifier."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainmerge.checkpoints import LoadedModel, OwnHead, load_meta_model, load_model
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.data.batch import Batch, Outputs
from trainmerge.data.classifier import Classifier
from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.model.embedding import Embedding, read_embedding
from trainmerge.model.forward import build_classifier, forward
from trainmerge.model.fsdp import Root, shard_model
from trainmerge.model.media_forward import Tokenize
from trainmerge.model.merged_model import MergedModel
from trainmerge.model.own_head import OwnModel, attach
from trainmerge.model.residency import Residency
from trainmerge.preprocess import Preprocess, apply
from trainmerge.run.heads import TaskHead, task_heads
from trainmerge.run.merge_buffers import averaged
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.system import distributed
from trainmerge.task_vectors.delta import TaskVectors

T = TypeVar("T")


@dataclass(frozen=True)
class Resident:
    """The merged model and its tasks' frozen heads. Not an nn.Module, to hide it from Lightning."""

    merged: MergedModel
    classifiers: Sequence[Classifier | OwnModel | None]  # K
    root: Root | None = None  # the module to call if the model is sharded
    embedding: Embedding | None = None  # how it embeds, if the objective needs sentence embeddings
    buffers: Mapping[str, str] = field(default_factory=dict)  # tensor of the base's files -> the module's

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.merged.module.parameters()).device

    def __call__(self, batch: Batch, layers: Sequence[int] = ()) -> Outputs:
        """A forward pass with the current weights, through the head of the batch's task."""
        classifier = self.classifiers[batch.expert]
        return within(self.root, forward, self.merged.module, batch, classifier, layers, self.embedding)

    def merging(
        self,
        task_vectors: TaskVectors,
        subspaces: Mapping[str, Tensor] | None = None,
        keep_gradients: bool = False,
        residency: Residency = Residency(),  # noqa: B008 - frozen
    ) -> "Resident":
        """The same model as the merge of other task vectors; replaces this object (`MergedModel`)."""
        merged = self.merged.with_task_vectors(task_vectors, subspaces or {}, keep_gradients, residency)
        return replace(self, merged=merged)

    @torch.no_grad()
    def hold(self, values: Mapping[str, Tensor]) -> None:
        """Write buffers, by the base's tensors, into the module."""
        own = dict(self.merged.module.named_buffers())
        for name, value in values.items():
            own[self.buffers[name]].copy_(value)

    def batch(self, expert: int, examples: Sequence[Example], tokenizer: Tokenizer, first: int = 0) -> Batch:
        """These examples on the model's device, numbered from `first`."""
        encoded = tokenizer.encode(examples)
        inputs = {name: tensor.to(self.device) for name, tensor in encoded.inputs.items()}
        ids = torch.arange(first, first + len(examples))
        return self.counted(Batch(expert, inputs, encoded.mask.to(self.device), ids))

    def counted(self, batch: Batch) -> Batch:
        """The batch with the positions that the head of its task counts."""
        head = self.classifiers[batch.expert]
        return batch._replace(mask=head.mask(batch)) if isinstance(head, OwnModel) else batch


def within(root: Root | None, function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments), with sharded weights gathered."""
    found: T = function(*arguments) if root is None else root(function, *arguments)
    return found


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where nobody chose one


@dataclass(frozen=True)
class Placement:
    """A model's device, dtype and sharding.

    Args:
        device: The device.
        dtype: Dtype of the parameters; by default as stored. Buffers and heads keep theirs: positions need
            float32.
        shards: The processes that share one model; 1 replicates it.
        ahead: Blocks of a shared model that are gathered ahead of the one that runs.
    """

    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    shards: int = 1
    ahead: int = 1


def load_resident(
    recipe: Recipe,
    opened: Opened,
    coefficients: Coefficients,
    tokenize: Tokenize,
    placement: Placement = Placement(),
    pooling: str | None = None,
) -> Resident:
    """Load the base and build the heads, for merges of the experts' own task vectors.

    Statistics of batch norms are the base's, or averaged if the recipe has that rule.
    With `pooling`, a forward gives sentence embeddings (`read_embedding`).
    """
    embedding = None if pooling is None else read_embedding(opened.base, pooling)
    loaded, root = load_base(opened, placement)
    classifiers = build_heads(task_heads(recipe, opened), loaded, root, tokenize, placement.dtype)
    if placement.dtype and root is None:  # after the heads, whose label texts the stored weights embed
        for parameter in loaded.module.parameters():
            parameter.data = parameter.data.to(placement.dtype)
    own = [{loaded.buffers[name]: t for name, t in of.items()} for of in opened.own_statistics]
    merged = MergedModel(
        loaded.module, opened.task_vectors, coefficients, loaded.names, own_buffers=own if any(own) else ()
    )
    resident = Resident(merged, classifiers, root, embedding, loaded.buffers)
    resident.hold(averaged(recipe, opened.base, opened))
    return resident


def build_heads(
    heads: Mapping[str, TaskHead],
    loaded: LoadedModel,
    root: Root | None,
    tokenize: Tokenize,
    dtype: torch.dtype | None = None,
) -> list[Classifier | OwnModel | None]:
    """Every task's head over the model, which must have the base's weights: they embed label texts.

    `dtype` is that of the parameters of experts' own heads; by default the model's.
    """
    return [
        attach(head, loaded.module, loaded.names, special_ids(tokenize), dtype)
        if isinstance(head, OwnHead)
        else within(root, build_classifier, head, loaded.module, tokenize)
        for head in heads.values()
    ]


def special_ids(tokenize: Tokenize) -> Tensor:
    """The ids of a tokenizer's special tokens; none for another way of making inputs."""
    known = tokenize.special_ids if isinstance(tokenize, Tokenizer) else []
    return torch.tensor(known, dtype=torch.int64)


def load_base(opened: Opened, placement: Placement) -> tuple[LoadedModel, Root | None]:
    """The base on its device, as stored; or its shard in the placement's dtype, with the shards' root."""
    device = torch.device(placement.device)
    if placement.shards > 1:
        loaded = load_meta_model(opened.base, opened.ignore)
        how = device, placement.dtype, placement.shards, placement.ahead
        return loaded, shard_model(loaded, opened.base, opened.layout.learned, *how)
    loaded = load_model(opened.base, opened.ignore)
    loaded.module.to(device)
    return loaded, None


def preprocess(
    opened: Opened, methods: Sequence[Preprocess], workspace: Path, examples: str = ""
) -> TaskVectors:
    """The experts' task vectors after these methods, computed by the first process if not cached.

    `examples` identifies the calibration examples that an earlier fit used.

    Raises:
        ValueError: a method uses examples, and its result is no longer in the workspace.
    """
    if not methods:
        return opened.task_vectors
    with distributed.rank_zero_first():
        return apply(opened.task_vectors, methods, workspace, opened.identity(), examples)
