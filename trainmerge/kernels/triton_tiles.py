"""The Triton programs of integer and low-rank task vectors, beside dense ones of the same parameter.

A block is a tile of `ROWS` x `COLUMNS` weights, so that a tile of a low-rank difference is one small matrix
product, on tensor cores, and an integer's scale is its row's. A segment's row of the table has the addresses
of: the output (or the gradient), the origin, `MODELS` models, `TAUS` differences, `CODES` integers, their
scales, `LOWS` left factors, their right factors; then its number of rows, its width in steps of `STEP`, the
scales' strides, and the ranks in steps of `RANK_STEP`. Tensor cores multiply 16-bit factors exactly, and
float32 ones by three products of TF32, which are as exact as one of float32.

Legend: `K` = MODELS + TAUS + CODES + LOWS experts, `S` segments, `P` tiles of all segments.
"""

import triton
import triton.language as tl

from trainmerge.kernels.triton_device import address, next_segment, segment_of, share


@triton.jit
def _dense(row, k, i, j, rows, width, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """A tile [ROWS, COLUMNS] of the row's k-th tensor, in float32."""
    pointers = address(row, k, DTYPE, ALIGN) + i[:, None] * width + j[None, :]
    mask = (i < rows)[:, None] & (j < width)[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _integer(row, k, CODES: tl.constexpr, stride, i, j, rows, width, ALIGN: tl.constexpr):
    """A tile of codes x scale; `k` is the codes' place in the row, the scales' is `CODES` after it."""
    scale = address(row, k + CODES, tl.float32, 4) + i * tl.load(row + stride)
    tile = _dense(row, k, i, j, rows, width, tl.int8, ALIGN)
    return tile * tl.load(scale, mask=i < rows, other=0.0)[:, None]


@triton.jit
def _low_rank(
    row,
    k,
    LOWS: tl.constexpr,
    steps,
    i,
    j,
    rows,
    width,
    FACTOR: tl.constexpr,
    RANK_STEP: tl.constexpr,
    RANKS: tl.constexpr,
):
    """A tile of up @ down, without scale; `k` is up's place in the row, down's is `LOWS` after it."""
    rank = tl.load(row + steps) * RANK_STEP
    up, down = address(row, k, FACTOR, 2 * RANK_STEP), address(row, k + LOWS, FACTOR, 2 * RANK_STEP)
    tile = tl.zeros([i.shape[0], j.shape[0]], dtype=tl.float32)
    for start in range(0, rank, RANKS):
        r = start + tl.arange(0, RANKS)
        mask = (i < rows)[:, None] & (r < rank)[None, :]
        left = tl.load(up + i[:, None] * rank + r[None, :], mask=mask, other=0.0)
        mask = (r < rank)[:, None] & (j < width)[None, :]
        right = tl.load(down + r[:, None] * width + j[None, :], mask=mask, other=0.0)
        tile = tl.dot(left, right, tile, input_precision="tf32x3")
    return tile


@triton.jit
def _places(row, local, AT: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's row numbers [ROWS] and columns [COLUMNS], and the segment's numbers of both."""
    rows, width = tl.load(row + AT), tl.load(row + AT + 1) * STEP  # a known divisor makes loads wide
    across = tl.cdiv(width, COLUMNS)
    i = (local // across) * ROWS + tl.arange(0, ROWS)
    j = (local % across) * COLUMNS + tl.arange(0, COLUMNS)
    return i, j, rows, width


@triton.jit(do_not_specialize=["segments", "total"])
def merge_tiles_kernel(
    table,
    bounds,
    weights,
    segments,
    total,
    MODELS: tl.constexpr,
    TAUS: tl.constexpr,
    CODES: tl.constexpr,
    LOWS: tl.constexpr,
    FIRST: tl.constexpr,
    MODEL: tl.constexpr,
    TAU: tl.constexpr,
    FACTOR: tl.constexpr,
    ALIGN: tl.constexpr,
    STEP: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Some tiles: origin + sum weights (model - origin) + sum weights tau."""
    codes: tl.constexpr = 2 + MODELS + TAUS
    lows: tl.constexpr = codes + 2 * CODES
    at: tl.constexpr = lows + 2 * LOWS
    after: tl.constexpr = at + 2
    begin, end = share(total)
    segment = segment_of(bounds, segments, begin)
    for block in range(begin, end):
        segment = next_segment(bounds, segment, block)
        row = table + segment * (at + 2 + CODES + LOWS)
        own = weights + segment * (MODELS + TAUS + CODES + LOWS)
        local = block - tl.load(bounds + segment)
        i, j, rows, width = _places(row, local, at, STEP, ROWS, COLUMNS)
        origin = _dense(row, 1, i, j, rows, width, MODEL, ALIGN)
        merged = origin
        for k in tl.static_range(MODELS):
            weight = tl.load(own + k)
            if weight != 0.0:
                merged += weight * (_dense(row, 2 + k, i, j, rows, width, MODEL, ALIGN) - origin)
        for k in tl.static_range(TAUS):
            weight = tl.load(own + MODELS + k)
            if weight != 0.0:
                merged += weight * _dense(row, 2 + MODELS + k, i, j, rows, width, TAU, ALIGN)
        for k in tl.static_range(CODES):
            weight = tl.load(own + MODELS + TAUS + k)
            if weight != 0.0:
                merged += weight * _integer(row, codes + k, CODES, after + k, i, j, rows, width, ALIGN)
        for k in range(LOWS):  # not unrolled: a product has registers enough of its own
            weight = tl.load(own + MODELS + TAUS + CODES + k)
            if weight != 0.0:
                merged += weight * _low_rank(
                    row, lows + k, LOWS, after + CODES + k, i, j, rows, width, FACTOR, RANK_STEP, RANKS
                )
        target = address(row, 0, FIRST, ALIGN) + i[:, None] * width + j[None, :]
        tl.store(target, merged.to(FIRST), mask=(i < rows)[:, None] & (j < width)[None, :])


@triton.jit(do_not_specialize=["segments", "total"])
def inner_tiles_kernel(
    table,
    bounds,
    partials,
    segments,
    total,
    MODELS: tl.constexpr,
    TAUS: tl.constexpr,
    CODES: tl.constexpr,
    LOWS: tl.constexpr,
    FIRST: tl.constexpr,
    MODEL: tl.constexpr,
    TAU: tl.constexpr,
    FACTOR: tl.constexpr,
    ALIGN: tl.constexpr,
    STEP: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Some tiles -> partials [K, P]: their part of every inner product, in float32."""
    codes: tl.constexpr = 2 + MODELS + TAUS
    lows: tl.constexpr = codes + 2 * CODES
    at: tl.constexpr = lows + 2 * LOWS
    after: tl.constexpr = at + 2
    begin, end = share(total)
    segment = segment_of(bounds, segments, begin)
    for block in range(begin, end):
        segment = next_segment(bounds, segment, block)
        row, own = table + segment * (at + 2 + CODES + LOWS), partials + block
        local = block - tl.load(bounds + segment)
        i, j, rows, width = _places(row, local, at, STEP, ROWS, COLUMNS)
        gradient = _dense(row, 0, i, j, rows, width, FIRST, ALIGN)
        if MODELS > 0:
            base = _dense(row, 1, i, j, rows, width, MODEL, ALIGN)
            for k in tl.static_range(MODELS):
                tau = _dense(row, 2 + k, i, j, rows, width, MODEL, ALIGN) - base
                tl.store(own + k * total, tl.sum(gradient * tau))
        for k in tl.static_range(TAUS):
            tau = _dense(row, 2 + MODELS + k, i, j, rows, width, TAU, ALIGN)
            tl.store(own + (MODELS + k) * total, tl.sum(gradient * tau))
        for k in tl.static_range(CODES):
            tau = _integer(row, codes + k, CODES, after + k, i, j, rows, width, ALIGN)
            tl.store(own + (MODELS + TAUS + k) * total, tl.sum(gradient * tau))
        for k in range(LOWS):
            tau = _low_rank(
                row, lows + k, LOWS, after + CODES + k, i, j, rows, width, FACTOR, RANK_STEP, RANKS
            )
            tl.store(own + (MODELS + TAUS + CODES + k) * total, tl.sum(gradient * tau))
