"""A run's experts as one folder beside their base: `trainmerge export RUN OUT --as packed`.

Legend: `K` tasks.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainmerge.checkpoints.whole import PACKED
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.export.adapter_form import relative_error
from trainmerge.export.explain import Exported, write_export_manifest
from trainmerge.export.export import begin_export, check_no_buffers, merge_of
from trainmerge.export.merge_changes import merge_changes
from trainmerge.export.origins import without_local_origins
from trainmerge.export.public import public_manifest
from trainmerge.export.shards import CheckpointMerge
from trainmerge.export.task import TaskMerge, task_config
from trainmerge.packed.budget import choose_offers, offers
from trainmerge.packed.codec import Codec
from trainmerge.packed.form import PackedForm
from trainmerge.packed.parameter import Parameter
from trainmerge.packed.record import PackedRecord, TaskHead, entry
from trainmerge.packed.write import Shards, write_parameters
from trainmerge.run.folder import RunFolder
from trainmerge.run.hub_origins import origins
from trainmerge.system import distributed
from trainmerge.system.distributed import joined
from trainmerge.system.shared_output import agreed, staging_shared


@dataclass(frozen=True)
class Packing:
    """A run's experts, to be packed.

    Args:
        exported: The run.
        merge: Its merge.
        form: How they are packed.
    """

    exported: Exported
    merge: CheckpointMerge
    form: PackedForm

    @property
    def tasks(self) -> tuple[str, ...]:
        """The experts' names."""
        return self.exported.opened.task_vectors.experts

    def parameters(self) -> list[Parameter]:
        """Every parameter that some expert changes, with the run's merge of it."""
        changes = merge_changes(self.merge)
        deltas = self.exported.opened.task_vectors.deltas
        return [Parameter(name, delta, changes.get(name)) for name, delta in deltas.items()]

    def codecs(self, parameters: Sequence[Parameter], norms: Tensor, heads: int) -> dict[str, Codec | None]:
        """The codec of every parameter: the form's, or by its budget. `heads` are bytes that are spent."""
        if self.form.budget is None:
            return {parameter.name: self.form.chosen for parameter in parameters}
        base = self.merge.base
        whole = sum(info.nbytes for info in base.tensors.values())
        candidates = self.form.candidates(len(self.tasks))
        found = {
            parameter.name: list(offers(parameter, candidates, norms.clamp(min=1e-300)))
            for parameter in parameters
        }
        chosen = choose_offers(found, self.form.bytes(whole) - heads)
        return {name: offer.codec for name, offer in chosen.items()}

    def write(self, folder: Path, target: Path) -> dict[str, str]:
        """Write an empty folder that will be `target`; returns its weight files' SHA-256."""
        shards, heads = Shards(folder), self._heads()
        for task, (_, tensors) in heads.items():
            shards.add({f"h/{task}/{name}": tensor for name, tensor in tensors.items()})
        routed = self._router(shards)
        spent, parameters = shards.nbytes, self.parameters()
        norms = torch.stack([parameter.squares() for parameter in parameters]).sum(dim=0)
        codecs = self.codecs(parameters, norms, spent)
        scales, lost = write_parameters(parameters, codecs, self.tasks, shards)
        shards.add({f"a/{task}": scales[:, k].contiguous() for k, task in enumerate(self.tasks)})
        made, count = shards.close(), sum(parameter.shape.numel() for parameter in parameters)
        size = shards.nbytes - spent
        record = PackedRecord(
            base=self._base(target),
            tasks=self.tasks,
            tensors={
                parameter.name: entry(parameter.whole, codecs[parameter.name]) for parameter in parameters
            },
            options=self.form.to_json(),
            files=list(made),
            tied=self.merge.base.tied,
            bits=8 * size / max(1, count * len(self.tasks)),
            bytes=size,
            errors=dict(zip(self.tasks, map(relative_error, lost.tolist(), norms.tolist()), strict=True)),
            heads={task: head for task, (head, _) in heads.items()},
            router=routed,
        )
        (folder / PACKED).write_text(json.dumps(record.to_json(), indent=1) + "\n")
        return made

    def _base(self, target: Path) -> dict[str, object]:
        """Where the base is, from the folder `target` on, and its checksums."""
        opened = self.exported.opened
        place = opened.folders["base"]
        origin = origins({"base": place}).get("base")
        path = f"{origin.id}@{origin.revision}" if origin else os.path.relpath(place, target.resolve())
        return {"path": path, "sha256": opened.checksums["base"]}

    def _router(self, shards: Shards) -> dict[str, object] | None:
        """Fit the router and add its tensors, if one is wanted; its entry in `packed.json`."""
        if not self.form.router:
            return None
        from trainmerge.packed.fit_router import router_of  # imports transformers

        router, told = router_of(self.exported)
        shards.add(router.parts())
        return told

    def _heads(self) -> dict[str, tuple[TaskHead, Mapping[str, Tensor]]]:
        """Task -> its own head and the head's tensors, of experts that have one."""
        found: dict[str, tuple[TaskHead, Mapping[str, Tensor]]] = {}
        for task, head in self.exported.opened.own_heads.items():
            head.check()
            merge = TaskMerge.of(self.merge, head)
            tensors = {name: tensor.contiguous() for name, tensor in merge.own.items()}
            config = without_local_origins(json.dumps(task_config(merge)).encode())
            found[task] = TaskHead(dict(head.shared), json.loads(config)), tensors
        return found


def export_packed(
    run: str | Path,
    out: str | Path,
    form: PackedForm,
    overwrite: bool = False,
    coefficients: Coefficients | None = None,
) -> Path:
    """Write a run's experts, not its merge, as one folder beside the base: `load_packed` takes one by name.

    What the codecs share comes from the run's merge. One parameter is read at a time.

    Args:
        run: The run's folder.
        out: The folder to create.
        form: The codec, or a budget of bytes.
        overwrite: Replace `out` if it exists.
        coefficients: Replace the run's own.

    Raises:
        FileExistsError: `out` exists and `overwrite` is not set.
        ValueError: as `export_run`; a budget that is too small; a run with a chosen tokenizer.
    """
    run_folder, target = RunFolder(Path(run)), Path(out)
    with joined():
        exported = begin_export(run_folder, target, coefficients)
        if exported.opened.base.origin is not None:
            raise ValueError(
                f"{run_folder.path}: its merge has another vocabulary than the base, which a packed export "
                "does not hold: fit with the base's tokenizer"
            )
        with torch.no_grad(), staging_shared(target, overwrite) as folder, agreed():
            with distributed.rank_zero_first():
                merge = merge_of(run_folder, exported.recipe, exported.coefficients, exported.opened)
            check_no_buffers(merge, run_folder)
            if distributed.rank() == 0:
                made = Packing(exported, merge, form).write(folder, target)
                manifest = public_manifest(run_folder.read_manifest())
                write_export_manifest(folder, made, manifest, {"packed": form.to_json()})
    return target
