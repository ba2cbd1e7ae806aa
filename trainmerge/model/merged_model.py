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
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.kernels import Gathered, Product, run_products, shareable
from trainmerge.model.concrete import ConcreteMasks, change_of
from trainmerge.model.exact import exact
from trainmerge.model.loss_scale import LossScale
from trainmerge.model.low_rank_gradient import layer_products, tappable, tapped
from trainmerge.model.merged_weights import MergedWeights
from trainmerge.model.residency import Residency
from trainmerge.model.row_shards import local
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
        self._products = Gathered(self._run_products)
        self._found: list[tuple[str, Sequence[int], Tensor]] = []  # groups, and the sums to add to each
        self.reached: set[str] = set()  # parts of parameters that had a gradient
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
        found, self._found = self._found, []
        total = torch.zeros(self.coefficients.raw.shape, dtype=torch.float64)  # sum of many small terms
        if found:  # on the CPU, in a fixed order: a GPU's index_add_ is nondeterministic
            columns = torch.tensor([column for _, columns, _ in found for column in columns])
            inner = torch.cat([inner for *_, inner in found], 1).cpu().double()
            total.index_add_(1, columns, inner)
            self.reached |= self.placed.moved([(name, len(own)) for name, own, _ in found], inner)
        total[:, list(self.coefficients.layout.fixed)] = 0.0
        return self.loss_scale.unscaled(total).to(self.coefficients.raw)

    @contextmanager
    def tapped(self) -> Iterator[nn.Module]:
        """The module for forwards and backwards that need the coefficients' gradient only.

        Linear layers whose experts are all low-rank form no weight gradient (`low_rank_gradient`).
        """
        parts = {*self.placed.parts(self._learned)}  # a tap sees the whole weight, not a part of it
        ordinary = {n: p for n, p in self._learned.items() if n not in self.subspaces and n not in parts}
        ordinary = ordinary if self.masks is None else {}  # masks need the whole gradient
        with ExitStack() as layers:
            for name, layer in tappable(self.module, ordinary, self.task_vectors.deltas):
                layers.enter_context(tapped(layer, partial(self._collect_at_layer, name)))
            yield self.module

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """The step's last backward: accumulated gradients are complete, and collected as they arrive."""
        self._last = True
        try:
            yield
        finally:
            self._last = False

    def _arrived(self, names: Sequence[str], parameter: Tensor) -> None:
        if not self.keep_gradients or self._last:
            self._collect(names, parameter)

    def _collect_sums(self) -> None:
        """Collect the gradients that are left after a step's backwards, for sums in the layout's order."""
        self._products.flush()
        before = len(self._found)
        left = {own[0]: own for own in self._together if self._learned[own[0]].grad is not None}
        for first in self._supplied.order.of_sums(left):
            self._collect(left[first], self._learned[first])
        self._products.flush()
        places = {name: place for place, name in enumerate(self._learned if left else ())}
        self._found[before:] = sorted(self._found[before:], key=lambda call: places[call[0]])

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
            self._products.add((name, columns[chunks], product), shareable(product, stays))

    def _run_products(self, calls: Sequence[tuple[str, Sequence[int], Product]]) -> None:
        with exact(calls[0][2].grad):
            found = run_products([product for *_, product in calls])
        self._found += [(*call[:2], inner) for call, inner in zip(calls, found, strict=True)]

    def _collect_at_layer(self, name: str, inputs: Tensor, slopes: Tensor) -> None:
        columns, delta = self.coefficients.layout.groups[name], self._supplied.at_layer(name)
        with exact(slopes):
            self._found.append((name, columns, layer_products(inputs, slopes, delta, len(columns))))
