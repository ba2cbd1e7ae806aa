"""The Triton programs of dense task vectors, and what they share with those of other forms (`triton_tiles`).

A segment is a chunk of a parameter; its row of the table has the addresses of its tensors: the output (or the
gradient), the origin, `MODELS` models used as differences from it, `TAUS` differences; and its size. All
segments' blocks are numbered in one row: `bounds` [S + 1] has each segment's first. A program processes an
equal share of consecutive blocks, so that a launch has as many programs as a GPU runs at a time, whatever
number of parameters there is.

Legend: `K` = MODELS + TAUS experts, `S` segments, `P` blocks of all segments.
"""

import triton
import triton.language as tl


@triton.jit
def share(total):
    """The first of this program's blocks, and the one after its last."""
    each = tl.cdiv(total, tl.num_programs(0))
    first = tl.program_id(0) * each
    return first, tl.minimum(first + each, total)


@triton.jit
def segment_of(bounds, segments, block):
    """The segment that a block belongs to: the last one that begins at it or before; by bisection."""
    low, high = tl.program_id(0) * 0, tl.program_id(0) * 0 + segments
    while high - low > 1:
        middle = (low + high) // 2
        after = tl.load(bounds + middle) <= block
        low, high = tl.where(after, middle, low), tl.where(after, high, middle)
    return low


@triton.jit
def next_segment(bounds, segment, block):
    """The same from the segment of the block before."""
    while tl.load(bounds + segment + 1) <= block:
        segment += 1
    return segment


@triton.jit
def address(row, i, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """The row's i-th address as a pointer."""
    # The hint must be on the pointer: on the loaded integer, Triton drops it and loads 4 bytes at a time.
    return tl.multiple_of(tl.load(row + i).to(tl.pointer_type(DTYPE)), ALIGN)


@triton.jit
def _load(row, i, offsets, n, DTYPE: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr):
    """A block of the row's i-th tensor in float32."""
    pointers = address(row, i, DTYPE, ALIGN) + offsets
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
    target = address(row, 0, FIRST, ALIGN) + offsets
    if MASKED:
        tl.store(target, total.to(FIRST), mask=offsets < n)
    else:
        tl.store(target, total.to(FIRST))


@triton.jit(do_not_specialize=["segments", "total"])
def merge_kernel(
    table,
    bounds,
    weights,
    segments,
    total,
    MODELS: tl.constexpr,
    TAUS: tl.constexpr,
    FIRST: tl.constexpr,
    MODEL: tl.constexpr,
    TAU: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some blocks: origin + sum weights (model - origin) + sum weights tau."""
    begin, end = share(total)
    segment = segment_of(bounds, segments, begin)
    for block in range(begin, end):
        segment = next_segment(bounds, segment, block)
        row, own = table + segment * (3 + MODELS + TAUS), weights + segment * (MODELS + TAUS)
        n, first = tl.load(row + 2 + MODELS + TAUS), (block - tl.load(bounds + segment)) * BLOCK
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


@triton.jit(do_not_specialize=["segments", "total"])
def inner_kernel(
    table,
    bounds,
    partials,
    segments,
    total,
    MODELS: tl.constexpr,
    TAUS: tl.constexpr,
    FIRST: tl.constexpr,
    MODEL: tl.constexpr,
    TAU: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some blocks -> partials [K, P]: their part of every inner product, in float32."""
    begin, end = share(total)
    segment = segment_of(bounds, segments, begin)
    for block in range(begin, end):
        segment = next_segment(bounds, segment, block)
        row, own = table + segment * (3 + MODELS + TAUS), partials + block
        n, first = tl.load(row + 2 + MODELS + TAUS), (block - tl.load(bounds + segment)) * BLOCK
        offsets = first + tl.arange(0, BLOCK)
        if first + BLOCK <= n:
            _inner_block(row, own, total, offsets, n, MODELS, TAUS, FIRST, MODEL, TAU, ALIGN, False)
        else:
            _inner_block(row, own, total, offsets, n, MODELS, TAUS, FIRST, MODEL, TAU, ALIGN, True)


@triton.jit(do_not_specialize=["total"])
def sum_kernel(partials, bounds, sums, total, BLOCK: tl.constexpr):
    """Partials [K, P] -> sums [K, S]: each segment's blocks in their order, in float64."""
    segment, k = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    found = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        found += tl.load(partials + k * total + at, mask=at < last, other=0.0).to(tl.float64)
    tl.store(sums + k * tl.num_programs(0) + segment, tl.sum(found).to(tl.float32))
