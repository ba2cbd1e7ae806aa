"""Both passes as hand-written Triton kernels: any number of parameters in one launch.

A table has each segment's addresses (a segment is a chunk of a parameter's rows), and as many programs as the
GPU runs at a time share the blocks of all segments, so that hundreds of parameters, including small ones,
take one launch. Dense task vectors are read in flat blocks; integers and low-rank terms in tiles, which never
become dense. Loads are 16 bytes wide where addresses allow. A term without weight is not read. The inner
products are summed in two stages of a fixed order, without atomics: the same bits in every run, on every GPU.

Checked in Triton's interpreter against eager, and compiled for sm_80, sm_90 and sm_100; not measured on a GPU
yet.

Legend: `K` experts, `C` chunks of one parameter, `S` segments, `P` blocks of all segments.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trainmerge.kernels.eager as eager
from trainmerge.kernels.calls import Merge, Product
from trainmerge.kernels.triton_device import inner_kernel, merge_kernel, sum_kernel
from trainmerge.kernels.triton_segments import (
    Segment,
    experts_in_order,
    merges_of,
    segments_of,
    supported,
)
from trainmerge.kernels.triton_tiles import inner_tiles_kernel, merge_tiles_kernel

MERGE_BLOCK, MERGE_WARPS = 1024, 4  # 8 elements per thread: 16 bytes of bfloat16, twice 16 of float32
INNER_BLOCK, INNER_WARPS = 2048, 8  # 8 elements per thread; 16 would spill registers at K = 8
TILE_WARPS, TILE_STAGES = 8, 1  # copies ahead of a product would take the registers of more programs
COLUMNS, RANKS = 128, 16  # of a tile; ranks of one product, the least that tensor cores take
ROWS, ROWS_OF_FACTORS = 32, 64  # a taller tile loads less of the right factors; with integers it is slower
SUM_BLOCK = 256
WARPS = 32  # of a multiprocessor, that a launch fills
INTERPRETED = 3  # programs without a GPU


def run_merges(merges: Sequence[Merge]) -> None:
    """`eager.weighted_sum` of each call, in one launch per mix of forms and dtypes."""
    groups: dict[tuple[Any, ...], list[Segment]] = {}
    for merge in merges:
        if not supported(merge.out, merge.base, merge.terms):
            eager.weighted_sum(*merge)
            continue
        for segment in merges_of(merge):
            groups.setdefault(segment.key, []).append(segment)
    for segments in groups.values():
        _launch_merge(segments)


def run_products(products: Sequence[Product]) -> list[Tensor]:
    """`eager.inner_products` of each call, in two launches per mix of forms and dtypes."""
    ours = [supported(p.grad, p.base, p.terms) and p.grad.numel() > 0 for p in products]
    sizes = [len(p.terms) * p.chunks if own else 0 for p, own in zip(products, ours, strict=True)]
    sums = torch.zeros(sum(sizes), device=products[0].grad.device)  # all results, concatenated
    results = []
    groups: dict[tuple[Any, ...], list[tuple[Segment, list[int]]]] = {}
    for product, own, begin, size in zip(products, ours, _starts(sizes), sizes, strict=True):
        if not own:
            results.append(eager.inner_products(*product))
            continue
        results.append(sums[begin : begin + size].view(len(product.terms), product.chunks))
        experts = experts_in_order(product.terms)
        for chunk, segment in enumerate(segments_of(product) if experts else []):
            places = [begin + k * product.chunks + chunk for k in experts]
            groups.setdefault(segment.key, []).append((segment, places))
    for members in groups.values():
        found = _launch_inner([segment for segment, _ in members])
        sums[torch.tensor([places for _, places in members], device=sums.device)] = found.T
    return results


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]


class Launch(NamedTuple):
    """The index tensors of a launch, on its device."""

    table: Tensor  # [S, addresses and sizes]
    bounds: Tensor  # [S + 1] each segment's first block
    weights: Tensor  # [S, K]
    blocks: int  # P


def _plan(segments: Sequence[Segment], block: int) -> Launch:
    device = segments[0].first.device
    counts = [_blocks(segment, block) for segment in segments]
    bounds = [0, *accumulate(counts)]
    table = torch.tensor([segment.row() for segment in segments])
    weights = torch.tensor([segment.weights for segment in segments], dtype=torch.float32)
    found = [_sent(tensor, device) for tensor in (table, torch.tensor(bounds), weights)]
    return Launch(found[0], found[1], found[2], bounds[-1])


def _blocks(segment: Segment, block: int) -> int:
    if not segment.tiled:
        return -(-segment.first.numel() // block)
    return -(-len(segment.first) // tile_of(segment)["ROWS"]) * -(-segment.width // COLUMNS)


def tile_of(segment: Segment) -> dict[str, int]:
    """The size of a segment's tiles."""
    return {"ROWS": ROWS if segment.codes else ROWS_OF_FACTORS, "COLUMNS": COLUMNS, "RANKS": RANKS}


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for what runs there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@cache
def _programs(device: torch.device, warps: int) -> int:
    """How many programs of so many warps a launch has at most: as many as run at a time."""
    if device.type != "cuda":
        return INTERPRETED
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * WARPS // warps


def options(segment: Segment, block: int, warps: int) -> dict[str, Any]:
    """Everything that a launch's kernel is compiled for."""
    if not segment.tiled:
        return {**segment.constants(), "BLOCK": block, "num_warps": warps}
    given = {"num_warps": TILE_WARPS, "num_stages": TILE_STAGES}
    return {**segment.constants(), **tile_of(segment), **given}


def _launch_merge(segments: Sequence[Segment]) -> None:
    kernel = merge_tiles_kernel if segments[0].tiled else merge_kernel
    given = options(segments[0], MERGE_BLOCK, MERGE_WARPS)
    plan = _plan(segments, MERGE_BLOCK)
    if plan.blocks:
        grid = (min(plan.blocks, _programs(plan.table.device, given["num_warps"])),)
        kernel[grid](plan.table, plan.bounds, plan.weights, len(segments), plan.blocks, **given)


def _launch_inner(segments: Sequence[Segment]) -> Tensor:
    """-> [K, S] float32."""
    kernel = inner_tiles_kernel if segments[0].tiled else inner_kernel
    given = options(segments[0], INNER_BLOCK, INNER_WARPS)
    plan = _plan(segments, INNER_BLOCK)
    experts, device = plan.weights.shape[1], plan.table.device
    partials = torch.empty(experts, plan.blocks, dtype=torch.float32, device=device)
    sums = torch.empty(experts, len(segments), dtype=torch.float32, device=device)
    grid = (min(plan.blocks, _programs(device, given["num_warps"])),)
    kernel[grid](plan.table, plan.bounds, partials, len(segments), plan.blocks, **given)
    sum_kernel[(len(segments), experts)](partials, plan.bounds, sums, plan.blocks, BLOCK=SUM_BLOCK)
    return sums.mul_(plan.weights.T)
