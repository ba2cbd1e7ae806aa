"""The resident model sharded over N processes, 1/N each, with FSDP2's `fully_shard`.

Where a model fits the devices of one machine, machines may replicate it. Then neither weights nor their
gradients cross machines: the parts of the coefficients' gradient are all that is added up.

Every process maps the same files, and reads its own rows of base and task vectors. Merged weights are
all-gathered one block at a time, and their gradients reduce-scattered; nothing else of the model's size is
communicated. The cost, with P bytes of parameters and U bytes of the largest unit (block, embedding, output):

    memory per process  P / N  +  (2 + d) U (gathered, d gathered ahead, its gradient)  +  activations
    sent per process    3 P (N - 1) / N per forward and backward, whatever K is: gathered twice, reduced once
                        (the reduction in float32: 2 P of it where weights have two bytes)
                        and 4 (K G + K) bytes per step

`pass_bytes` and `shard_bytes` compute this exactly for a module.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from trainmerge.checkpoints import Checkpoint, LoadedModel, compute, computed_parameters
from trainmerge.model.gather_ahead import gather_ahead
from trainmerge.model.placed import Placed
from trainmerge.model.row_shards import local, local_rows
from trainmerge.model.units import units
from trainmerge.system import distributed
from trainmerge.task_vectors.places import parameter_of


class Root(nn.Module):
    """The root of the sharded units: every pass through the model runs inside its `forward`.

    A pass may skip the model's own `forward` (a task's head uses the encoder only); the weights outside the
    blocks are gathered nevertheless.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function, *arguments):  # type: ignore[no-untyped-def]
        """function(*arguments)."""
        return function(*arguments)


@torch.no_grad()
def shard_model(
    loaded: LoadedModel,
    base: Checkpoint,
    learned: Iterable[str],
    device: torch.device,
    dtype: torch.dtype | None = None,
    shards: int = 0,
    ahead: int = 1,
) -> Root:
    """Shard the model of `load_meta_model` over all processes and read this process's rows from the files.

    `learned` are the base's names of the parameters that get gradients; weights have `dtype`, by default the
    stored one. `shards` neighbouring processes share one model, by default all; groups of them replicate it,
    and exchange nothing of its size. `ahead` blocks are gathered before they run (`gather_ahead`). Parameters
    that no file contains are computed (Marian's positions), or 0 (an unused pooler).

    Raises:
        ValueError: the learned parameters of one block are stored in different dtypes.
    """
    module, names = loaded.module, loaded.names
    parameters = dict(module.named_parameters())
    for parameter in parameters.values():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    for name in learned:
        parameters[parameter_of(names[name])].requires_grad_(True)
    root = Root(module)
    _fully_shard(root, _mesh(device, shards or distributed.world_size()))
    gather_ahead(root, ahead)
    _to_device(root, device)
    parameters = dict(module.named_parameters())
    for name in parameters.keys() - {parameter_of(inside) for inside in names.values()}:
        local(parameters[name]).zero_()
    for name, owner in computed_parameters(module).items():
        local(parameters[name]).copy_(compute(owner)[local_rows(parameters[name])])
    placed = Placed.of(module, names, names)
    for name in names:
        if (shard := placed.shards.get(name)) is None:
            placed.written(name).copy_(base.read(name))
        elif shard.inside:
            placed.written(name).copy_(base.read(name)[shard.rows])
    return root


def _mesh(device: torch.device, shards: int) -> DeviceMesh:
    """The processes that share this process's model."""
    groups = distributed.world_size() // shards
    mesh = init_device_mesh(device.type, (groups, shards), mesh_dim_names=("replica", "shard"))
    return mesh["shard"]


def _fully_shard(root: Root, mesh: DeviceMesh) -> None:
    whole = {parameter for parameter in root.parameters() if not parameter.dim()}  # FSDP2 shards no scalars
    places = [*units(root.module), root]
    for place in places:
        dtypes = {p.dtype for p in place.parameters() if p.requires_grad and p not in whole}
        if len(dtypes) > 1 and place is not root:
            raise ValueError(
                f"model.sharded needs one dtype per block, but a block has {sorted(map(str, dtypes))}: set "
                "model.weights to bfloat16, or save the base in one dtype"
            )
        # Reshard the root after its forward too: the next merge is written into shards.
        fully_shard(
            place,
            mesh=mesh,
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=_reduced_in(dtypes)),
            ignored_params=whole,
        )
    for place in root.modules():
        if isinstance(place, FSDPModule):  # sum here; the mean over processes is taken once, of K x G numbers
            place.set_gradient_divide_factor(1.0)
            place.set_force_sum_reduction_for_comms(True)


def _reduced_in(dtypes: set[torch.dtype]) -> torch.dtype | None:
    return torch.float32 if any(dtype.itemsize < 4 for dtype in dtypes) else None


def _to_device(root: Root, device: torch.device) -> None:
    """Allocate this process's shards; buffers keep their values."""
    kept = {
        (owner, name): buffer
        for owner in root.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    }
    root.to_empty(device=device)
    for (owner, name), buffer in kept.items():
        owner._buffers[name] = buffer.to(device)


def shard_bytes(module: nn.Module, processes: int) -> int:
    """Bytes of parameters on each of N processes: 1/N, padded to whole rows; scalars are replicated."""
    return sum(_share(p, processes) * p.element_size() for p in module.parameters())


def pass_bytes(module: nn.Module, processes: int) -> dict[str, int]:
    """Bytes that each of N processes passes to collectives in one forward and backward.

    `gathered`: its shards, once forward and once backward; `reduced`: full gradients of the learned
    parameters, in float32 or wider.
    """
    sharded = {p: _share(p, processes) for p in module.parameters() if p.dim()}
    gathered = sum(2 * numbers * p.element_size() for p, numbers in sharded.items())
    reduced = sum(
        processes * numbers * max(4, p.element_size()) for p, numbers in sharded.items() if p.requires_grad
    )
    return {"gathered": gathered, "reduced": reduced}


def _share(parameter: Tensor, processes: int) -> int:
    """Elements of a parameter on each process."""
    rows = -(-parameter.shape[0] // processes) if parameter.dim() else 1
    return rows * parameter.shape[1:].numel()
