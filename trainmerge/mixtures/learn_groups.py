"""Coefficients of the members in their groups, and the router's rows, learned under the routing as deployed.

With q the centroid of a group, its other members e, and m the kinds of matrices:

    W^m = W^m_q + sum_e a_(e, m) (P_e W^m_e - W^m_q)        R = R_q + D_q

a = D = 0 drops the members. D is free: the tokens of an expert that is gone are shared among all that are
left, not only within the group that took its weights. The loss is the squared error of the layer's routed
output on what the larger model's router read, with the smaller model's own router and experts. Some of the
tokens are held out: the step with the least error on them is kept, so there it is never worse than dropping.

Legend: `M` groups, `J` other members of the largest, `H` hidden size, `S` tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trainmerge.mixtures.experts import Experts
from trainmerge.mixtures.layers import MixtureLayer
from trainmerge.mixtures.shrunk import LayerCoefficients, Shrunk
from trainmerge.model.routing import choice_of
from trainmerge.task_vectors.places import parameter_of, view

RATE = 0.02  # of Adam: of a coefficient, and of a router's numbers in units of their root mean square
HELD_OUT = 0.25  # of the tokens
EVERY = 10  # steps between looks at the held-out tokens


@dataclass(frozen=True)
class Errors:
    """|y' - y| / |y| of a layer's routed output on held-out tokens."""

    dropped: float
    merged: float
    learned: float


@dataclass(frozen=True)
class Student:
    """One layer of the smaller model, on the meta device.

    Args:
        router: Its router.
        experts: Its experts.
        places: Tensor of the smaller model's files -> the parameter of `experts`, or a place in one.
    """

    router: nn.Module
    experts: Experts
    places: Mapping[str, str]


def learn_layer(
    shrunk: Shrunk, layer: MixtureLayer, student: Student, steps: int
) -> tuple[LayerCoefficients, Errors]:
    """The coefficients of one layer after `steps` of Adam on all tokens that are not held out."""
    own, groups = shrunk.measured[layer.prefix], shrunk.groups[layer.prefix]
    count = round(len(own.states) * (1 - HELD_OUT))
    states, wanted = own.states.float(), own.routed.float()
    task = _Layer(shrunk, layer, student)
    width = max(len(group) for group in groups) - 1
    experts = torch.zeros(len(layer.kinds), len(groups), width)
    start = {name: shrunk.rows(layer, name, LayerCoefficients(experts)) for name in layer.routers}
    rows = {name: torch.zeros(own.shape, requires_grad=True) for name, own in start.items() if moves(name)}
    sizes = {name: float(start[name].float().square().mean().sqrt()) or 1.0 for name in rows}
    learned: list[dict[str, Any]] = [{"params": [experts]}]
    learned += [{"params": [own], "lr": RATE * sizes[name]} for name, own in rows.items()]
    solver = torch.optim.Adam(learned, lr=RATE)

    def error(found: LayerCoefficients) -> float:
        with torch.no_grad():
            out = task(task.stacks(found), found, states[count:])
        return float((out - wanted[count:]).norm() / wanted[count:].norm())

    def copied() -> LayerCoefficients:
        return LayerCoefficients(experts.clone(), {name: own.detach().clone() for name, own in rows.items()})

    best = copied()
    dropped = least = error(best)
    for step in range(1, steps + 1):
        now = LayerCoefficients(experts, rows)
        stacks = {name: own.requires_grad_(True) for name, own in task.stacks(now).items()}
        solver.zero_grad()
        with torch.enable_grad():
            loss = (task(stacks, now, states[:count]) - wanted[:count]).square().sum(-1).mean()
            loss.backward()  # type: ignore[no-untyped-call]
        experts.grad = task.inner_products({name: own.grad for name, own in stacks.items()}, experts)
        solver.step()
        if (step % EVERY == 0 or step == steps) and (found := error(now)) < least:
            least, best = found, copied()
    return best, Errors(dropped, error(shrunk.saliency_coefficients(layer)), least)


def moves(name: str) -> bool:
    """Whether a router's tensor is learned; the correction of the load, which has no gradient, is not."""
    return not name.endswith("e_score_correction_bias")


class _Layer:
    """The routed output of the smaller layer, as a function of its stacks and its router."""

    def __init__(self, shrunk: Shrunk, layer: MixtureLayer, student: Student) -> None:
        self.shrunk, self.layer, self.student = shrunk, layer, student
        self.groups = shrunk.groups[layer.prefix]
        self.first = {
            (kind, place): layer.read(shrunk.base, group[0], kind).float()
            for kind in layer.kinds
            for place, group in enumerate(self.groups)
        }
        self.apart = {
            (kind, place, number): shrunk.members.aligned(layer, kind, group[0], member).float()
            - self.first[kind, place]
            for kind in layer.kinds
            for place, group in enumerate(self.groups)
            for number, member in enumerate(group[1:])
        }

    def stacks(self, coefficients: LayerCoefficients) -> dict[str, Tensor]:
        """The experts' parameters, float32."""
        found = {
            name: torch.empty(parameter.shape, dtype=torch.float32)
            for name, parameter in self.student.experts.named_parameters()
        }
        for index, kind in enumerate(self.layer.kinds):
            for place, group in enumerate(self.groups):
                part = self._part(found, place, kind)
                part.copy_(self.first[kind, place])
                for number in range(len(group) - 1):
                    part.add_(
                        self.apart[kind, place, number],
                        alpha=float(coefficients.experts[index, place, number]),
                    )
        return found

    def inner_products(self, slopes: Mapping[str, Tensor | None], like: Tensor) -> Tensor:
        """The gradient of the experts' coefficients: <dL/dW, P W_e - W_q>."""
        given = {name: slope for name, slope in slopes.items() if slope is not None}
        found = torch.zeros_like(like)
        for index, kind in enumerate(self.layer.kinds):
            for place, group in enumerate(self.groups):
                part = self._part(given, place, kind)
                for number in range(len(group) - 1):
                    found[index, place, number] = (part * self.apart[kind, place, number]).sum()
        return found

    def _part(self, stacks: Mapping[str, Tensor], place: int, kind: str) -> Tensor:
        part = self.layer.expert(place, kind)
        inside = self.student.places[parameter_of(part)]
        return view(part, view(inside, stacks[parameter_of(inside)]))

    def __call__(
        self, stacks: Mapping[str, Tensor], coefficients: LayerCoefficients, states: Tensor
    ) -> Tensor:
        """The routed output [S, H] of states [S, H]."""
        rows = {
            name.rpartition(".")[2]: self.shrunk.rows(self.layer, name, coefficients).float()
            for name in self.layer.routers
        }
        choice = choice_of(self.student.router, states, functional_call(self.student.router, rows, (states,)))
        given = (states, choice.experts, choice.weights.float())
        out: Tensor = functional_call(self.student.experts, dict(stacks), given)
        return out


def students_of(
    module: nn.Module, names: Mapping[str, str], layers: Sequence[MixtureLayer]
) -> dict[str, Student]:
    """Each layer of the smaller model on the meta device; `names` are the places of its files' tensors."""
    found = {}
    for layer in layers:
        block = names[layer.weight].rpartition(".")[0].rpartition(".")
        places = {
            name: inside.removeprefix(f"{block[0]}.")
            for name, inside in names.items()
            if inside.startswith(f"{block[0]}.experts.")
        }
        router, experts = (module.get_submodule(f"{block[0]}.{name}") for name in (block[2], "experts"))
        found[layer.prefix] = Student(router, Experts(experts), places)
    return found
