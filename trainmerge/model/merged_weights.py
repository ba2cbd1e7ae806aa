"""One ordinary model whose weights are the merge of task vectors.

Legend: `K` experts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.kernels import Gathered, run_merges, shareable
from trainmerge.model.by_rule import merge_by_rule
from trainmerge.model.concrete import ConcreteMasks
from trainmerge.model.exact import exact
from trainmerge.model.one_pass import Of, Standing
from trainmerge.model.pass_order import successors
from trainmerge.model.placed import Placed, check_apart
from trainmerge.model.postponed import by_unit, grouped, postponed
from trainmerge.model.residency import Residency
from trainmerge.model.supplied import Supplied
from trainmerge.model.turns import in_turns
from trainmerge.preprocess import Rule
from trainmerge.task_vectors.buffers import holding
from trainmerge.task_vectors.delta import TaskVectors
from trainmerge.task_vectors.link import link_to

T = TypeVar("T")
After = Mapping[str, str] | None  # each name's successor in a longer pass


class MergedWeights:
    """Writes the merge of the task vectors into `module`, whose weights are overwritten.

    `names` maps a task vector's name to the module's parameter or place (`task_vectors.places`), where they
    differ; `parameters` has the module's parameters, or views of their places, under the task vectors' names.
    If `task_vectors` are preprocessed, `originals` are the experts' own, which `teacher` and `uniform` merge.
    `residency` is where base and task vectors are held. `masks` cut what the merge changes. `own_buffers`,
    K or none, are those of the experts that differ, by the module's names: `teacher` has them.

    Raises ValueError if its parameters share storage with the task vectors' base.
    """

    def __init__(
        self,
        module: nn.Module,
        task_vectors: TaskVectors,
        coefficients: Coefficients,
        names: Mapping[str, str] | None = None,
        originals: TaskVectors | None = None,
        masks: ConcreteMasks | None = None,
        residency: Residency = Residency(),  # noqa: B008 - frozen
        own_buffers: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        self.module, self.task_vectors, self.coefficients = module, task_vectors, coefficients
        self.names, self.originals, self.masks = names or {}, originals or task_vectors, masks
        self.own_buffers = own_buffers
        self.placed = Placed.of(module, task_vectors.deltas, self.names)
        self.parameters = self.placed.views()
        self._parameters = {name: self.parameters[name] for name in coefficients.layout.groups}
        self._owners = {name: self.placed.owners[name] for name in self._parameters}
        check_apart(self.parameters, task_vectors.deltas)
        link = link_to(next(module.parameters()).device)
        self._supplied = Supplied(task_vectors, self.placed.shards, residency, link)
        self.standing = Standing(self.placed.owners)
        self.rule: Rule | None = None  # of new differences that `materialise` merges: on a CPU, no gradients

    @torch.no_grad()
    def materialise(self) -> None:
        """Write the merge at the current coefficients into the module: one pass over the task vectors."""
        values = self.coefficients().cpu()  # copied once: the passes read single elements
        if self.rule is not None:
            self._write_by(self.rule, values)
            return
        self._write(self.task_vectors, self._left(values), partial(self.coefficients.of, values=values))
        if self.masks is not None:
            self.masks.mask_all(self._parameters, self.task_vectors.deltas)

    @contextmanager
    def merging(self) -> Iterator[None]:
        """`materialise` for the forwards in this context; the whole merge is written at its end.

        If task vectors are sent over a link, each unit of the module is merged just before its own forward
        (`model.postponed`), beside which the next ones are sent. The weights are the same, bit by bit.
        """
        values = self.coefficients().detach().cpu()
        left = self._left(values) if self._postpones() else []
        if not left or not (unit_of := by_unit(self.module, self._owners)):
            self.materialise()
            yield
            return
        outside, groups = grouped(left, unit_of)
        of = partial(self.coefficients.of, values=values)
        following = successors(chain(outside, *groups.values()))
        write = partial(self._merge, self.task_vectors, of=of, following=following)
        torch.clear_autocast_cache()  # not again within the forwards, which share casts
        with torch.no_grad():
            write(outside)
        with postponed(groups, self._owners, write):
            yield

    def run(self, tasks: Sequence[Callable[[], T]], merge: bool) -> list[T]:
        """What forwards of several tasks return; with `merge` they write the merge (`merging`).

        On a device behind a link they take turns (`model.turns`), wherever its task vectors are held: how a
        backward sums the tasks' gradients depends on that. A sharded or compiled module has no turns.
        """
        with self.merging() if merge else nullcontext():
            turning = self._supplied.linked and len(tasks) > 1 and self._is_whole()
            if turning and (unit_of := by_unit(self.module, self._owners)):
                return in_turns(dict.fromkeys(unit_of.values()), tasks)
            return [task() for task in tasks]

    def _left(self, values: Tensor) -> list[str]:
        """The merged parameters that do not stand at `values` [K, G], in the order of a merge."""
        names = self._supplied.order.of_merge(self._parameters)
        return self.standing.left(names, partial(self.coefficients.of, values=values))

    def _postpones(self) -> bool:
        """Whether units are merged one by one: not on shards, which are gathered ahead, nor under masks."""
        return self._supplied.sends and self.masks is None and self._is_whole()

    def _is_whole(self) -> bool:
        return not any(isinstance(own, DTensor) for own in self._owners.values())

    @contextmanager
    def teacher(self, expert: int) -> Iterator[nn.Module]:
        """In this context the module is one expert, excluded parameters too; then the merge is restored."""
        one_hot = torch.eye(len(self.task_vectors.experts))[expert]
        own = self.own_buffers[expert] if self.own_buffers else {}
        with self.uniform(one_hot, everywhere=True), holding(self.module, own):
            yield self.module

    @contextmanager
    def uniform(self, weights: Tensor, everywhere: bool = False) -> Iterator[nn.Module]:
        """In this context experts have one coefficient each, `weights` [K]; then the merge is restored.

        `everywhere` also changes the parameters that the layout excludes.
        """
        moved = self.parameters if everywhere else self._parameters
        try:
            self._write(self.originals, moved, lambda _: weights[:, None])
            yield self.module
        finally:
            excluded = moved.keys() - self._parameters.keys()
            self._write(self.originals, excluded, lambda _: torch.zeros(len(weights), 1))
            self.materialise()

    @contextmanager
    def at(self, values: Tensor) -> Iterator[nn.Module]:
        """In this context the merge has the coefficients `values` [K, G]; then its own again."""
        try:
            self._write(self.task_vectors, self._parameters, partial(self.coefficients.of, values=values))
            yield self.module
        finally:
            self.materialise()

    @contextmanager
    def merge_of(self, task_vectors: TaskVectors, scale: float) -> Iterator[nn.Module]:
        """In this context the module is base + scale * sum of other task vectors; then the merge again."""
        weights = torch.full((len(task_vectors.experts), 1), scale)
        try:
            self._write(task_vectors, self._parameters, lambda _: weights)
            yield self.module
        finally:
            self.materialise()

    def _write_by(self, rule: Rule, values: Tensor) -> None:
        self.standing.forget(self._parameters)
        with exact(next(self.module.parameters())):
            of = partial(self.coefficients.of, values=values)
            merge_by_rule(self._parameters, self.task_vectors.deltas, rule, of)
        torch.clear_autocast_cache()

    @torch.no_grad()
    def _write(self, source: TaskVectors, names: Iterable[str], of: Of) -> None:
        self._merge(source, names, of)
        torch.clear_autocast_cache()  # autocast caches casts of the previous weights

    def _merge(
        self, source: TaskVectors, names: Iterable[str], of: Of, following: After = None, unseen: bool = False
    ) -> None:
        """Write merges; `unseen` by autograd, which otherwise refuses to use what it saved of a weight."""
        merges, names = Gathered(run_merges), [*names]
        self.standing.forget(names)
        with exact(next(self.module.parameters())):
            for name, delta in self._supplied.to_merge(source, names, following):
                for merge in delta.merges(self.placed.written(name, unseen), of(name)):
                    merges.add(merge, shareable(merge, self._supplied.stays(source, name)))
            merges.flush()
        if source is self.task_vectors:
            self.standing.wrote(names, of)
