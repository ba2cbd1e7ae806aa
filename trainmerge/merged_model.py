"""One ordinary model whose weights are the merge, and the gradient of its coefficients.

The merge is linear in the coefficients, so it never enters the autograd graph:

    W = base + sum_k c_k tau_k          written into the parameters once a step (`materialise`)
    dL/dc_k = <dL/dW, tau_k>            taken as soon as a weight's gradient is complete, which then is freed

Memory holds one model and one weight's gradient, whatever K is. Where FSDP2 shards the module, every process
merges the rows that it holds and multiplies the rows of the reduced gradient with them (`held`).

Legend: `K` experts, `G` coefficient groups, `C` chunks of one parameter.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from trainmerge.coefficients import Coefficients
from trainmerge.held import HeldDelta, held, local
from trainmerge.kernels import Gathered, Product, gathers, run_merges, run_products, touched
from trainmerge.layer_taps import products, tap, tappable
from trainmerge.streaming import Prefetch, prefetch_to
from trainmerge.task_vectors import Delta, TaskVectors, outside


class MergedModel:
    """Holds `module` and keeps its merged parameters equal to the merge of the task vectors.

    `names` maps a task vector's name to the module's parameter name, where they differ; `parameters` has
    the module's parameters under the task vectors' names.
    `task_vectors` may be replaced by preprocessed ones; `teacher` and `uniform` go on with the experts' own,
    `originals`. `left_alone` are orthonormal columns [m, k] by parameter: what a gradient has in their span
    counts for nothing. The module's weights are overwritten; only merged parameters ask for gradients.
    With `keep_gradients` weight gradients stay and add up until `gradient` takes them all in one pass over
    the task vectors: one more model is held, and several backwards cost one pass.
    Under FSDP2, which has to sum gradients (`sharded`), the coefficient gradients of all processes add up to
    the sum of what each would have found alone.

    Raises ValueError if they are the very tensors that the task vectors have as their base.
    """

    def __init__(
        self,
        module: nn.Module,
        task_vectors: TaskVectors,
        coefficients: Coefficients,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.module, self.task_vectors, self.coefficients = module, task_vectors, coefficients
        self.originals = task_vectors
        self.left_alone: Mapping[str, Tensor] = {}
        self.keep_gradients = False
        own = dict(module.named_parameters())
        self.parameters = {name: own[(names or {}).get(name, name)] for name in task_vectors.deltas}
        self._parameters = {name: self.parameters[name] for name in coefficients.layout.groups}
        aliased = [name for name, p in self.parameters.items() if _shares(p, task_vectors.deltas[name].base)]
        if aliased:
            raise ValueError(
                f"the model's own weights are the base of {aliased[:3]}: give the task vectors a copy"
            )
        device = next(module.parameters()).device
        self._to_write, self._to_collect = prefetch_to(device), prefetch_to(device)  # each pass has its order
        self._merges, self._products = Gathered(run_merges), Gathered(self._run_products)
        self._gradient: Tensor | None = None  # [K, G], float64: many small sums meet here
        module.requires_grad_(False)
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, name))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def materialise(self) -> None:
        """Write the merge of the present coefficients into the module: one pass over the task vectors."""
        values = self.coefficients().cpu()  # at once: the passes read single numbers of it
        self._write(self.task_vectors, self._parameters, lambda name: self.coefficients.of(name, values))

    @contextmanager
    def teacher(self, expert: int) -> Iterator[nn.Module]:
        """The module as one expert, excluded parameters included; the merge comes back afterwards."""
        one_hot = torch.eye(len(self.task_vectors.experts))[expert]
        with self.uniform(one_hot, everywhere=True):
            yield self.module

    @contextmanager
    def uniform(self, weights: Tensor, everywhere: bool = False) -> Iterator[nn.Module]:
        """The module with one coefficient an expert, `weights` [K]; the merge comes back afterwards.

        `everywhere` moves the parameters that the layout excludes too.
        """
        touched = self.parameters if everywhere else self._parameters
        try:
            self._write(self.originals, touched, lambda _: weights[:, None])
            yield self.module
        finally:
            excluded = touched.keys() - self._parameters.keys()
            self._write(self.originals, excluded, lambda _: torch.zeros(len(weights), 1))
            self.materialise()

    def gradient(self) -> Tensor:
        """The coefficient gradient [K, G] of all backwards since the last call; starts over at zero."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._collect(name, parameter)
        self._products.flush()
        gradient = self._gradient if self._gradient is not None else self._zeros()
        self._gradient = None
        return gradient.to(self.coefficients.raw.dtype)

    @contextmanager
    def tapped(self) -> Iterator[nn.Module]:
        """The module for forwards and backwards that need no weight gradient but the coefficients'.

        Where all experts of a linear layer are low-rank, `gradient` then comes from what goes into the
        layer and what comes back, and the weight has none. Not for a model that reads such a weight past
        its layer's forward, or changes a layer's output in place.
        """
        ordinary = {n: p for n, p in self._parameters.items() if n not in self.left_alone}
        layers = dict(tappable(self.module, ordinary, self.task_vectors.deltas))
        handles = [tap(layer, partial(self._collect_at_layer, name)) for name, layer in layers.items()]
        for layer in layers.values():
            layer.weight.requires_grad_(False)
        try:
            yield self.module
        finally:
            for handle, layer in zip(handles, layers.values(), strict=True):
                handle.remove()
                layer.weight.requires_grad_(True)

    def _arrived(self, name: str, parameter: Tensor) -> None:
        if not self.keep_gradients:
            self._collect(name, parameter)

    def _collect(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        with exact(parameter):
            slope = self._projected(name, local(parameter.grad))
            delta = self._delta(self._to_collect, self.task_vectors, name)
            columns, wait = self.coefficients.layout.groups[name], gathers(slope.device)
            for chunks, product in delta.products(slope, len(columns)):
                self._products.add((columns[chunks], product), touched(product), wait)
        parameter.grad = None

    def _run_products(self, calls: Sequence[tuple[Sequence[int], Product]]) -> None:
        found = run_products([product for _, product in calls])
        self._add([column for columns, _ in calls for column in columns], torch.cat(found, 1))

    def _collect_at_layer(self, name: str, inputs: Tensor, slopes: Tensor) -> None:
        with exact(slopes):
            columns = self.coefficients.layout.groups[name]
            self._add(columns, products(inputs, slopes, self.task_vectors.deltas[name], len(columns)))

    def _add(self, columns: Sequence[int], inner: Tensor) -> None:
        """Sum inner products [K, len(columns)] into their groups."""
        if self._gradient is None:
            self._gradient = self._zeros()
        places = torch.tensor(columns, device=self._gradient.device)
        self._gradient.index_add_(1, places, inner.to(self._gradient))

    def _projected(self, name: str, gradient: Tensor) -> Tensor:
        if name not in self.left_alone:
            return gradient
        basis = self.left_alone[name].to(gradient.device)
        return outside(gradient.to(basis.dtype), basis)

    @torch.no_grad()
    def _write(
        self, source: TaskVectors, names: Iterable[str], coefficients: Callable[[str], Tensor]
    ) -> None:
        with exact(next(self.module.parameters())):
            for name in names:
                out = local(self.parameters[name])
                delta, wait = self._delta(self._to_write, source, name), gathers(out.device)
                for merge in delta.merges(out, coefficients(name)):
                    self._merges.add(merge, touched(merge), wait)
            self._merges.flush()
        torch.clear_autocast_cache()  # a mixed-precision context keeps its casts of the weights that were

    def _delta(self, prefetch: Prefetch | None, source: TaskVectors, name: str) -> Delta | HeldDelta:
        """What a pass over one parameter reads: on its way already, or the rows that this process holds."""
        parameter = self.parameters[name]
        whole = local(parameter) is parameter
        if prefetch is not None and whole:
            return prefetch.take(source.deltas, name)
        return held(source.deltas[name], parameter)

    def _zeros(self) -> Tensor:
        return torch.zeros_like(self.coefficients.raw, dtype=torch.float64)


def _shares(parameter: Tensor, base: Tensor) -> bool:
    return base.numel() > 0 and local(parameter).data_ptr() == base.data_ptr()


def exact(parameter: Tensor) -> torch.autocast:
    """No autocast: the passes choose their precision themselves, inside a mixed-precision step too."""
    return torch.autocast(parameter.device.type, enabled=False)
