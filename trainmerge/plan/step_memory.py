"""The bytes that a step of a fit needs on one device, by purpose."""

from dataclasses import astuple, dataclass, fields

from trainmerge.system.memory import format_size

CAPTIONS = {
    "process": "the process before the fit",
    "model": "merged model",
    "gathered": "gathered: a block, and the next",
    "block_gradients": "gradients of a block",
    "activations": "activations",
    "summed_gradients": "gradients kept",
    "largest_gradient": "largest gradient",
    "operators": "between operators",
    "preparation": "loading and recording, above a step",
    "prefetched": "task vectors on their way, two parameters",
    "launches": "waiting for a launch of Triton's kernels",
    "scratch": "scratch of the passes",
    "coefficients": "coefficients and optimizer",
}


@dataclass(frozen=True)
class StepMemory:
    """Bytes on each device at the highest moment of a step.

    Args:
        process: What the process holds before the fit.
        model: The merged model, or this device's shard of it.
        gathered: A block of a sharded model and the next one, gathered.
        block_gradients: The gradients of one block of a sharded model.
        activations: What forwards keep for their backward.
        summed_gradients: Weight gradients that are summed over a step's backwards.
        largest_gradient: The largest weight's gradient.
        operators: What operators make in between.
        preparation: What loading, or recording an expert, needs above a step.
        prefetched: Task vectors of two parameters on their way to the device.
        launches: What waits for a launch of Triton's kernels.
        scratch: Blocks of the two passes, in float32.
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
        return [*rows, ("held at most, a device", format_size(self.total))]
