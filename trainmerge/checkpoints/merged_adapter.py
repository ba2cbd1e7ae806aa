"""Adapters whose update is not low-rank: peft merges them into a copy of the base, saved to disk.

DoRA, PiSSA, trained biases or whole modules, and whatever else peft can merge, exactly as peft merges it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from trainmerge.checkpoints.adapter import ROOT, Adapter
from trainmerge.checkpoints.meta_model import quiet, shorten
from trainmerge.checkpoints.model import load_model
from trainmerge.checkpoints.parameters import Parameters
from trainmerge.checkpoints.sources import FullSource, Source
from trainmerge.system.disk_space import check_free_space
from trainmerge.system.safetensors_file import sha256, write_safetensors
from trainmerge.system.workspace import cached, digest


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter as merged weights, written once to `workspace` and mapped."""

    base: Parameters
    adapter: Adapter
    ignore: Sequence[str]
    workspace: Path | None

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
        return json.dumps([contents, files, base.config, list(self.ignore), versions], sort_keys=True)

    def _merged(self, workspace: Path) -> dict[str, Tensor]:
        """The base's tensor name -> merged weight, for those that differ from the base."""
        path, base = self.adapter.path, self.base
        loaded = load_model(base.checkpoint, self.ignore)
        before = {name for name, _ in loaded.module.named_parameters()}
        try:
            with quiet(), TemporaryDirectory(dir=workspace, prefix=".adapter-") as folder:
                _rewrite(self.adapter, Path(folder))
                wrapped = PeftModel.from_pretrained(loaded.module, folder, torch_device="cpu")
                self._check_loaded(wrapped)
                merged = dict(wrapped.merge_and_unload().named_parameters())
        except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError, KeyError) as error:
            raise ValueError(f"{path}: peft cannot merge it into {base.checkpoint.path}: {error}") from error
        changed = sorted(before ^ merged.keys())
        if changed:
            raise ValueError(
                f"{path}: merging it changes the base's parameters, {shorten(changed)}: the adapter unties "
                "the head, or repeats layers. Untie the base first, or remove the adapter."
            )
        tensors = {name: merged[parameter] for parameter, name in base.files.items()}
        return {n: t for n, t in tensors.items() if not torch.equal(t, base.checkpoint.read(n))}

    def _check_loaded(self, wrapped: PeftModel) -> None:
        """Raise ValueError for tensors that peft would silently drop."""
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        unused = [key for key in self.adapter.keys if ROOT + key not in state and ".base_layer." not in key]
        if unused:
            raise ValueError(f"peft does not use {shorten(unused)}")
        missing = [
            key for key in state if ".lora_" in key and key.removeprefix(ROOT) not in self.adapter.keys
        ]
        if missing:
            raise ValueError(f"{shorten(missing)} are missing from the adapter")

    def _write(self, file: Path, tensors: dict[str, Tensor]) -> None:
        check_free_space(file.parent, sum(tensor.nbytes for tensor in tensors.values()))
        specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        write_safetensors(file, specs, tensors.items(), {"adapter": self.adapter.path.name})


def _rewrite(adapter: Adapter, folder: Path) -> None:
    """The adapter without ignored tensors, under the base's names, for peft to load."""
    words = {word for key in adapter.keys for word in key.split(".")}
    modules = adapter.config.get("modules_to_save")
    kept = [name for name in modules or [] if name.split(".")[-1] in words] or None
    # A task type would add the heads that were removed.
    config = {**adapter.config, "modules_to_save": kept, "task_type": None, "auto_mapping": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    specs = {ROOT + key: (adapter.info(key).dtype, adapter.info(key).shape) for key in adapter.keys}
    tensors = ((ROOT + key, adapter.read(key)) for key in adapter.keys)
    write_safetensors(folder / "adapter_model.safetensors", specs, tensors)
