"""peft adapters as sources: low-rank where the update is `scale * up @ down`, merged weights elsewhere.

LoRA (Hu et al., 2021): W + s B A, with s = alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski, 2023).
Names, transposes and s are peft's own: the adapter is injected into the base's modules without storage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import nn

from trainmerge.checkpoints.adapter import Adapter, open_adapter
from trainmerge.checkpoints.adapter_promises import Promises, check_promises
from trainmerge.checkpoints.merged_adapter import MergedAdapter
from trainmerge.checkpoints.meta_model import shorten
from trainmerge.checkpoints.parameters import Parameters
from trainmerge.checkpoints.sources import FullSource, LowRankSource, Source

# These do not change the form scale * up @ down. Any other field must have its default.
LINEAR_FIELDS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout",
    "fan_in_fan_out", "use_rslora", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "modules_to_save",  # its tensors, unless ignored, are found in the file
    "init_lora_weights",
}  # fmt: skip
LINEAR_STARTS = (True, False, "gaussian")  # the others change the base's weights, or may
LOST = {  # starts that take a part out of the base's weights, and what a load lacks to do so again
    "pissa_niter": "a random factorisation of the base, which peft draws anew at every load",
    "corda": "a factorisation of the base by its inputs on texts that are not in the adapter",
    "lora_ga": "a factorisation of the base's gradients on texts that are not in the adapter",
}
ADAPTED = ".base_layer."  # in the key of an adapted embedding's copy


@dataclass(frozen=True)
class Factor:
    """One adapted parameter: the places of its two factors, and how they form the update."""

    up: str  # key of B, or of A where the update is transposed
    down: str
    transposed: bool
    scale: float


@dataclass(frozen=True)
class LowRankAdapter:
    """An adapter used as low-rank, unless the embedding it was trained on differs from the base's."""

    base: Parameters
    adapter: Adapter
    factors: Mapping[str, Factor]  # the base's tensor -> its factors
    copies: Sequence[str]  # keys of embeddings that were saved whole
    dense: MergedAdapter

    def sources(self) -> dict[str, Source]:
        """The base's tensor name -> the places of its update's factors, or of its copy in the adapter.

        Raises ValueError if the adapter's copies of tied embeddings differ.
        """
        found: dict[str, Source] = {name: self._source(factor) for name, factor in self.factors.items()}
        for key, name in self._changed_copies().items():
            if ADAPTED in key or name in self.factors:  # both its base and its update
                return self.dense.sources()
            found[name] = FullSource(str(self.adapter.info(key).file), self.adapter.keys[key])
        return found

    def _changed_copies(self) -> dict[str, str]:
        """Key -> the base's tensor, of copies that differ from the base's."""
        changed: dict[str, str] = {}
        for key in self.copies:
            name = self.base.file_of(key.replace(ADAPTED, "."))
            if name and not torch.equal(self.adapter.read(key), self.base.checkpoint.read(name)):
                changed[key] = name
        for one, other in combinations(changed, 2):
            if changed[one] == changed[other] and not torch.equal(*map(self.adapter.read, (one, other))):
                raise ValueError(
                    f"{self.adapter.file}: {one} and {other} differ, the base ties them: untie the base "
                    "first (save it with tie_word_embeddings false and both weights)"
                )
        return changed

    def _source(self, factor: Factor) -> Source:
        file, keys = self.adapter.info(factor.up).file, self.adapter.keys
        return LowRankSource(str(file), keys[factor.up], keys[factor.down], factor.transposed, factor.scale)


