"""A fit of a mixture on several processes: the same coefficients, whole and in shards, and experts counted.

Four experts per layer: two processes have two each, three have 2, 2 and 0.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

import trainmerge as tm
from tests.bounds import fitted_bound
from tests.contracts import assert_same_bits
from tests.fitting.test_ranks import RATE, STEPS, world_fit
from tests.mixture_world import write_mixture
from tests.ranks import Ranks, join_group, run, sound
from trainmerge.checkpoints import load_meta_model
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.model.fsdp import shard_model
from trainmerge.model.merged_model import MergedModel

pytestmark = pytest.mark.long

FAMILIES = ("Qwen3-MoE", "DeepSeek-V3", "gpt-oss")  # the last has stacks in its files
GROUPINGS = {"kind": tm.Grouping(), "expert": tm.Grouping(mixture="expert"), "rows": tm.Grouping("chunk", 3)}


def recipe(root: Path, **changes: Any) -> tm.Recipe:
    experts = {n: tm.Expert(str(root / n), str(root / f"{n}.jsonl")) for n in "ab"}
    return tm.Recipe(str(root / "base"), experts, **changes)


def fits(root: Path, processes: int, sharded: bool) -> dict[str, Tensor]:
    """One process's part of fits of every family and grouping: the coefficients."""
    ended = {}
    for family in FAMILIES:
        for name, grouping in GROUPINGS.items():
            world, case = root / family, f"{family} {name}"
            folder = root / f"{processes}{sharded}" / case
            settings = {"recipe": recipe(world, grouping=grouping), "objective": tm.Alignment()}
            ended[case] = world_fit(world, folder, processes, sharded=sharded, **settings)
    return ended


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixtures")
    for family in FAMILIES:
        (root / family).mkdir()
        write_mixture(root / family, family)
    return root


def test_any_number_of_processes_ends_with_the_same_coefficients(worlds: Path) -> None:
    kinds = [(1, False), (2, False), (2, True), (3, True)]
    started = {kind: Ranks(kind[0], fits, worlds, *kind) for kind in kinds}
    ended = {kind: sound(ranks.join()) for kind, ranks in started.items()}
    (alone,) = ended[1, False]
    for kind, results in ended.items():
        for coefficients in results:
            for case, own in coefficients.items():
                assert torch.equal(own, results[0][case]), (kind, case)
                assert (own - alone[case]).abs().max() < fitted_bound(STEPS, RATE), (kind, case)
    for case, own in alone.items():
        assert (own - own[0, 0]).abs().max() > 1e-4, case  # something was learned


def one_hot(root: Path) -> dict[str, Tensor]:
    """This process's rows of the merge that is fine-tune b, and the tensors that they are of."""
    join_group()
    opened = recipe(root).open()
    loaded = load_meta_model(opened.base)
    shard_model(loaded, opened.base, opened.layout.learned, torch.device("cpu"))
    coefficients = Coefficients(("a", "b"), opened.layout, torch.tensor([[0.0], [1.0]]))
    merged = MergedModel(loaded.module, opened.task_vectors, coefficients, loaded.names)
    merged.materialise()
    dist.barrier()  # a rank that ended now would reset connections of others, which still make the mesh
    return {name: merged.placed.written(name).clone() for name in opened.task_vectors.deltas}


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_of_a_one_hot_merge_are_the_rows_of_that_fine_tunes_files(family: str, worlds: Path) -> None:
    want = load_file(worlds / family / "b" / "model.safetensors")
    parts = run(3, one_hot, worlds / family)
    for name in parts[0]:
        own = torch.cat([part[name] for part in parts if part[name].numel()])
        assert_same_bits(own, want[name])


def reached(root: Path, folder: Path, sharded: bool) -> tuple[set[str], list[str]]:
    """One process's part of a fit: the tensors of experts that a token reached, and warnings about others."""
    seen: list[set[str]] = []

    class Watched(tm.MergeModule):
        def on_train_end(self) -> None:
            seen.append(self.resident.merged.reached)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = {"recipe": recipe(root), "objective": tm.Alignment(), "steps": 1, "batch_size": 2}
        world_fit(root, folder, 2, sharded=sharded, kind=Watched, **settings)
    return seen[0], [str(w.message) for w in caught if "were reached by no" in str(w.message)]


@pytest.mark.parametrize("sharded", [False, True])
def test_experts_that_another_process_reached_or_has_count(
    sharded: bool, worlds: Path, tmp_path: Path
) -> None:
    root = worlds / "Qwen3-MoE"
    (one, said), (other, silent) = run(2, reached, root, tmp_path / f"{sharded}", sharded)
    assert one == other  # of the same set by now, also where each has other experts
    assert any("experts.0." in name for name in one)
    assert any("experts.3." in name for name in one)
    assert silent == []
    assert bool(said) == (len(one) < 24)
