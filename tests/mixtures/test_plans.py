"""Plans of fewer experts against what their papers state, and identities.

Legend: `E` experts of a layer, `H` hidden size, `I` width of an expert, `R` tokens.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import silu

import trainmerge as tm
from tests.contracts import assert_same_bits
from tests.mixture_world import write_mixture
from tests.mixtures.test_shrink import texts
from trainmerge.checkpoints import open_checkpoint
from trainmerge.mixtures.camera import energies, expert_energies
from trainmerge.mixtures.dern import absorbed, nearest_neurons
from trainmerge.mixtures.layers import mixture_layers
from trainmerge.mixtures.msmoe import join_nearest, routed_alike
from trainmerge.mixtures.saliency import measure
from trainmerge.mixtures.submoe import k_means, projected

E = 6
DICE = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_mixture(tmp_path_factory.mktemp("plans"), "gpt-oss", num_local_experts=E)
    texts(made)
    return made


def test_m_smoe_joins_what_is_routed_alike() -> None:
    logits = torch.tensor([[1.0, 0.1, 1.0, 0.0], [0.0, 1.0, 0.2, 1.0], [2.0, 0.0, 1.9, 0.1]]).double()
    alike = routed_alike(logits.T @ logits)
    want = torch.nn.functional.cosine_similarity(logits.T[:, None], logits.T[None], dim=-1)
    torch.testing.assert_close(alike, (want + 1) / 2)
    assert join_nearest([0, 1], alike) == [[0, 2], [1, 3]]
    assert join_nearest([2, 3], alike) == [[2, 0], [3, 1]]


def test_sub_moe_finds_separate_clusters_and_keeps_each_filled() -> None:
    centres = 10 * torch.eye(3, 5).double()
    outputs = centres[[0, 1, 2, 0, 1, 0]] + 0.1 * torch.randn(6, 5, generator=DICE).double()
    usage = torch.tensor([5.0, 1.0, 2.0, 9.0, 4.0, 3.0]).double()
    assert k_means(outputs, usage, 3) == [[2], [3, 0, 5], [4, 1]]
    assert k_means(outputs, usage, 6) == [[0], [1], [2], [3], [4], [5]]
    same = k_means(torch.ones(4, 2).double(), usage[:4], 3)
    assert sorted(number for group in same for number in group) == [0, 1, 2, 3]
    assert len(same) == 3


def test_sub_moe_projects_the_mean_as_the_truncated_joint_decomposition_does() -> None:
    members = [torch.randn(4, 7, generator=DICE) for _ in range(3)]
    weights = torch.tensor([0.5, 0.3, 0.2])
    mean = sum(w * own for w, own in zip(weights, members, strict=True))
    torch.testing.assert_close(projected(mean, members, 4), mean, rtol=1e-4, atol=1e-5)
    u, s, v = torch.linalg.svd(torch.cat(members, dim=1), full_matrices=False)
    right = sum(w * own for w, own in zip(weights, v.split(7, dim=1), strict=True))
    for rank in (1, 2):
        want = u[:, :rank] @ (s[:rank, None] * right[:rank])
        torch.testing.assert_close(projected(mean, members, rank), want, rtol=1e-4, atol=1e-5)


def test_dern_returns_neurons_to_where_they_came_from() -> None:
    kept = [torch.randn(5, 8, generator=DICE) for _ in range(2)]
    order = torch.randperm(10, generator=DICE)[:5]
    mixed = torch.cat(kept)[order]  # a dropped expert of neurons of both: no order of whole experts says this
    features = [torch.nn.functional.normalize(own, dim=1) for own in (*kept, mixed)]
    (home,) = nearest_neurons(features[:2], features[2:])
    assert torch.equal(home, order)
    for found, want in zip(absorbed(kept, [mixed], [home], [2.0, 1.0, 3.0]), kept, strict=True):
        torch.testing.assert_close(found, want)
    other = torch.randn(5, 8, generator=DICE)
    found = torch.cat(absorbed(kept, [other], [home], [2.0, 2.0, 1.0]))
    want = torch.cat(kept)
    want[order] = (2 * want[order] + other) / 3
    torch.testing.assert_close(found, want)
    untouched = [i for i in range(10) if i not in order.tolist()]
    assert torch.equal(found[untouched], torch.cat(kept)[untouched])


def test_camera_energies_are_those_of_the_formula() -> None:
    phi, down = torch.randn(9, 4, generator=DICE), torch.randn(3, 4, generator=DICE)
    found, none = energies([phi, phi[:0]], [down, down], alpha=0.9)
    for i in range(4):
        own = phi[:, i].double()
        want = down[:, i].double().norm() ** 2 * (0.1 * own.norm() ** 2 + 0.9 * own.abs().max() ** 2)
        torch.testing.assert_close(found[i], want)
    assert torch.equal(none, torch.zeros(4).double())


def test_camera_reads_the_experts_own_tokens(tmp_path: Path) -> None:
    made = write_mixture(tmp_path, "Mixtral", num_local_experts=E)
    base = open_checkpoint(made / "base")
    layer = mixture_layers(base)[0]
    own = measure(base, [layer], *texts(made))[layer.prefix]
    want = torch.zeros(E, dtype=torch.float64)
    for e in range(E):
        gate, up, down = (layer.read(base, e, kind) for kind in ("gate", "up", "down"))
        rows = [
            weight * silu(gate @ x) * (up @ x)
            for x, chosen, weights in zip(own.states, own.chosen, own.weights, strict=True)
            for number, weight in zip(chosen.tolist(), weights, strict=True)
            if number == e
        ]
        if rows:
            squares = torch.stack(rows).double().square()
            want[e] = (down.double().square().sum(0) * (0.1 * squares.sum(0) + 0.9 * squares.amax(0))).sum()
    torch.testing.assert_close(expert_energies(base, layer, own), want, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("plan", ["m-smoe", "sub-moe", "dern", "camera"])
def test_every_plan_writes_stacks_that_its_file_writes_again(plan: str, root: Path, tmp_path: Path) -> None:
    lines = str(root / "texts.jsonl")
    out = tm.shrink(root / "base", tmp_path / "out", 4, lines, plan)
    written = json.loads((out / "trainmerge_groups.json").read_text())
    assert written["method"] == plan
    again = tm.shrink(root / "base", tmp_path / "again", 4, lines, str(out / "trainmerge_groups.json"))
    dropped = tm.shrink(root / "base", tmp_path / "reap", 4, lines)
    made, twice, plain = (load_file(own / "model.safetensors") for own in (out, again, dropped))
    for key, own in made.items():
        assert own.shape == plain[key].shape
        assert_same_bits(own, twice[key])
        if ".experts." not in key and ".router." not in key:
            assert_same_bits(own, plain[key])
    if plan == "dern":  # the same experts stay, and take something from those that do not
        assert {k for k, own in made.items() if not torch.equal(own, plain[k])} == {
            k for k in made if "experts.gate_up" in k or k.endswith("experts.down_proj")
        }


def test_all_experts_of_dern_are_the_input(root: Path, tmp_path: Path) -> None:
    out = tm.shrink(root / "base", tmp_path / "out", E, str(root / "texts.jsonl"), "dern")
    made, want = (load_file(own / "model.safetensors") for own in (out, root / "base"))
    for key, own in want.items():
        assert_same_bits(made[key], own)


def test_ranks_project_and_other_plans_refuse_them(root: Path, tmp_path: Path) -> None:
    lines = str(root / "texts.jsonl")
    full = tm.shrink(root / "base", tmp_path / "full", 3, lines, "sub-moe")
    low = tm.shrink(root / "base", tmp_path / "low", 3, lines, "sub-moe", rank=2)
    layer = mixture_layers(open_checkpoint(root / "base"))[0]
    groups = json.loads((full / "trainmerge_groups.json").read_text())["layers"][layer.prefix]
    place = next(i for i, group in enumerate(groups) if len(group) > 1)
    one, other = (layer.read(open_checkpoint(own), place, "gate") for own in (full, low))
    assert int(torch.linalg.matrix_rank(other.double(), rtol=1e-4)) == 2
    assert int(torch.linalg.matrix_rank(one.double(), rtol=1e-4)) > 2
    for options, words in (
        ({"plan": "ream", "rank": 2}, "--rank is for the plan sub-moe"),
        ({"plan": "dern", "steps": 5}, "another plan than dern"),
        ({"plan": "sub-moe", "rank": 2, "steps": 5}, "leave out --rank"),
    ):
        with pytest.raises(ValueError, match=words):
            tm.shrink(root / "base", tmp_path / "out", 3, lines, **options)
    assert not (tmp_path / "out").exists()
