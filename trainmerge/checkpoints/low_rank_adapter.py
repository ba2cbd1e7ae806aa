"""peft adapters as sources: low-rank where the update is `scale * up @ down`, merged weights elsewhere.

LoRA (Hu et al., 2021): W + s B A, with s = alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski, 2023).
Names, transposes and s are peft's own: the adapter is injected into the base's modules without storage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import Tensor

from trainmerge.checkpoints.adapter import Adapter, open_adapter
from trainmerge.checkpoints.merged_adapter import MergedAdapter
from trainmerge.checkpoints.meta_model import build_meta_model, quiet, shorten
from trainmerge.checkpoints.parameters import Parameters
from trainmerge.checkpoints.sources import LowRankSource, Source

# These do not change the form scale * up @ down. Any other field must have its default.
LINEAR_FIELDS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout",
    "fan_in_fan_out", "use_rslora", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "modules_to_save",  # its tensors, unless ignored, are found in the file
    "init_lora_weights",
}  # fmt: skip
LINEAR_STARTS = (True, False, "gaussian")  # the others change the base's weights, or may
BASE_LAYER = ".base_layer.weight"  # peft saves a copy of an embedding that it adapts


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
    dense: MergedAdapter

    def sources(self) -> dict[str, Source]:
        """The base's tensor name -> the places of its update's factors."""
        for key in self.adapter.keys:
            if key.endswith(BASE_LAYER):
                name = self.base.file_of(key.removesuffix(BASE_LAYER) + ".weight")
                if name and not torch.equal(self.adapter.read(key), self.base.checkpoint.read(name)):
                    return self.dense.sources()
        return {name: self._source(factor) for name, factor in self.factors.items()}

    def _source(self, factor: Factor) -> Source:
        file, keys = self.adapter.info(factor.up).file, self.adapter.keys
        return LowRankSource(str(file), keys[factor.up], keys[factor.down], factor.transposed, factor.scale)


def plan_adapter(
    base: Parameters, path: Path, ignore: Sequence[str], allow_pickle: bool, workspace: Path | None
) -> LowRankAdapter | MergedAdapter:
    """The expert of the adapter at `path`, low-rank or merged, from headers alone.

    Raises ValueError, with one line per mismatch, if it has another base, if peft does not support it, or if
    it needs `workspace` and that is None.
    """
    adapter = open_adapter(base, path, ignore, allow_pickle)
    _check_start(adapter)
    dense = MergedAdapter(base, adapter, ignore, workspace)
    reason = _not_linear(adapter)
    if reason is None:
        factors, reason = _factors(base, adapter)
    if reason is None:
        return LowRankAdapter(base, adapter, factors, dense)
    if workspace is None:
        raise ValueError(
            f"{path}: {reason}, so its update is not plainly low-rank; set a workspace folder for its merged "
            "weights"
        )
    return dense


def _check_start(adapter: Adapter) -> None:
    """Raise ValueError if the adapter was trained on a base that every load draws anew."""
    start = adapter.config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith("pissa_niter"):
        raise ValueError(
            f"{adapter.path / 'adapter_config.json'}: init_lora_weights is {start!r}: a random factorisation "
            "of the base, which peft draws anew at every load, so the weights that this adapter was trained "
            "on are lost. Convert it where it was trained: model.save_pretrained(FOLDER, "
            "path_initial_model_for_weight_conversion=FOLDER_OF_THE_ADAPTER_BEFORE_TRAINING) writes a plain "
            "LoRA of twice the rank; or train with init_lora_weights='pissa', which is not random"
        )


def _not_linear(adapter: Adapter) -> str | None:
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
    ends = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", BASE_LAYER)
    whole = [key for key in adapter.keys if not key.endswith(ends)]
    return f"it contains {shorten(whole)}" if whole else None


def _factors(base: Parameters, adapter: Adapter) -> tuple[dict[str, Factor], str | None]:
    """Each adapted tensor's factors, by peft's own layers; or the reason why the update is not low-rank."""
    meta_model = build_meta_model(base.checkpoint.path)
    owners = {id(parameter): name for name, parameter in meta_model.named_parameters()}
    try:
        with quiet(), torch.device("meta"):
            config = adapter.peft_config(modules_to_save=None, task_type=None, init_lora_weights=True)
            get_peft_model(meta_model, config)  # inserts its layers into `meta_model`
    except (ValueError, TypeError) as error:
        raise ValueError(f"{adapter.path}: does not match the base: {error}".replace("\n", " ")) from error
    factors: dict[str, Factor] = {}
    expected: dict[str, torch.Size] = {}
    for name, layer in meta_model.named_modules():
        if not isinstance(layer, lora.LoraLayer):
            continue
        if not isinstance(layer, lora.Linear | lora.Embedding) or layer.lora_variant:
            return {}, f"{name} is adapted as {type(layer).__name__}"
        parts = _parts(name, layer)
        expected |= {key: tensor.shape for key, tensor in parts.items()}
        file = base.files.get(owners[id(layer.get_base_layer().weight)])
        if file in factors:
            return {}, f"two adapted modules share {file}"
        if file is not None:  # None: excluded by `ignore`
            down, up = parts
            flip = isinstance(layer, lora.Embedding) or bool(layer.fan_in_fan_out)
            scale = float(layer.scaling["default"])
            factors[file] = Factor(down, up, True, scale) if flip else Factor(up, down, False, scale)
    _check_tensors(adapter, expected)
    return factors, None


def _parts(name: str, layer: lora.Linear | lora.Embedding) -> dict[str, Tensor]:
    """Key -> tensor of A [r, in], then of B [out, r]."""
    ends = ["lora_embedding_A", "lora_embedding_B"]
    if not isinstance(layer, lora.Embedding):
        ends = ["lora_A.weight", "lora_B.weight"]
    tensors = {key.replace(".default", ""): tensor for key, tensor in layer.named_parameters()}
    return {f"{name}.{end}": tensors[end] for end in ends}


def _check_tensors(adapter: Adapter, expected: Mapping[str, torch.Size]) -> None:
    file = adapter.path
    copies = {key for key in adapter.keys if key.endswith(BASE_LAYER)}
    problems = [
        f"{file}: {key} {tuple(shape)} is missing"
        for key, shape in expected.items()
        if key not in adapter.keys
    ]
    for key in adapter.keys:
        got = tuple(adapter.info(key).shape)
        if key not in expected and key not in copies:
            problems.append(f"{file}: {key} {got} does not belong to a module that its config adapts")
        elif key in expected and got != tuple(expected[key]):
            problems.append(f"{file}: {key} is {got}, this base needs {tuple(expected[key])}: another base?")
    if problems:
        raise ValueError("\n".join(problems))
