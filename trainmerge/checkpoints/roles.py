"""Ask the modules of a model what each of their parameters is: `task_vectors.roles`."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trainmerge.task_vectors.roles import Role

# Classes whose weights are ([E,] inputs, outputs), or [E, outputs, inputs], and that have no `is_transposed`
TRANSPOSED = {
    "Llama4TextExperts", "CsmCodebooksHead", "GroupedLinearLayer", "Gemma3MultiModalProjector",
    "T5Gemma2MultiModalProjector", "RecurrentGemmaRglru", "OmDetTurboLanguageBackbone", "XCLIPModel",
    "SwiftFormerEfficientAdditiveAttention", "InklingRelativeLogits", "Inkling2RelativePositionBias",
    "Inkling2LoopRelativePositionBias",
}  # fmt: skip
STACKED = {
    "JetMoeParallelExperts", "InklingSharedExperts", "MoshiFlexibleLinear",
    "KyutaiSpeechToTextFlexibleLinear", "LongcatFlashExperts",
}  # fmt: skip
FLAT = {"DbrxExpertGLU"}  # the matrices of all experts, one above the other, in two dimensions


def roles_of(model: nn.Module) -> dict[str, Role]:
    """Every parameter's role, by the first of its names. A weight tied to an embedding is an embedding."""
    roles: dict[int, Role] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            role = _role(module, name, parameter)
            if role == "embedding" or id(parameter) not in roles:
                roles[id(parameter)] = role
    return {name: roles[id(parameter)] for name, parameter in model.named_parameters()}


def place_role(role: Role, inside: str) -> Role:
    """The role of a tensor of the files, whose parameter has this one: it may be stored transposed."""
    turned: dict[Role, Role] = {"linear": "transposed", "transposed": "linear"}
    return turned.get(role, role) if inside.endswith(".T") else role


def _role(module: nn.Module, name: str, parameter: Tensor) -> Role:
    if parameter.dim() < 2 or name.endswith("bias"):
        return "vector"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    kind = type(module).__name__
    if kind in FLAT:
        return "flat"
    if isinstance(module, Conv1D) or kind in TRANSPOSED or getattr(module, "is_transposed", False):
        return "transposed"
    return "linear" if isinstance(module, nn.Linear) or _stacked(module, parameter) else "other"


def _stacked(module: nn.Module, parameter: Tensor) -> bool:
    """Whether it has one matrix (outputs x inputs) per expert of a mixture."""
    if parameter.dim() != 3:
        return False
    counted = getattr(module, "num_experts", None) == parameter.shape[0]
    return counted or hasattr(module, "is_transposed") or type(module).__name__ in STACKED
