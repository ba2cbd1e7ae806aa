"""Parameters know what they are in their layer: layers stored transposed, stacks of experts, and others.

Legend: `K` experts, `E` matrices in one parameter, `m x n` a matrix (outputs x inputs).
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, XLNetConfig
from transformers.pytorch_utils import Conv1D

import trainmerge as tm
from tests.methods import METHODS, applied, count_for, matrices, random, run, vectors
from tests.model_families import FAMILIES
from tests.task_families import DBRX
from trainmerge.checkpoints.roles import roles_of
from trainmerge.preprocess import Informed, apply, doge
from trainmerge.preprocess.subspace import outside_subspace, shared_subspaces
from trainmerge.task_vectors.delta import TaskVectors
from trainmerge.task_vectors.roles import Role

RANDOM = {"dare", "della"}
EXACT = [name for name in METHODS if name not in RANDOM]  # whose draws go by the place in the file
WHOLE = {  # one number per parameter, a stack's too
    "breadcrumbs", "karcher", "karcher-weights", "model-stock", "sce", "slerp", "slerp-task-vectors",
    "ties-parameter",
}  # fmt: skip
FORMULAS = [n for n, m in METHODS.items() if not isinstance(m, Informed) and n not in RANDOM | WHOLE]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doge, "PAPER_STEPS", 5)


def with_role(given: TaskVectors, name: str, role: Role) -> TaskVectors:
    return TaskVectors(given.experts, {**given.deltas, name: replace(given.deltas[name], role=role)})


def turned(given: TaskVectors, name: str) -> TaskVectors:
    """The same with one matrix stored inputs x outputs."""
    own = given.deltas[name]
    base = {n: d.base if n != name else d.base.mT.contiguous() for n, d in given.deltas.items()}
    taus = {n: d.dense() if n != name else d.dense().mT.contiguous() for n, d in given.deltas.items()}
    other = vectors(taus, base)
    assert own.base.shape[-2:] == other.deltas[name].base.shape[-2:][::-1]
    return with_role(other, name, "transposed")


@pytest.mark.parametrize("name", EXACT)
def test_a_layer_stored_transposed_gives_the_transposed_result(name: str) -> None:
    given = vectors(random(count_for(name)))
    want = applied(METHODS[name], with_role(given, "layer.weight", "linear"))
    got = applied(METHODS[name], turned(given, "layer.weight"))
    for parameter, result in want.items():
        other = got[parameter].mT if parameter == "layer.weight" else got[parameter]
        torch.testing.assert_close(other, result, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("role", ["linear", "transposed"])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_stack_of_experts_is_its_matrices_one_by_one(name: str, role: Role) -> None:
    count = count_for(name)
    parts = [torch.stack(matrices(*range(10 * e, 10 * e + count), shape=(6, 8))) for e in range(3)]
    bases = matrices(91, 92, 93, shape=(6, 8))
    given = vectors({"w": torch.stack(parts, 1)}, {"w": torch.stack(bases)})
    stacked = applied(METHODS[name], with_role(given, "w", role))["w"]
    alone = vectors({str(e): part for e, part in enumerate(parts)}, dict(zip("012", bases, strict=True)))
    alone = TaskVectors(alone.experts, {n: replace(d, role=role) for n, d in alone.deltas.items()})
    want = torch.stack(list(applied(METHODS[name], alone).values()), dim=1)
    torch.testing.assert_close(stacked, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(4, 9), (300, 600), (3, 5, 7)])  # the second is in two pieces
def test_della_ranks_the_weights_of_an_output(shape: tuple[int, ...]) -> None:
    method = tm.Della(0.5, 0.4)
    taus = torch.stack(matrices(0, 1, shape=shape))
    got = applied(method, with_role(vectors({"w": taus}), "w", "transposed"))["w"]
    keep = torch.stack([method.probabilities(tau.mT.contiguous()).mT for tau in taus])
    kept = got != 0
    torch.testing.assert_close(got[kept], (taus / keep)[kept])
    sides = [torch.stack([method.probabilities(tau) for tau in taus]), keep]
    assert not torch.allclose(*sides)
    assert 0.2 < float(kept.double().mean()) < 0.8


def test_a_stack_is_no_longer_averaged() -> None:
    taus = torch.stack([torch.stack(matrices(k, k + 7)) for k in range(3)])
    for method in (tm.Tsv(), tm.Wudi(), tm.OptMerge(), tm.Opcm(), tm.Doge(density=1.0)):
        result = run(method, {"experts": taus})["experts"]
        assert result.any()
        cosines = torch.cosine_similarity(result.flatten(1), taus.flatten(1))
        assert (cosines < 0.99).any()


def test_what_is_not_a_matrix_is_left_out() -> None:
    taus = torch.stack([torch.stack(matrices(k, k + 7)) for k in range(2)])
    for role in ("convolution", "vector", "other"):
        given = with_role(vectors({"w": taus}), "w", role)
        assert torch.equal(applied(tm.Tsv(), given)["w"], taus / 2)
        assert not applied(tm.Doge(), given)["w"].any()
    biases = torch.stack(matrices(0, 1, shape=(4, 6)))  # one row per expert of a mixture
    given = with_role(vectors({"b": biases}), "b", "vector")
    assert torch.equal(applied(tm.Wudi(), given)["b"], biases / 2)


def test_opcm_projects_linear_layers_only() -> None:
    """Embeddings are summed, as published; and what `exclude` names."""
    taus = {"embed": torch.stack(matrices(0, 1)), "w": torch.stack(matrices(2, 3))}
    given = with_role(with_role(vectors(taus), "w", "linear"), "embed", "embedding")
    for method, own in ((tm.Opcm(), given), (tm.Opcm(exclude=["embed"]), vectors(taus))):
        got = applied(method, own)
        assert torch.cosine_similarity(got["embed"].flatten(), taus["embed"].flatten(), dim=0) > 1 - 1e-12
        assert torch.cosine_similarity(got["w"][1].flatten(), taus["w"][1].flatten(), dim=0) < 0.999
    everything = sum(tau.square().sum((1, 2)) for tau in taus.values()).sqrt().mean()
    merged = sum(tau.sum(0).square().sum() for tau in got.values()).sqrt()
    torch.testing.assert_close(merged, everything)


@pytest.mark.parametrize("space", [tm.CoreSpace, tm.Knots, tm.Pico])
def test_a_method_in_a_space_leaves_out_what_it_leaves_out_alone(space: type) -> None:
    """By its own `exclude`, and by the role: OPCM sums embeddings."""
    taus = {"head": torch.stack(matrices(0, 1)), "w": torch.stack(matrices(2, 3))}
    stack = torch.stack([torch.stack(matrices(k, k + 5)) for k in range(2)])
    given = with_role(vectors({**taus, "experts": stack}), "head", "embedding")
    averaged = applied(space(tm.Tsv(exclude=["head", "experts"])), given)
    for name in ("head", "experts"):
        part, whole = averaged[name].flatten(1), given.deltas[name].dense().flatten(1)
        if space is not tm.Pico:  # which scales before and after
            torch.testing.assert_close(part, whole / 2)
            assert (torch.cosine_similarity(averaged["w"].flatten(1), taus["w"].flatten(1)) < 0.99).any()
    inside = space(tm.Opcm())
    assert not inside.applies_to("head", given.deltas["head"])
    if space is not tm.Pico:
        summed = applied(inside, given)["head"].flatten(1)
        assert (torch.cosine_similarity(summed, taus["head"].flatten(1)) > 1 - 1e-9).all()


def test_widen_weights_a_norm_by_its_own_changes() -> None:
    """softmax over the experts of |tau|, 1 above the mean of the expert: `compute_importance_scores`."""
    taus = torch.tensor([[0.1, 0.3, 0.2], [0.5, 0.1, 0.9]], dtype=torch.float64)
    weights = taus.softmax(0)  # all positive
    weights[0, 1] = weights[1, 2] = 1.0
    assert torch.equal(run(tm.Widen(), {"norm.weight": taus})["norm.weight"], taus * weights)


def test_widen_knows_embeddings_by_their_module() -> None:
    taus = torch.stack(matrices(0, 1, shape=(9, 4)))
    by_name = run(tm.Widen(), {"model.embed_tokens.weight": taus})["model.embed_tokens.weight"]
    given = with_role(vectors({"wte": taus}), "wte", "embedding")
    assert torch.equal(applied(tm.Widen(), given)["wte"], by_name)


def test_subspaces_are_of_outputs(tmp_path) -> None:
    taus = torch.stack(matrices(0, 1, shape=(6, 9)))
    gradient = matrices(5, shape=(6, 9))[0]
    one = shared_subspaces(with_role(vectors({"w": taus}), "w", "linear"), 3, tmp_path, "a")["w"]
    want = outside_subspace(gradient, one, "linear")
    flipped = with_role(vectors({"w": taus.mT.contiguous()}), "w", "transposed")
    other = shared_subspaces(flipped, 3, tmp_path, "b")["w"]
    got = outside_subspace(gradient.mT, other, "transposed").mT
    torch.testing.assert_close(got, want)
    assert (want.norm() / gradient.norm()) < 0.99
    stack = with_role(vectors({"w": torch.stack([taus, taus], 1)}), "w", "linear")
    both = shared_subspaces(stack, 3, tmp_path, "c")["w"]
    torch.testing.assert_close(outside_subspace(torch.stack([gradient] * 2), both, "linear")[1], want)


class Tied(nn.Module):
    """An embedding, an output layer tied to it, and one layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 9, bias=False)
        self.embed = nn.Embedding(9, 4)
        self.head.weight = self.embed.weight
        self.conv1d, self.conv = Conv1D(6, 4), nn.Conv1d(4, 6, 3)
        self.loose = nn.Parameter(torch.zeros(2, 3, 4))


