"""The parts of a model that run one after the other: its blocks, and large layers outside them."""

from torch import nn


def units(module: nn.Module) -> list[nn.Module]:
    """Numbered blocks, and embeddings and linear layers outside them.

    A module that shares a weight with another (tied embeddings) is none.
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
