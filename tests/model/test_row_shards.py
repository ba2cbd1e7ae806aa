"""Rows of a delta, process by process, add up to the whole; and the model that is loaded by rows."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from tests.bounds import aligned, assert_within
from tests.collectives import CountBytes
from tests.conftest import MakeDelta
from tests.contracts import inner_bound, merge_bound
from tests.mixture_world import write_mixture
from tests.ranks import join_group, run
from tests.world import bert, llama
from trainmerge.checkpoints import load_meta_model, load_model, open_checkpoint
from trainmerge.kernels import Difference, ExpertWeight, LowRank, Untouched, inner_products, run_merges
from trainmerge.model.fsdp import pass_bytes, shard_bytes, shard_model
from trainmerge.model.row_shards import DeltaShard, local, shard_rows
from trainmerge.model.units import units
from trainmerge.system import distributed
from trainmerge.task_vectors.places import is_place

FORMS = (ExpertWeight, Difference, LowRank, Untouched)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize(("shape", "chunks"), [((7, 5), 3), ((5, 4), 5), ((1, 6), 1), ((12, 2, 3), 4)])
def test_rows_of_all_processes_are_the_whole(
    random_delta: MakeDelta, shape: tuple[int, ...], chunks: int, count: int
) -> None:
    delta = random_delta(shape, FORMS, torch.float64)
    weights = torch.rand(len(FORMS), chunks, dtype=torch.float64)
    whole, grad = torch.empty(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    delta.merge(whole, weights)
    parts, inner = torch.full_like(whole, torch.nan), torch.zeros(len(FORMS), chunks, dtype=torch.float64)
    for process in range(count):
        rows = shard_rows(shape[0], process, count)
        part = DeltaShard(delta.rows(rows), rows, shape[0])
        run_merges(list(part.merges(parts[rows], weights)))
        for columns, product in part.products(grad[rows], chunks):
            inner[:, columns] += inner_products(*product)
    assert_within(parts, whole, 2 * merge_bound(delta, weights))
    assert_within(inner, delta.inner(grad, chunks), 2 * inner_bound(delta, grad, chunks))


def test_one_matrix_per_expert_is_not_sharded_and_says_so_before_a_process_group_exists(
    tmp_path: Path,
) -> None:
    base = open_checkpoint(write_mixture(tmp_path) / "base")
    with pytest.raises(
        ValueError, match=r"model\.sharded: model\.layers\.0\.mlp\.experts\.0\..* without model"
    ):
        shard_model(load_meta_model(base), base, [], torch.device("cpu"))
    whole = AutoModelForCausalLM.from_pretrained(base.path)
    whole.save_pretrained(tmp_path / "stacks", save_original_format=False)  # the error's remedy
    assert not any(map(is_place, load_meta_model(open_checkpoint(tmp_path / "stacks")).names.values()))


def shards_of(base: Path, inputs: torch.Tensor, learned: bool) -> dict[str, object]:
    """Shard a checkpoint over the processes; logits, and the bytes of a forward and backward."""
    join_group()
    checkpoint = open_checkpoint(base)
    names = list(checkpoint.tensors) if learned else []
    loaded = load_meta_model(checkpoint)
    root = shard_model(loaded, checkpoint, names, torch.device("cpu"))
    wanted = pass_bytes(loaded.module, distributed.world_size())
    held = sum(local(p).untyped_storage().nbytes() for p in loaded.module.parameters())
    promised = shard_bytes(loaded.module, distributed.world_size())
    with CountBytes() as counted:
        output = root(loaded.module, inputs)
        torch.stack([part.square().mean() for part in output.to_tuple()]).sum().backward()
    return {
        "output": output[0].detach(),
        "gathered": (counted.bytes["_allgather_base_"], wanted["gathered"]),
        "reduced": (counted.bytes["_reduce_scatter_base_"], wanted["reduced"]),
        "held": (held, promised),
        "units": len(units(loaded.module)),
    }


@pytest.mark.parametrize(("name", "blocks"), [("tied", 2), ("untied", 4), ("bert", 6)])
def test_a_sharded_model_says_what_the_whole_one_says(tmp_path: Path, name: str, blocks: int) -> None:
    model = bert() if name == "bert" else llama(tied=name == "tied")
    model.save_pretrained(tmp_path)
    inputs = torch.arange(12).view(2, 6)
    kind = AutoModel if name == "bert" else AutoModelForCausalLM
    with torch.no_grad():
        whole = aligned(kind.from_pretrained(tmp_path)).eval()(inputs)[0]
        ours = aligned(load_model(open_checkpoint(tmp_path)).module)(inputs)[0]
    assert torch.equal(whole, ours)
    for result in run(3, shards_of, tmp_path, inputs, True):
        assert torch.equal(result["output"], whole)
        for what in ("gathered", "reduced", "held"):
            measured, computed = result[what]
            assert measured == computed, what
        assert result["units"] == blocks
