"""The resident model over several processes, each of which holds 1/N of it: FSDP2's `fully_shard`.

Every process maps the same files, and reads its own rows of base and task vectors. One block at a time is
gathered, of the merged weights alone; its gradient is reduce-scattered; nothing else of a model's size moves.
What that costs, with P bytes of parameters, N processes, and the largest unit (block, embedding, output) of
U bytes:

    memory a process    P / N  +  3 U (gathered, gathered ahead, its gradient)  +  activations
    sent a process      3 P (N - 1) / N a forward and backward, whatever K is: gathered twice, reduced once
                        (the reduction in float32: 2 P of it where weights have two bytes)
                        and 4 (K G + K) bytes a step

`pass_bytes` and `shard_bytes` are this, to the byte, for a module.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from trainmerge.checkpoints import Checkpoint, LoadedModel
from trainmerge.model.row_shards import local, local_rows
from trainmerge.system import distributed


class Root(nn.Module):
    """The root of the sharded units: any passage through the model runs inside of its `forward`.

    A passage may skip the model's own `forward` (a task's head sits on the encoder), and finds the weights
    outside of blocks gathered all the same.
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
) -> Root:
    """Shard a `load_meta_model` over all processes and fill in this one's rows from the files.

    `learned` are the base's names of parameters that will have gradients; weights are held in `dtype`, or as
    they are stored. Parameters that no file has (an unused pooler) are 0.

    Raises:
        ValueError: the learned parameters of one block are stored in different dtypes.
    """
    module, names = loaded.module, loaded.names
    parameters = dict(module.named_parameters())
    for parameter in parameters.values():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    for name in learned:
        parameters[names[name]].requires_grad_(True)
    root = Root(module)
    _fully_shard(root, device)
    _to_device(root, device)
    parameters = dict(module.named_parameters())
    for name in parameters.keys() - set(names.values()):
        local(parameters[name]).zero_()
    for name, inside in names.items():
        local(parameters[inside]).copy_(base.read(name)[local_rows(parameters[inside])])
    return root


def units(module: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: numbered blocks, and embeddings and linear layers outside of them.

    One that shares a weight with the rest (tied embeddings) is none: it is gathered with the root.
    """
    owners: dict[int, list[nn.Module]] = {}
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(owner)

    def alone(candidate: nn.Module) -> bool:
        inside = set(candidate.modules())
        own = list(candidate.parameters())
        return bool(own) and all(owner in inside for p in own for owner in owners[id(p)])

    found: list[nn.Module] = []

    def look(place: nn.Module, numbered: bool) -> None:
        container = isinstance(place, nn.ModuleList | nn.ModuleDict)
        large = isinstance(place, nn.Embedding | nn.Linear)
        if (large or (numbered and not container)) and alone(place):
            found.append(place)
            return
        for child in place.children():
            look(child, isinstance(place, nn.ModuleList))

    for child in module.children():
        look(child, False)
    return found


def _fully_shard(root: Root, device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    whole = {parameter for parameter in root.parameters() if not parameter.dim()}  # FSDP2 shards no scalars
    places = [*units(root.module), root]
    for place in places:
        dtypes = {p.dtype for p in place.parameters() if p.requires_grad and p not in whole}
        if len(dtypes) > 1 and place is not root:
            raise ValueError(
                f"model.sharded needs one dtype in each block, this model has {sorted(map(str, dtypes))}: "
                "set model.weights to bfloat16, or save the base in one dtype"
            )
        # The root is sharded again after its forward too: the next merge is written into shards.
        fully_shard(
            place,
            mesh=mesh,
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=_reduced_in(dtypes)),
            ignored_params=whole,
        )
    for place in root.modules():
        if isinstance(place, FSDPModule):  # sums: the mean over processes is taken of K x G numbers, once
            place.set_gradient_divide_factor(1.0)
            place.set_force_sum_reduction_for_comms(True)


def _reduced_in(dtypes: set[torch.dtype]) -> torch.dtype | None:
    return torch.float32 if any(dtype.itemsize < 4 for dtype in dtypes) else None


def _to_device(root: Root, device: torch.device) -> None:
    """Storage for this process's shards; buffers keep their values."""
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
    """Bytes of parameters that each of N processes holds: 1/N, padded to whole rows; scalars whole."""
    return sum(_share(p, processes) * p.element_size() for p in module.parameters())


def pass_bytes(module: nn.Module, processes: int) -> dict[str, int]:
    """Bytes that enter the collectives of one forward and backward on each of N processes.

    `gathered`: its own shards, once forward and once backward; `reduced`: whole gradients of what is learned,
    in float32 or wider.
    """
    sharded = {p: _share(p, processes) for p in module.parameters() if p.dim()}
    gathered = sum(2 * numbers * p.element_size() for p, numbers in sharded.items())
    reduced = sum(
        processes * numbers * max(4, p.element_size()) for p, numbers in sharded.items() if p.requires_grad
    )
    return {"gathered": gathered, "reduced": reduced}


def _share(parameter: Tensor, processes: int) -> int:
    """Numbers of a parameter that each process holds."""
    rows = -(-parameter.shape[0] // processes) if parameter.dim() else 1
    return rows * parameter.shape[1:].numel()