def test_modules_are_asked() -> None:
    assert roles_of(Tied()) == {
        "head.weight": "embedding",
        "conv1d.weight": "transposed",
        "conv1d.bias": "vector",
        "conv.weight": "convolution",
        "conv.bias": "vector",
        "loose": "other",
    }


SIZES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 12, "vocab_size": 20, "num_local_experts": 4, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FUSED = {
    "gpt_oss": ("GptOssConfig", "transposed"),
    "llama4_text": ("Llama4TextConfig", "transposed"),
    "granitemoe": ("GraniteMoeConfig", "linear"),
    "mixtral": ("MixtralConfig", "linear"),
}


@pytest.mark.parametrize("family", FUSED)
def test_mixtures_say_how_their_experts_are_stored(family: str) -> None:
    name, role = FUSED[family]
    more = {"interleave_moe_layer_step": 1, "intermediate_size_mlp": 12} if family == "llama4_text" else {}
    config = getattr(transformers, name)(**SIZES, **more)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    roles = roles_of(model)
    stacks = {n: roles[n] for n, p in model.named_parameters() if p.dim() == 3}
    assert len(stacks) == 2
    assert set(stacks.values()) == {role}
    biases = {roles[n] for n, p in model.named_parameters() if p.dim() == 2 and n.endswith("bias")}
    assert biases <= {"vector"}
    assert roles["model.embed_tokens.weight"] == "embedding"
    assert roles["model.layers.0.self_attn.q_proj.weight"] == "linear"


