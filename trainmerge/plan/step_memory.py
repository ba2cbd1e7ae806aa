"""The bytes that a step of a fit needs on one device, by purpose."""

from dataclasses import astuple, dataclass, fields

from trainmerge.system.memory import format_size

CAPTIONS = {
    "process": "the process before the fit",
    "model": "merged model",
    "gathered": "gathered blocks",
    "block_gradients": "gradients of a block",
    "activations": "activations",
    "summed_gradients": "accumulated gradients",
    "largest_gradient": "largest gradient",
    "operators": "temporaries of operators",
    "preparation": "loading and recording, in excess of a step",
    "vectors": "base and task vectors that stay",
    "prefetched": "prefetched task vectors, two blocks",
    "launches": "queued for a Triton kernel launch",
    "scratch": "scratch buffers",
    "coefficients": "coefficients and optimizer",
}


@dataclass(frozen=True)
class StepMemory:
    """Peak bytes of a step on each device.

    Args:
        process: The process before the fit.
        model: The merged model, or this device's shard of it.
        gathered: A block of a sharded model and those that are gathered ahead.
        block_gradients: The gradients of one block of a sharded model.
        activations: Tensors that forwards save for their backward.
        summed_gradients: Weight gradients accumulated over a step's backwards.
        largest_gradient: The largest weight's gradient.
        operators: Temporaries of operators.
        preparation: Needs of loading, or of recording an expert, in excess of a step.
        vectors: Base and task vectors that are held on the device.
        prefetched: Base and task vectors of two blocks, which cross the link.
        launches: Tensors queued for a Triton kernel launch.
        scratch: Float32 buffers of the two passes.
        coefficients: Coefficients and the optimizer's state.
    """

    process: int
    model: int
    gathered: int
    block_gradients: int
    activations: int
    summed_gradients: int
    largest_gradient: int
    operators: int
    preparation: int
    vectors: int
    prefetched: int
    launches: int
    scratch: int
    coefficients: int

    @property
    def total(self) -> int:
        """The sum of all purposes."""
        return sum(astuple(self))

    def rows(self) -> list[tuple[str, str]]:
        """Caption and size of each purpose that needs memory, and of the total."""
        sizes = {CAPTIONS[field.name]: getattr(self, field.name) for field in fields(self)}
        rows = [(caption, format_size(count)) for caption, count in sizes.items() if count]
        return [*rows, ("peak per device", format_size(self.total))]
