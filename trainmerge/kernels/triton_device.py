"""The Triton programs of `triton_kernels`: each processes one block of one segment.

A segment is a chunk of a parameter; its row of the table has the addresses of its tensors: the output (or the
gradient), the origin, `MODELS` models used as differences from it, `TAUS` differences.

Legend: `K` = MODELS + TAUS experts, `S` segments, `P` programs.
"""

import triton
import triton.language as tl


@triton.jit
def _at(row, i, offsets, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to the elements of the row's i-th tensor."""
    # The hint must be on the pointer: on the loaded integer, Triton drops it and loads 4 bytes at a time.
    return tl.multiple_of(tl.load(row + i).to(tl.pointer_type(DTYPE)), ALIGN) + offsets


@triton.jit
def _load(row, i, offsets, n, DTYPE: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr):
    """A block of the row's i-th tensor in float32."""
    pointers = _at(row, i, offsets, DTYPE, ALIGN)
    if MASKED:  # masked loads are narrow, because the mask's length is unknown: only in the last block
        return tl.load(pointers, mask=offsets < n, other=0.0).to(tl.float32)
    else:
        return tl.load(pointers).to(tl.float32)


@triton.jit
def _merge_block(
    row,
    weights,
    offsets,
    n,
    MODELS: tl.constexpr,
    TAUS: tl.constexpr,
    FIRST: tl.constexpr,
    MODEL: tl.constexpr,
    TAU: tl.constexpr,
    ALIGN: tl.constexpr,
    MASKED: tl.constexpr,
):
    origin = _load(row, 1, offsets, n, MODEL, ALIGN, MASKED)
    total = origin
    for k in tl.static_range(MODELS):
        weight = tl.load(weights + k)
        if weight != 0.0:
            total += weight * (_load(row, 2 + k, offsets, n, MODEL, ALIGN, MASKED) - origin)
    for k in tl.static_range(TAUS):
        weight = tl.load(weights + MODELS + k)
        if weight != 0.0:
            total += weight * _load(row, 2 + MODELS + k, offsets, n, TAU, ALIGN, MASKED)
    target = _at(row, 0, offsets, FIRST, ALIGN)
    if MASKED:
        tl.store(target, total.to(FIRST), mask=offsets < n)
    else:
        tl.store(target, total.to(FIRST))


@triton.jit
def merge_kernel(
    table,
    sizes,
    segments,
    blocks,
    weights,
    MODELS: tl.constexpr,
    TAUS: tl.constexpr,
    FIRST: tl.constexpr,
    MODEL: tl.constexpr,
    TAU: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one segment: origin + sum weights (model - origin) + sum weights tau."""
    program = tl.program_id(0)
    segment = tl.load(segments + program)
    row, own = table + segment * (2 + MODELS + TAUS), weights + segment * (MODELS + TAUS)
    n, first = tl.load(sizes + segment), tl.load(blocks + program) * BLOCK
    offsets = first + tl.arange(0, BLOCK)
    if first + BLOCK <= n:
        _merge_block(row, own, offsets, n, MODELS, TAUS, FIRST, MODEL, TAU, ALIGN, False)
    else:
        _merge_block(row, own, offsets, n, MODELS, TAUS, FIRST, MODEL, TAU, ALIGN, True)


@triton.jit
def _inner_block(
    row,
    partials,
    stride,
    offsets,
    n,
    MODELS: tl.constexpr,
    TAUS: tl.constexpr,
    FIRST: tl.constexpr,
    MODEL: tl.constexpr,
    TAU: tl.constexpr,
    ALIGN: tl.constexpr,
    MASKED: tl.constexpr,
):
    gradient = _load(row, 0, offsets, n, FIRST, ALIGN, MASKED)
    if MODELS > 0:
        base = _load(row, 1, offsets, n, MODEL, ALIGN, MASKED)
        for k in tl.static_range(MODELS):
            tau = _load(row, 2 + k, offsets, n, MODEL, ALIGN, MASKED) - base
            tl.store(partials + k * stride, tl.sum(gradient * tau))
    for k in tl.static_range(TAUS):
        tau = _load(row, 2 + MODELS + k, offsets, n, TAU, ALIGN, MASKED)
        tl.store(partials + (MODELS + k) * stride, tl.sum(gradient * tau))


@triton.jit
def inner_kernel(
    table,
    sizes,
    segments,
    blocks,
    partials,
    MODELS: tl.constexpr,
    TAUS: tl.constexpr,
    FIRST: tl.constexpr,
    MODEL: tl.constexpr,
    TAU: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one segment -> partials [K, P]: its part of every inner product, in float32."""
    program = tl.program_id(0)
    segment = tl.load(segments + program)
    row, own, stride = table + segment * (2 + MODELS + TAUS), partials + program, tl.num_programs(0)
    n, first = tl.load(sizes + segment), tl.load(blocks + program) * BLOCK
    offsets = first + tl.arange(0, BLOCK)
    if first + BLOCK <= n:
        _inner_block(row, own, stride, offsets, n, MODELS, TAUS, FIRST, MODEL, TAU, ALIGN, False)
    else:
        _inner_block(row, own, stride, offsets, n, MODELS, TAUS, FIRST, MODEL, TAU, ALIGN, True)


@triton.jit
def sum_kernel(partials, bounds, sums, programs, BLOCK: tl.constexpr):
    """Partials [K, P] -> sums [K, S]: each segment's blocks in their order, in float64."""
    segment, k = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partials + k * programs + at, mask=at < last, other=0.0).to(tl.float64)
    tl.store(sums + k * tl.num_programs(0) + segment, tl.sum(total).to(tl.float32))