def roles_of_family(name: str, **settings: object) -> dict[str, Role]:
    with torch.device("meta"):
        return roles_of(AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings)))


def test_experts_in_two_dimensions_are_left_out_by_name(tmp_path: Path) -> None:
    """DBRX has the matrices of all experts in one of two dimensions, and w2 is inputs x outputs."""
    roles = roles_of_family("DbrxConfig", **DBRX)
    flat = {name for name, role in roles.items() if role == "flat"}
    assert {name.rpartition(".")[2] for name in flat} == {"w1", "v1", "w2"}
    given = with_role(vectors({"mlp.w2": torch.stack(matrices(0, 1))}), "mlp.w2", "flat")
    with pytest.warns(UserWarning, match=r"stacks of experts in two dimensions \(mlp.w2; 100% of the task"):
        made = apply(given, [tm.Wudi()], tmp_path, "a")
    torch.testing.assert_close(made.deltas["mlp.w2"].dense(), given.deltas["mlp.w2"].dense() / 2)


def test_gates_by_blocks_are_stacks_of_inputs_times_outputs() -> None:
    name, settings = "RecurrentGemmaConfig", FAMILIES["RecurrentGemma"].settings
    roles = roles_of_family(name, **settings)
    gates = {role for n, role in roles.items() if n.endswith("gate_weight")}
    assert gates == {"transposed"}


def test_three_dimensions_alone_are_no_stack() -> None:
    """XLNet's attention has one matrix in three dimensions: width x heads x width of a head."""
    with torch.device("meta"):
        model = AutoModel.from_config(XLNetConfig(vocab_size=9, d_model=8, n_layer=1, n_head=2, d_inner=8))
    assert roles_of(model)["layer.0.rel_attn.q"] == "other"
