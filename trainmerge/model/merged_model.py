"""One ordinary model whose weights are the merge, and the gradient of its coefficients.

The merge is linear in the coefficients, so it never enters the autograd graph:

    W = base + sum_k c_k tau_k          written into the parameters once per step (`materialise`)
    dL/dc_k = <dL/dW, tau_k>            as soon as a weight's gradient is complete, which is then freed

The memory is one model and one weight's gradient, independent of K (with Triton's kernels, plus the tensors
queued for a launch, `kernels.calls`). If FSDP2 shards the module, every process merges its own rows and takes
the inner products of the rows of the reduced gradient (`row_shards`).

Legend: `K` experts, `G` coefficient groups, `C` chunks of one parameter.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property, partial

from torch import Tensor, nn

from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.kernels import shareable
from trainmerge.model.concrete import ConcreteMasks, change_of
from trainmerge.model.exact import exact
from trainmerge.model.loss_scale import LossScale
from trainmerge.model.low_rank_gradient import layer_products, tappable, tapped
from trainmerge.model.merged_weights import MergedWeights
from trainmerge.model.one_pass import OnePass, Predict, sets_of
from trainmerge.model.postponed import by_unit
from trainmerge.model.residency import Residency
from trainmerge.model.row_shards import local
from trainmerge.model.sums import Sums
from trainmerge.preprocess.subspace import outside_subspace
from trainmerge.task_vectors.delta import TaskVectors


class MergedModel(MergedWeights):
    """`MergedWeights` that also compute the gradient of the coefficients.

    Only parameters with a learned coefficient require gradients. Gradients are projected onto the orthogonal
    complement of `subspaces`, orthonormal columns [m, k]. With `keep_gradients`, weight gradients accumulate
    until `gradient` processes them in one pass over the task vectors: several backwards then cost one pass
    and the memory of one more model. Under FSDP2, which must sum gradients (`sharded`), the coefficient
    gradients of all processes add up to the sum of each process's own. `masks` are learned with the
    coefficients, in one process.
    """

    def __init__(
        self,
        module: nn.Module,
        task_vectors: TaskVectors,
        coefficients: Coefficients,
        names: Mapping[str, str] | None = None,
        originals: TaskVectors | None = None,
        subspaces: Mapping[str, Tensor] | None = None,
        keep_gradients: bool = False,
        masks: ConcreteMasks | None = None,
        residency: Residency = Residency(),  # noqa: B008 - frozen
        own_buffers: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        super().__init__(module, task_vectors, coefficients, names, originals, masks, residency, own_buffers)
        self.subspaces, self.keep_gradients = subspaces or {}, keep_gradients
        self._learned = {name: self.placed.owners[name] for name in coefficients.layout.learned}
        self._together = self.placed.by_owner(self._learned)
        self._last = False  # whether the step's last backward runs
        self.loss_scale = LossScale.of(module)  # for losses whose backward `gradient` collects
        self._sums = Sums(self.placed, coefficients)
        self.reached = self._sums.reached  # parts of parameters that had a gradient
        self._ahead: OnePass | None = None  # in the last backward, if the next merge is written in it
        module.requires_grad_(False)
        self._hooks = [
            self._learned[names[0]]
            .requires_grad_(True)
            .register_post_accumulate_grad_hook(partial(self._arrived, names))  # type: ignore[no-untyped-call]
            for names in self._together
        ]

    def with_task_vectors(
        self,
        task_vectors: TaskVectors,
        subspaces: Mapping[str, Tensor],
        keep_gradients: bool,
        residency: Residency = Residency(),  # noqa: B008 - frozen
    ) -> "MergedModel":
        """The same module as the merge of other task vectors; this object stops receiving gradients."""
        for hook in self._hooks:
            hook.remove()
        same = self.coefficients, self.names, self.originals, subspaces, keep_gradients, self.masks
        return MergedModel(self.module, task_vectors, *same, residency, self.own_buffers)

    def gradient(self) -> Tensor:
        """The coefficient gradient [K, G] of all backwards since the last call, and resets it to zero.

        Fixed coefficients have none: everything that reads a gradient sees 0 there.
        """
        self._collect_sums()
        return self.loss_scale.unscaled(self._sums.taken()).to(self.coefficients.raw)

    @contextmanager
    def tapped(self) -> Iterator[nn.Module]:
        """The module for forwards and backwards that need the coefficients' gradient only.

        Linear layers whose experts are all low-rank form no weight gradient (`low_rank_gradient`).
        """
        with ExitStack() as layers:
            for name, layer in self._taps():
                layers.enter_context(tapped(layer, partial(self._collect_at_layer, name)))
            yield self.module

    def _taps(self) -> Iterator[tuple[str, nn.Linear]]:
        parts = {*self.placed.parts(self._learned)}  # a tap sees the whole weight, not a part of it
        ordinary = {n: p for n, p in self._learned.items() if n not in self.subspaces and n not in parts}
        ordinary = ordinary if self.masks is None else {}  # masks need the whole gradient
        return tappable(self.module, ordinary, self.task_vectors.deltas)

    @contextmanager
    def last_backward(self, predict: Predict | None = None) -> Iterator[None]:
        """The step's last backward: accumulated gradients are complete, and collected as they arrive.

        With `predict`, the next merge is written in it (`model.one_pass`) where that saves passes; call
        `settle` after the step.
        """
        self._last, self._ahead = True, self._one_pass if predict else None
        try:
            with nullcontext() if predict is None or self._ahead is None else self._ahead.during(predict):
                yield
        finally:
            self._last, self._ahead = False, None

    def settle(self) -> None:
        """After an optimizer step, complete the merge at the coefficients that it gave, if it is begun."""
        if self.standing.on:
            values = self.coefficients().detach().cpu()
            left = self.standing.left(self._learned, partial(self.coefficients.of, values=values))
            self.materialise()
            if self._one_pass is not None:
                self._one_pass.judge(left)

    @property
    def writes_ahead(self) -> bool:
        """Whether a last backward writes the next merge, if it is told what the step will give."""
        return self._one_pass is not None and not self._one_pass.stopped

    @cached_property
    def _one_pass(self) -> OnePass | None:
        """Merges in the last backward, where every pass waits and all weights' gradients are seen."""
        plain = self.masks is None and self.rule is None and not self.loss_scale.active
        if not (plain and self._supplied.waits and self._is_whole()) or any(True for _ in self._taps()):
            return None
        sizes = {name: self.task_vectors.deltas[name].nbytes for name in self._parameters}
        groups = {name: self.coefficients.layout.groups[name] for name in self._learned}
        sets = sets_of(groups, sizes, self._supplied.held)
        if not sets or not by_unit(self.module, self._owners):
            return None
        return OnePass(sets, self._learned, sizes, self.standing, self._sums.so_far, self._write_unseen)

    def _write_unseen(self, names: Sequence[str], values: Tensor | None) -> None:
        """Merge at `values` [K, G], or at the current coefficients, within a backward."""
        at = (self.coefficients().detach() if values is None else values).cpu()
        after = self._supplied.order.after
        self._merge(self.task_vectors, names, partial(self.coefficients.of, values=at), after, unseen=True)

    def _arrived(self, names: Sequence[str], parameter: Tensor) -> None:
        if not self.keep_gradients or self._last:
            self._collect(names, parameter)
        if self._ahead is not None:
            self._ahead.complete(names)

    def _collect_sums(self) -> None:
        """Collect the gradients that are left after a step's backwards, for sums in the layout's order."""
        left = {own[0]: own for own in self._together if self._learned[own[0]].grad is not None}
        with self._sums.arranged(self._learned if left else ()):
            for first in self._supplied.order.of_sums(left):
                self._collect(left[first], self._learned[first])

    def _collect(self, names: Sequence[str], parameter: Tensor) -> None:
        assert parameter.grad is not None
        with exact(parameter):
            whole = local(parameter.grad)
            if whole.is_sparse:  # an embedding's
                whole = whole.to_dense()
            for name in names:
                self._collect_part(name, self.placed.part(name, whole))
        parameter.grad = None

    def _collect_part(self, name: str, slope: Tensor) -> None:
        slope = outside_subspace(slope, self.subspaces.get(name), self.task_vectors.deltas[name].role)
        delta = self._supplied.to_collect(name)
        if self.masks is not None:
            values = self.coefficients.of(name, self.coefficients().detach().cpu())
            slope = self.masks.collect(name, slope, change_of(self.task_vectors.deltas[name], values))
        columns, stays = self.coefficients.layout.groups[name], self._supplied.stays(self.task_vectors, name)
        for chunks, product in delta.products(slope, len(columns)):
            self._sums.queue(name, columns[chunks], product, shareable(product, stays))

    def _collect_at_layer(self, name: str, inputs: Tensor, slopes: Tensor) -> None:
        columns, delta = self.coefficients.layout.groups[name], self._supplied.at_layer(name)
        with exact(slopes):
            self._sums.add(name, columns, layer_products(inputs, slopes, delta, len(columns)))
