"""Rows of a delta, process by process, add up to the whole; and the model that is loaded by rows."""

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from tests.bounds import aligned, assert_within
from tests.collectives import CountBytes
from tests.conftest import MakeDelta
from tests.contracts import inner_bound, merge_bound
from tests.model_families import FAMILIES
from tests.ranks import join_group, run
from tests.world import bert, llama
from trainmerge.checkpoints import load_meta_model, load_model, open_checkpoint
from trainmerge.kernels import Difference, ExpertWeight, LowRank, Untouched, inner_products, run_merges
from trainmerge.model.fsdp import pass_bytes, shard_bytes, shard_model
from trainmerge.model.row_shards import DeltaShard, local, shard_rows
from trainmerge.model.units import units
from trainmerge.system import distributed
from trainmerge.task_vectors.places import rows_within, view

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


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "place", ["w[0,0:3]", "w[3,3:6]", "w[2,:,0:2].T", "w[1,0::2]", "w[:].T", "w[1:3]", "w[:,0:3]"]
)
def test_the_rows_of_a_place_are_in_the_shards_of_its_parameter(place: str, count: int) -> None:
    parameter = torch.arange(4 * 6 * 5).view(4, 6, 5)
    whole, parts = view(place, parameter), []
    for process in range(count):
        rows = shard_rows(4, process, count)
        own, of, inside = rows_within(place, tuple(parameter.shape), rows)
        assert of == len(whole)
        if inside:
            assert torch.equal(view(inside, parameter[rows]), whole[own])
            parts.append(whole[own])
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("place", "shape"), [("w[:].T", (4, 6)), ("w[0:2,0:3].T", (4, 6)), ("w[0::2]", (4,))]
)
def test_a_place_whose_rows_are_columns_is_not_sharded(place: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be sharded by rows"):
        rows_within(place, shape, slice(0, 2))


def shards_of(base: Path, inputs: torch.Tensor, learned: bool) -> dict[str, object]:
    """Shard a checkpoint over the processes; logits, and the bytes of a forward and backward."""
    join_group()
    checkpoint = open_checkpoint(base)
    loaded = load_meta_model(checkpoint)
    names = list(loaded.names) if learned else []
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


@pytest.mark.parametrize(
    ("name", "blocks"), [("tied", 2), ("untied", 4), ("bert", 6), ("Qwen3-MoE", 4), ("DeepSeek-V3", 4)]
)
def test_a_sharded_model_says_what_the_whole_one_says(tmp_path: Path, name: str, blocks: int) -> None:
    known = {"bert": bert, "tied": llama, "untied": partial(llama, tied=False)}
    model = known[name]() if name in known else FAMILIES[name].build()  # 4 experts, on 3 processes
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
