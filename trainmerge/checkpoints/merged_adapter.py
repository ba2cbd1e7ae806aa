"""Adapters whose update is not low-rank: peft merges them into a copy of the base, saved to disk.

DoRA, PiSSA, trained biases or whole modules, and whatever else peft can merge, exactly as peft merges it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from torch import Tensor

from trainmerge.checkpoints.adapter import Adapter
from trainmerge.checkpoints.adapter_promises import Promises, adapter_problems, modules_to_save, saved_tensors
from trainmerge.checkpoints.meta_model import quiet, shorten
from trainmerge.checkpoints.model import load_model
from trainmerge.checkpoints.parameters import Parameters
from trainmerge.checkpoints.sources import FullSource, Source, match_rows
from trainmerge.system.atomic import temporary_folder
from trainmerge.system.disk_space import check_free_space
from trainmerge.system.safetensors_file import sha256, write_safetensors
from trainmerge.system.workspace import cached, digest
from trainmerge.task_vectors.places import parameter_of, view


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter as merged weights, written once to `workspace` and mapped."""

    base: Parameters
    adapter: Adapter
    promises: Promises
    ignore: Sequence[str]
    workspace: Path | None
    every_row: bool = False  # also those of tokens that the base lacks

    def sources(self) -> dict[str, Source]:
        """The base's tensor name -> the merged weight, where merging changed it.

        Raises ValueError if there is no workspace, or peft cannot merge this adapter into this base.
        """
        if self.workspace is None:
            raise ValueError(
                f"{self.adapter.path}: its embedding differs from the base's, so its update is not plainly "
                "low-rank; set a workspace folder for its merged weights"
            )
        path = self.workspace / f"adapter-{digest(self._made_from(), length=24)}.safetensors"
        file = cached(path, lambda path: self._write(path, self._merged(path.parent)))
        return {name: FullSource(str(path), name) for name in file.tensors}

    def _made_from(self) -> str:
        """What the merged weights depend on: the adapter's contents, the base files' sizes and times."""
        folder, base = self.adapter.path, self.base.checkpoint
        contents = {path.name: sha256(path) for path in sorted(folder.glob("adapter_*")) if path.is_file()}
        files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in base.files]
        versions = [peft.__version__, torch.__version__]
        more = ["every row"] if self.every_row else []
        return json.dumps([contents, files, base.config, list(self.ignore), versions, *more], sort_keys=True)

    def _merged(self, workspace: Path) -> dict[str, Tensor]:
        """The base's tensor name -> merged weight, for those that differ from the base."""
        path, base = self.adapter.path, self.base
        loaded = load_model(base.checkpoint, self.ignore)
        before = {name for name, _ in loaded.module.named_parameters()}
        try:
            with quiet(), temporary_folder(workspace, "adapter") as folder:
                self._rewrite(folder)
                if self.promises.rows is not None:  # new rows are the adapter's own
                    resize: Any = loaded.module
                    resize.resize_token_embeddings(self.promises.rows, mean_resizing=False)
                wrapped = PeftModel.from_pretrained(loaded.module, folder, torch_device="cpu")
                self._check_loaded(wrapped)
                merged = dict(wrapped.merge_and_unload().named_parameters())
        except Exception as error:  # of many types: peft has dozens of kinds
            reason = str(error) or type(error).__name__
            raise ValueError(f"{path}: peft cannot merge it into {base.checkpoint.path}: {reason}") from error
        changed = sorted(before ^ merged.keys())
        if changed:
            raise ValueError(
                f"{path}: merging it changes the base's parameters, {shorten(changed)}: the adapter unties "
                "the head, or repeats layers. Use an untied copy of the base (`trainmerge.untie(BASE, COPY)` "
                "in Python), or leave the adapter out."
            )
        read = base.checkpoint.read
        fit = (lambda weight, _: weight) if self.every_row else match_rows
        tensors = {
            name: fit(view(own, merged[parameter_of(own)]), read(name)) for own, name in base.files.items()
        }
        return {name: tensor for name, tensor in tensors.items() if not torch.equal(tensor, read(name))}

    def _check_loaded(self, wrapped: PeftModel) -> None:
        """Raise ValueError for tensors that peft would silently drop, or start anew."""
        expected = saved_tensors(wrapped)
        if problems := adapter_problems(self.adapter, expected, self.ignore, self.promises.copies):
            raise ValueError("; ".join(problems))

    def _rewrite(self, folder: Path) -> None:
        """The adapter without ignored tensors, under the base's names, for peft to load."""
        adapter = self.adapter
        kept = modules_to_save(self.base, adapter, self.ignore)
        # A task type would add the heads that were removed.
        config = {**adapter.config, "modules_to_save": kept, "task_type": None, "auto_mapping": None}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        infos = {adapter.peft_name(key): adapter.info(key) for key in adapter.keys}
        specs = {name: (info.dtype, info.shape) for name, info in infos.items()}
        tensors = ((adapter.peft_name(key), adapter.read(key)) for key in adapter.keys)
        write_safetensors(folder / "adapter_model.safetensors", specs, tensors)

    def _write(self, file: Path, tensors: dict[str, Tensor]) -> None:
        check_free_space(file.parent, sum(tensor.nbytes for tensor in tensors.values()))
        specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        write_safetensors(file, specs, tensors.items(), {"adapter": self.adapter.path.name})