def plan_adapter(
    base: Parameters,
    path: Path,
    ignore: Sequence[str],
    allow_pickle: bool,
    workspace: Path | None,
    shared_vocabulary: bool = False,
    whole_head: bool = False,
    every_row: bool = False,
) -> LowRankAdapter | MergedAdapter:
    """The expert of the adapter at `path`, low-rank or merged, from headers alone.

    With `every_row`, merged embeddings keep the rows that the base lacks.

    Raises ValueError, with one line per mismatch, if it has another base, if its tensors are not those that
    its config promises, if peft does not support it, or if it needs `workspace` and that is None.
    """
    adapter = open_adapter(base, path, ignore, allow_pickle, whole_head)
    _check_start(adapter)
    promises = check_promises(base, adapter, ignore, shared_vocabulary or every_row)
    dense = MergedAdapter(base, adapter, promises, ignore, workspace, every_row)
    reason = _not_linear(adapter, promises)
    factors: dict[str, Factor] = {}
    if reason is None and promises.model is not None:
        factors, reason = _factors(base, adapter, promises.model)
    elif reason is None:
        reason = "peft cannot build it without weights"
    if reason is None:
        return LowRankAdapter(base, adapter, factors, promises.copies, dense)
    if workspace is None:
        raise ValueError(
            f"{path}: {reason}, so its update is not plainly low-rank; set a workspace folder for its merged "
            "weights"
        )
    return dense


def _check_start(adapter: Adapter) -> None:
    """Raise ValueError if the adapter was trained on a changed base that a load does not make again."""
    start = adapter.config.get("init_lora_weights")
    lost = next((why for kind, why in LOST.items() if str(start).startswith(kind)), None)
    if lost is not None:
        raise ValueError(
            f"{adapter.path / 'adapter_config.json'}: init_lora_weights is {start!r}: {lost}, so the weights "
            "that this adapter was trained on are lost. Convert it where it was trained: "
            "model.save_pretrained(FOLDER, path_initial_model_for_weight_conversion="
            "FOLDER_OF_THE_ADAPTER_BEFORE_TRAINING) writes a plain LoRA of twice the rank; or train with "
            "init_lora_weights='pissa', which is not random"
        )


def _not_linear(adapter: Adapter, promises: Promises) -> str | None:
    """Why, by config or tensors, the update is not of the form scale * up @ down; None if it is."""
    config = adapter.peft_config()
    if type(config) is not LoraConfig:
        return f"peft_type is {adapter.config['peft_type']}"
    defaults = asdict(LoraConfig())
    for name, value in asdict(config).items():
        if name not in LINEAR_FIELDS and value != defaults[name]:
            return f"{name} is {value!r}"
    if config.init_lora_weights not in LINEAR_STARTS:
        return f"init_lora_weights is {config.init_lora_weights!r}"
    if promises.rows is not None and any(ADAPTED in key for key in promises.copies):
        return "it adapts an embedding of another vocabulary"
    ends = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    whole = [key for key in adapter.keys if not key.endswith(ends) and key not in promises.copies]
    return f"it contains {shorten(whole)}" if whole else None


def _factors(base: Parameters, adapter: Adapter, model: nn.Module) -> tuple[dict[str, Factor], str | None]:
    """Each adapted tensor's factors, by peft's own layers; or the reason why the update is not low-rank."""
    parameters = dict(base.meta_model.named_parameters(remove_duplicate=False))
    owners = {id(parameter): name for name, parameter in base.meta_model.named_parameters()}
    factors: dict[str, Factor] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, lora.LoraLayer):
            continue
        if not isinstance(layer, lora.Linear | lora.Embedding) or layer.lora_variant:
            return {}, f"{name} is adapted as {type(layer).__name__}"
        file = base.files.get(owners[id(parameters[f"{name}.weight"])])
        if file in factors:
            return {}, f"two adapted modules share {file}"
        down, up = _parts(name, layer)
        if file is not None and up in adapter.keys:  # otherwise excluded by `ignore`
            flip = isinstance(layer, lora.Embedding) or bool(layer.fan_in_fan_out)
            scale = float(layer.scaling["default"])
            factors[file] = Factor(down, up, True, scale) if flip else Factor(up, down, False, scale)
    return factors, None


def _parts(name: str, layer: lora.Linear | lora.Embedding) -> tuple[str, str]:
    """The keys of A [r, in] and of B [out, r]."""
    if isinstance(layer, lora.Embedding):
        return f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight"
