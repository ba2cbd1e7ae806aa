"""The base's modules that a LoRA can change, and peft's own opinion of a configuration for them."""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import getsource
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainmerge.checkpoints.adapter_claims import claimed
from trainmerge.checkpoints.adapter_names import ROOT
from trainmerge.checkpoints.adapter_promises import saved_tensors
from trainmerge.checkpoints.meta_model import build_meta_model, quiet
from trainmerge.checkpoints.output import output_of
from trainmerge.checkpoints.parameters import Parameters, open_parameters
from trainmerge.checkpoints.reader import Checkpoint
from trainmerge.system.text import reason
from trainmerge.task_vectors.places import is_place

Kind = Literal["linear", "transposed", "embedding", "convolution"]
TASKS = {  # kind of output -> peft's task_type, where its wrapper adds no module of its own
    "causal language model": "CAUSAL_LM",
    "sequence-to-sequence model": "SEQ_2_SEQ_LM",
    "model without an output layer": "FEATURE_EXTRACTION",
}
KINDS: dict[type[nn.Module], Kind] = {  # a subclass with a forward of its own is none of them
    nn.Linear: "linear",
    Conv1D: "transposed",
    nn.Embedding: "embedding",
    # of one group: the product of a convolution and one of 1 x 1
    nn.Conv1d: "convolution",
    nn.Conv2d: "convolution",
    nn.Conv3d: "convolution",
}
UNCALLED = (nn.modules.linear.NonDynamicallyQuantizableLinear,)  # of nn.MultiheadAttention


class LoraTarget(NamedTuple):
    """A module whose weight a LoRA can change, and how peft stores the factors."""

    module: str
    kind: Kind

    def names(self) -> tuple[str, str]:
        """peft's names of A and B in an adapter's file."""
        if self.kind == "embedding":
            return f"{ROOT}{self.module}.lora_embedding_A", f"{ROOT}{self.module}.lora_embedding_B"
        return f"{ROOT}{self.module}.lora_A.weight", f"{ROOT}{self.module}.lora_B.weight"


@dataclass(frozen=True)
class LoraTargets:
    """The tensors of a base's files, as modules of its class.

    Args:
        folder: The base's.
        modules: Tensor -> the module whose weight it is, of those that a LoRA can change.
        parameters: Tensor -> the parameter's name in the model; experts that share one are left out.
        every: All modules' names.
        task_type: peft's name of the task, if its wrapper adds no module.
        model_class: The class of the model, and where it is from.
    """

    folder: Path
    modules: Mapping[str, LoraTarget]
    parameters: Mapping[str, str]
    every: Sequence[str]
    task_type: str | None
    model_class: tuple[str, str]

    def patterns(self, chosen: Iterable[str]) -> list[str] | str:
        """peft's `target_modules` for exactly these modules: last parts of names, or whole names.

        A regular expression only where a whole name is the end of another module's.
        """
        wanted = set(chosen)
        ends = sorted({name.rpartition(".")[2] for name in wanted})
        whole = sorted(wanted)
        for names in (ends, whole):
            if {name for name in self.every if _matches(name, names)} == wanted:
                return names
        return "|".join(name.replace(".", r"\.") for name in whole)

    def check(self, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
        """Assert that peft, given this configuration, expects tensors of exactly these names and shapes.

        Raises:
            ValueError: peft refuses these modules.
        """
        own = LoraConfig(**{**config, "task_type": None, "auto_mapping": None})
        try:
            with quiet(), torch.device("meta"):
                expected = saved_tensors(get_peft_model(build_meta_model(self.folder), own))
        except ValueError as error:
            raise ValueError(
                f"{self.folder}: peft has no LoRA of these modules: {reason(error)}. Leave them out of the "
                "merge (recipe.grouping.exclude, or --ignore of extract), or export a checkpoint"
            ) from error
        made = {name: tuple(shape) for name, shape in shapes.items()}
        wanted = {name: tuple(shape) for name, shape in expected.items()}
        assert made == wanted, f"peft expects other tensors: {sorted(made.items() ^ wanted.items())[:4]}"


def lora_targets(base: Checkpoint, ignore: Sequence[str] = ()) -> LoraTargets:
    """The modules of a base that a LoRA can change, from headers and config.json.

    Left out are modules that share their weight with another one, because a LoRA of one side would change
    the other's tensor too, modules whose weight is used without calling them, and those that peft takes for
    experts of a mixture.
    """
    frame = open_parameters(base, ignore)
    model = frame.meta_model
    output = output_of(base.path)
    return LoraTargets(
        base.path,
        _modules(frame),
        {name: parameter for parameter, name in frame.files.items() if not is_place(parameter)},
        [name for name, _ in model.named_modules() if name],
        TASKS.get(output.kind) if output.reads == "tokens" else None,
        (type(model).__name__, type(model).__module__),
    )


def _modules(frame: Parameters) -> dict[str, LoraTarget]:
    users: dict[int, list[LoraTarget | None]] = {}
    inside = dict(frame.meta_model.named_modules())
    for name, module in inside.items():
        parent, _, own = name.rpartition(".")
        for leaf, parameter in module.named_parameters(recurse=False):
            called = leaf == "weight" and name and not _reads_weight(inside[parent], own)
            kind = _kind(module) if called else None
            users.setdefault(id(parameter), []).append(LoraTarget(name, kind) if kind else None)
    owners = {name: id(parameter) for name, parameter in frame.meta_model.named_parameters()}
    whole = {file: name for name, file in frame.files.items() if not is_place(name)}
    found = {file: users[owners[parameter]] for file, parameter in whole.items()}
    alone = {file: own[0] for file, own in found.items() if len(own) == 1 and own[0] is not None}
    taken = claimed(frame.meta_model, [target.module for target in alone.values()])
    return {file: target for file, target in alone.items() if target.module not in taken}


def _kind(module: nn.Module) -> Kind | None:
    """What peft would make of it, if it computes what a module of that kind does."""
    if isinstance(module, UNCALLED) or getattr(module, "groups", 1) != 1:
        return None
    return next((kind for base, kind in KINDS.items() if type(module).forward is base.forward), None)


def _reads_weight(parent: nn.Module, child: str) -> bool:
    """Whether a module's code computes with a child's weight without calling it (Mamba's `dt_proj`).

    peft would not be asked then, so its LoRA would change nothing. Reading the dtype, or setting it, is fine.
    """
    use = re.compile(
        rf"self\.{re.escape(child)}\.weight\b(?!\.(?:dtype|device|shape|size|data)\b)(?!\s*=[^=])"
    )
    return any(
        use.search(line) and "isinstance(" not in line for line in _source(cast(Hashable, type(parent)))
    )


@cache
def _source(kind: Hashable) -> tuple[str, ...]:
    """The lines of a class; none if no file has it."""
    try:
        return tuple(getsource(cast(type, kind)).splitlines())
    except (OSError, TypeError):
        return ()


def _matches(module: str, names: Iterable[str]) -> bool:
    """peft's rule for a list of names."""
    return any(module == name or module.endswith(f".{name}") for name in names)
