"""The deltas of a step's passes: this process's rows, from where they are held, in the order that reuses."""

from collections.abc import Iterable, Iterator, Mapping

from trainmerge.model.pass_order import PassOrder, successors
from trainmerge.model.residency import Residency
from trainmerge.model.row_shards import DeltaShard, RowShard, as_shard, delta_shards
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.link import Link
from trainmerge.task_vectors.prefetch import Supply, supply_of


class Supplied:
    """Deltas for the passes.

    Args:
        task_vectors: What every step reads; `residency` is where they are held.
        shards: This process's rows of the sharded ones.
        residency: The place of each delta.
        link: The link to the device; None for a processor.
    """

    def __init__(
        self,
        task_vectors: TaskVectors,
        shards: Mapping[str, RowShard],
        residency: Residency,
        link: Link | None,
    ) -> None:
        self._own, self._shards, self._link = task_vectors, shards, link
        self._supply, self.held = self._supply_of(task_vectors, residency), residency.at("device")
        self.order = PassOrder()

    @property
    def linked(self) -> bool:
        """Whether the device is behind a link."""
        return self._link is not None

    @property
    def sends(self) -> bool:
        """Whether a pass over the task vectors waits for a link."""
        return self.linked and self._supply.waits

    @property
    def waits(self) -> bool:
        """Whether a pass waits for a link, or for files larger than the free memory."""
        return self._supply.waits

    def to_merge(
        self, source: TaskVectors, names: Iterable[str], following: Mapping[str, str] | None = None
    ) -> Iterator[tuple[str, Delta | DeltaShard]]:
        """These deltas of any task vectors, in order; `following` are the successors in a longer pass."""
        supply = self._supply if source is self._own else self._supply_of(source, Residency())
        order = [*names]
        after = successors(order) if following is None else following
        for name in order:
            yield name, as_shard(supply.take(name, after), self._shards.get(name))

    def stays(self, source: TaskVectors, name: str) -> bool:
        """Whether a delta is on the device for the whole fit, so that queued calls do not keep it alive."""
        return source is self._own and name in self.held

    def to_collect(self, name: str) -> Delta | DeltaShard:
        """The delta of a parameter whose gradient is complete."""
        return as_shard(self.at_layer(name), self._shards.get(name))

    def at_layer(self, name: str) -> Delta:
        """The delta of a layer without a weight gradient, which is not sharded."""
        delta = self._supply.take(name, self.order.after)
        self.order.collected(name)
        return delta

    def _supply_of(self, source: TaskVectors, residency: Residency) -> Supply:
        mine = delta_shards(source.deltas, self._shards)
        return supply_of(mine, self._link, residency.at("device"), residency.at("host"))
