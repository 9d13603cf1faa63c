"""Spectral norm of all layers of a network, in a few launches for all of them together.

Formula (Miyato et al. 2018, arXiv 1802.05957). M is the weight with `dim` moved first, reshaped to [rows,
columns]. One power iteration that updates u first, with den(n) = max(n, eps) or n + eps:

    r = M v      u = r / den(|r|)      t = M^T u      v = t / den(|t|)      sigma = u^T M v = t . v

and the other order has M and M^T, u and v, r and t exchanged. The result is W / sigma. u and v are constants
of the gradient, g is the gradient of the result and h the one of the weight's gradient:

    grad_W   = g/sigma - (<g,W>/sigma^2) u v^T
    grad_g   = h/sigma - (q/sigma^2) W                                       q = u^T h v
    grad_W   = -(q/sigma^2) g + (2<g,W>q/sigma^3 - <h,g>/sigma^2) u v^T      (double backward)

One pass for two products. M^T u needs all of u, which needs all of M: two passes over M, it seems. But r_i is
complete once row i was read, and M^T(Mv) is a sum over rows: the program that owns a block of rows reads it,
has its part of r, and while the rows are still in the cache adds up r_i M[i, :] over them. The next launch
adds up the sums of all blocks, and divides by den(|r|) only then. The blocks are 8 rows high, so the partial
sums are an eighth of M. For the other order, blocks of 64 columns play the part of the rows.

    launch   programs                reads                 writes
    power    blocks of rows          M, v                  r, |r_block|, partial sums of M^T r
    reduce   128 columns             partial sums          t, |t_block|
    scale    tiles of M              M, r, t               W / sigma, u, v, sigma

power and reduce repeat with each further iteration. Without iterations, `products` takes their place: it sums
up u^T M v over tiles. Forward with one iteration is 2 reads and 1 write of W in 3 launches. Backward is
`products` (<g,W>) and `gradient`, 3 reads and 1 write in 2 launches; double backward is `products` and
`second_gradient`, 6 reads and 2 writes in 2 launches. All of it is bound by memory bandwidth, and for small
networks by the launches. Sums are in fp32 (fp64 for fp64), have a fixed order, and use no atomics.

Magnitudes. Squares, and M^T r before it is divided by |r|, which is about |M|^2, leave the range of fp32 for norms
above 1e19 or below 1e-19, where torch, which divides first, is right. So they are taken of vectors times a power of
two (`_within_range`), which is 1 for ordinary weights; the norms of blocks are kept, not their squares.

Memory. A dense weight lies in memory as [outer, rows, inner], with the dimensions before and behind `dim` in
order of their strides, so no layout needs a copy. Column c of row i, with c counted in memory order, is
element (c // inner, i, c % inner). Vectors on the scratch buffer are in that order too. Only u and v, the
caller's and the state's, are in logical order, and `_logical_position` translates for v (channels_last is
where they differ). The state is what forward leaves for the gradients: one vector in the type of the sums,
with sigma of all layers, then u and v of each layer.

Tables (spectral_norm_tables.py). The kernels find their layers in two int64 tables, one row a layer: what follows
from the shapes (`Plan`), and the pointers (`PointerTables`). Both are kept on the device between calls, so a training
loop, whose allocator hands out the same addresses every step, uploads nothing. A third table names the layer of each
program and which of its blocks is meant. To be captured in a CUDA graph, a call must have run before with the same
shapes: a plan is copied from the host's memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton.launch import constant, contiguous, laid_out_as, launch, of_addresses, planned, sum_dtype
from gankern.triton.spectral_norm_tables import (
    Matrix,
    PointerTables,
    column,
    extent,
    matrix_of,
    plan_of,
    pointer,
    product,
)

POWER_WARPS, REDUCE_WARPS, TILE_WARPS = 8, 4, 8

# ---- device functions --------------------------------------------------------------------------------------


@triton.jit
def _this_program(programs, layers, pointers, GROUPS: tl.constexpr):
    """The number of the program's layer, its row of either table, and which of its blocks is meant."""
    number = tl.load(programs + 2 * tl.program_id(0))
    block = tl.load(programs + 2 * tl.program_id(0) + 1)
    return (
        number,
        layers + number * (extent("layer_fields") + 2 * GROUPS),
        pointers + number * extent("pointer_fields"),
        block,
    )


@triton.jit
def _matrix_shape(layer):
    rows = tl.load(layer + column("rows")).to(tl.int32)
    columns = tl.load(layer + column("columns")).to(tl.int32)
    inner = tl.load(layer + column("inner")).to(tl.int32)
    return rows, columns, inner


@triton.jit
def _scratch(scratch, layer, FIELD: tl.constexpr):
    """Where one of the layer's vectors lies on the scratch buffer."""
    return scratch + tl.multiple_of(tl.load(layer + FIELD), extent("reduced"))


@triton.jit
def _pointer(pointers, FIELD: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(pointers + FIELD).to(tl.pointer_type(DTYPE))


@triton.jit
def _elements(pointers, FIELD: tl.constexpr, i, c, shape, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Pointers to the elements of a tile and whether they exist: rows i and columns c, in memory order.

    Where the matrix and its runs of `inner` elements start at multiples of 16 bytes, an ALIGNMENT of 16 tells
    the compiler so, and it moves 16 bytes at a time. Elsewhere it must at least learn that columns are
    neighbours in memory, or it gives the rows to neighbouring threads. This does not hold at the ends of
    runs, but without a known alignment the compiler never moves two elements at once.
    """
    rows, columns, inner = shape
    if ALIGNMENT == 16:
        vector: tl.constexpr = 128 // DTYPE.primitive_bitwidth
        columns = columns // vector * vector
        inner = inner // vector * vector
    base = tl.multiple_of(tl.load(pointers + FIELD).to(tl.pointer_type(DTYPE)), ALIGNMENT)
    outer = c // inner
    in_row = outer.to(tl.int64) * rows * inner + (c - outer * inner)
    if ALIGNMENT < 16:
        in_row = tl.max_contiguous(in_row, 2)
    elements = base + (i.to(tl.int64) * inner)[:, None] + in_row[None, :]
    return elements, (i < rows)[:, None] & (c < columns)[None, :]


@triton.jit
def _load_tile(pointers, FIELD: tl.constexpr, i, c, shape, DTYPE: tl.constexpr, SUM: tl.constexpr):
    """A tile of one of the layer's matrices in the type of the sums, zero outside."""
    if tl.load(pointers + pointer("aligned")) != 0:
        elements, inside = _elements(pointers, FIELD, i, c, shape, DTYPE, 16)
        tile = tl.load(elements, mask=inside, other=0.0)
    else:
        elements, inside = _elements(pointers, FIELD, i, c, shape, DTYPE, 1)
        tile = tl.load(elements, mask=inside, other=0.0)
    return tile.to(SUM)


@triton.jit
def _store_tile(tile, pointers, FIELD: tl.constexpr, i, c, shape, DTYPE: tl.constexpr):
    if tl.load(pointers + pointer("aligned")) != 0:
        elements, inside = _elements(pointers, FIELD, i, c, shape, DTYPE, 16)
        tl.store(elements, tile.to(DTYPE), mask=inside)
    else:
        elements, inside = _elements(pointers, FIELD, i, c, shape, DTYPE, 1)
        tl.store(elements, tile.to(DTYPE), mask=inside)


@triton.jit
def _logical_position(c, layer, GROUPS: tl.constexpr):
    """Where in v the columns c stand. c counts them in the order of memory, v in the order of the shape."""
    if GROUPS == 1:
        return c
    position = tl.zeros_like(c)
    for group in tl.static_range(GROUPS):
        size = tl.load(layer + extent("layer_fields") + 2 * group).to(tl.int32)
        stride = tl.load(layer + extent("layer_fields") + 2 * group + 1).to(tl.int32)
        position += c % size * stride
        c = c // size
    return position


@triton.jit
def _load_u(pointers, i, rows, SUM: tl.constexpr):
    return tl.load(_pointer(pointers, pointer("u"), SUM) + i, mask=i < rows, other=0.0)


@triton.jit
def _load_v(pointers, layer, c, columns, SUM: tl.constexpr, GROUPS: tl.constexpr):
    position = _logical_position(c, layer, GROUPS)
    return tl.load(_pointer(pointers, pointer("v"), SUM) + position, mask=c < columns, other=0.0)


@triton.jit
def _sum(values, count, STRIDE: tl.constexpr):
    """The sum of a short list, in a fixed order."""
    total = tl.zeros([extent("summed")], values.dtype.element_ty)
    for start in range(0, count, extent("summed")):
        k = start + tl.arange(0, extent("summed"))
        total += tl.load(values + k * STRIDE, mask=k < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _sum_tile(tile):
    return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def _within_range(size):
    """A power of two by which numbers of this size have squares in the range of fp32."""
    scale = tl.where(size > 1e15, 8.271806125530277e-25, 1.0)  # 2^-80
    scale = tl.where(size > 1e27, 1.1754943508222875e-38, scale)  # 2^-126
    return tl.where(size < 1e-15, 1.2089258196146292e24, scale).to(size.dtype)  # 2^80


@triton.jit
def _norm_of(values):
    """The norm of a vector that the program holds."""
    scale = _within_range(tl.max(tl.abs(values), 0))
    scaled = values * scale
    return tl.sqrt(tl.sum(scaled * scaled, 0)) / scale


@triton.jit
def _norm_of_blocks(norms, count):
    """The norm of a vector by those of its blocks, in a fixed order."""
    largest = tl.zeros([extent("summed")], norms.dtype.element_ty)
    for start in range(0, count, extent("summed")):
        k = start + tl.arange(0, extent("summed"))
        largest = tl.maximum(largest, tl.load(norms + k, mask=k < count, other=0.0))
    scale = _within_range(tl.max(largest, 0))
    total = tl.zeros([extent("summed")], norms.dtype.element_ty)
    for start in range(0, count, extent("summed")):
        k = start + tl.arange(0, extent("summed"))
        norm = tl.load(norms + k, mask=k < count, other=0.0) * scale
        total += norm * norm
    return tl.sqrt(tl.sum(total, 0)) / scale


@triton.jit
def _denominator(norm, EPS: tl.constexpr, ADD_EPS: tl.constexpr):
    """den(n)."""
    eps = tl.full([], EPS, norm.dtype)
    if ADD_EPS:
        return norm + eps
    return tl.where(norm < eps, eps, norm)  # unlike maximum, keeps NaN


@triton.jit
def _normalized(
    scratch,
    layer,
    VECTOR: tl.constexpr,
    NORMS: tl.constexpr,
    blocks,
    k,
    length,
    EPS: tl.constexpr,
    ADD_EPS: tl.constexpr,
):
    """Elements k of a vector on the scratch buffer, divided by den of its norm."""
    denominator = _denominator(_norm_of_blocks(_scratch(scratch, layer, NORMS), blocks), EPS, ADD_EPS)
    return tl.load(_scratch(scratch, layer, VECTOR) + k, mask=k < length, other=0.0) / denominator


@triton.jit
def _divide(x, sigma):
    """x / sigma, and zero where sigma is zero."""
    return tl.where(sigma == 0, 0.0, x / sigma)


@triton.jit
def _tiles_across(columns):
    return tl.maximum(tl.cdiv(columns, extent("tile_columns")), 1)


@triton.jit
def _tile(block, columns):
    """The rows and the columns of a tile. The tiles of a matrix are counted row by row."""
    across = _tiles_across(columns)
    i = block // across * extent("tile_rows") + tl.arange(0, extent("tile_rows"))
    c = block % across * extent("tile_columns") + tl.arange(0, extent("tile_columns"))
    return i, c


# ---- forward -----------------------------------------------------------------------------------------------


@triton.jit
def _power_kernel(
    layers,
    pointers,
    programs,
    scratch,
    DTYPE: tl.constexpr,
    GROUPS: tl.constexpr,
    CONTINUE: tl.constexpr,  # from the second vector of the iteration before, not from the caller's u or v
    U_FIRST: tl.constexpr,
    EPS: tl.constexpr,
    ADD_EPS: tl.constexpr,
):
    _, layer, pointers, block = _this_program(programs, layers, pointers, GROUPS)
    shape = _matrix_shape(layer)
    rows, columns, _ = shape
    SUM: tl.constexpr = scratch.dtype.element_ty

    # The program owns a block along one axis of the matrix, and passes along the other.
    if U_FIRST:
        PASSED_AXIS: tl.constexpr = 1
        OWNED: tl.constexpr = extent("owned_rows")
        PASSED: tl.constexpr = extent("passed_columns_bits") // SUM.primitive_bitwidth
        passed_size = columns
    else:
        PASSED_AXIS: tl.constexpr = 0
        OWNED: tl.constexpr = extent("owned_columns")
        PASSED: tl.constexpr = extent("passed_rows_bits") // SUM.primitive_bitwidth
        passed_size = rows
    TILE: tl.constexpr = [OWNED, PASSED] if U_FIRST else [PASSED, OWNED]
    owned = block * OWNED + tl.arange(0, OWNED)
    if CONTINUE:
        second = _scratch(scratch, layer, column("second"))
        blocks = tl.cdiv(passed_size, extent("reduced"))
        norm = _norm_of_blocks(_scratch(scratch, layer, column("second_norms")), blocks)
        denominator = _denominator(norm, EPS, ADD_EPS)

    # The owned part of the first vector: r = M v, or t = M^T u.
    products = tl.zeros(TILE, SUM)
    for start in range(0, passed_size, PASSED):
        passed = start + tl.arange(0, PASSED)
        if CONTINUE:
            factor = tl.load(second + passed, mask=passed < passed_size, other=0.0) / denominator
        elif U_FIRST:
            factor = _load_v(pointers, layer, passed, columns, SUM, GROUPS)
        else:
            factor = _load_u(pointers, passed, rows, SUM)
        i, c = (owned, passed) if U_FIRST else (passed, owned)
        tile = _load_tile(pointers, pointer("weight"), i, c, shape, DTYPE, SUM)
        products += tile * tl.expand_dims(factor, 1 - PASSED_AXIS)
    first = tl.sum(products, PASSED_AXIS)
    tl.store(_scratch(scratch, layer, column("first")) + owned, first)
    norm = _norm_of(first)
    tl.store(_scratch(scratch, layer, column("first_norms")) + block, norm)

    # Its share of M^T r, or of M t, for which the block is read again, now from the cache.
    first *= _within_range(norm)
    passed_length = tl.cdiv(passed_size, extent("reduced")) * extent("reduced")
    partial_sums = _scratch(scratch, layer, column("partial_sums")) + block.to(tl.int64) * passed_length
    for start in range(0, passed_length, PASSED):
        passed = start + tl.arange(0, PASSED)
        i, c = (owned, passed) if U_FIRST else (passed, owned)
        tile = _load_tile(pointers, pointer("weight"), i, c, shape, DTYPE, SUM)
        sums = tl.sum(tile * tl.expand_dims(first, PASSED_AXIS), 1 - PASSED_AXIS)
        tl.store(partial_sums + passed, sums, mask=passed < passed_length)


@triton.jit
def _reduce_kernel(
    layers,
    pointers,
    programs,
    scratch,
    DTYPE: tl.constexpr,
    GROUPS: tl.constexpr,
    U_FIRST: tl.constexpr,
    EPS: tl.constexpr,
    ADD_EPS: tl.constexpr,
):
    _, layer, _, block = _this_program(programs, layers, pointers, GROUPS)
    rows, columns, _ = _matrix_shape(layer)
    if U_FIRST:
        blocks = tl.cdiv(rows, extent("owned_rows"))
        length = tl.cdiv(columns, extent("reduced")) * extent("reduced")
    else:
        blocks = tl.cdiv(columns, extent("owned_columns"))
        length = tl.cdiv(rows, extent("reduced")) * extent("reduced")
    norms = _scratch(scratch, layer, column("first_norms"))
    norm = _norm_of_blocks(norms, blocks)
    scale = _within_range(norm)
    denominator = _denominator(norm, EPS, ADD_EPS) * scale

    j = block * extent("reduced") + tl.arange(0, extent("reduced"))
    partial_sums = _scratch(scratch, layer, column("partial_sums"))
    sums = tl.zeros([extent("reduced_blocks"), extent("reduced")], scratch.dtype.element_ty)
    for start in range(0, blocks, extent("reduced_blocks")):
        k = start + tl.arange(0, extent("reduced_blocks"))
        inside = (k < blocks)[:, None] & (j < length)[None, :]
        part = tl.load(partial_sums + k.to(tl.int64)[:, None] * length + j[None, :], mask=inside, other=0.0)
        own = _within_range(tl.load(norms + k, mask=k < blocks, other=1.0))
        sums += part * (scale / own)[:, None]
    second = tl.sum(sums, 0) / denominator
    tl.store(_scratch(scratch, layer, column("second")) + j, second)
    tl.store(_scratch(scratch, layer, column("second_norms")) + block, _norm_of(second))


@triton.jit
def _scale_kernel(
    layers,
    pointers,
    programs,
    scratch,
    sigmas,
    DTYPE: tl.constexpr,
    GROUPS: tl.constexpr,
    ITERATED: tl.constexpr,
    U_FIRST: tl.constexpr,
    EPS: tl.constexpr,
    ADD_EPS: tl.constexpr,
):
    number, layer, pointers, block = _this_program(programs, layers, pointers, GROUPS)
    shape = _matrix_shape(layer)
    rows, columns, _ = shape
    i, c = _tile(block, columns)
    SUM: tl.constexpr = scratch.dtype.element_ty

    if ITERATED:
        if U_FIRST:
            U_VECTOR: tl.constexpr = column("first")
            U_NORMS: tl.constexpr = column("first_norms")
            V_VECTOR: tl.constexpr = column("second")
            V_NORMS: tl.constexpr = column("second_norms")
            u_blocks = tl.cdiv(rows, extent("owned_rows"))
            v_blocks = tl.cdiv(columns, extent("reduced"))
            second_blocks = v_blocks
        else:
            U_VECTOR: tl.constexpr = column("second")
            U_NORMS: tl.constexpr = column("second_norms")
            V_VECTOR: tl.constexpr = column("first")
            V_NORMS: tl.constexpr = column("first_norms")
            u_blocks = tl.cdiv(rows, extent("reduced"))
            v_blocks = tl.cdiv(columns, extent("owned_columns"))
            second_blocks = u_blocks
        # sigma = second . second / den(|second|)
        norm = _norm_of_blocks(_scratch(scratch, layer, column("second_norms")), second_blocks)
        sigma = norm / _denominator(norm, EPS, ADD_EPS) * norm
        # The tiles on the matrix's left edge write u, those on its top edge v.
        if block % _tiles_across(columns) == 0:
            u = _normalized(scratch, layer, U_VECTOR, U_NORMS, u_blocks, i, rows, EPS, ADD_EPS)
            tl.store(_pointer(pointers, pointer("new_u"), SUM) + i, u, mask=i < rows)
        if block < _tiles_across(columns):
            v = _normalized(scratch, layer, V_VECTOR, V_NORMS, v_blocks, c, columns, EPS, ADD_EPS)
            position = _logical_position(c, layer, GROUPS)
            tl.store(_pointer(pointers, pointer("new_v"), SUM) + position, v, mask=c < columns)
    else:
        product_programs = tl.load(layer + column("product_programs")).to(tl.int32)
        sigma = _sum(_scratch(scratch, layer, column("products")), product_programs, extent("product_values"))
        if block % _tiles_across(columns) == 0:
            u = _load_u(pointers, i, rows, SUM)
            tl.store(_pointer(pointers, pointer("new_u"), SUM) + i, u, mask=i < rows)
        if block < _tiles_across(columns):
            v = _load_v(pointers, layer, c, columns, SUM, GROUPS)
            position = _logical_position(c, layer, GROUPS)
            tl.store(_pointer(pointers, pointer("new_v"), SUM) + position, v, mask=c < columns)
    if block == 0:
        tl.store(sigmas + number, sigma)

    weight = _load_tile(pointers, pointer("weight"), i, c, shape, DTYPE, SUM)
    _store_tile(_divide(weight, sigma), pointers, pointer("normalized"), i, c, shape, DTYPE)


# ---- gradients ---------------------------------------------------------------------------------------------


@triton.jit
def _products_kernel(
    layers,
    pointers,
    programs,
    scratch,
    DTYPE: tl.constexpr,
    GROUPS: tl.constexpr,
    WHAT: tl.constexpr,  # "sigma": u^T W v.  "first": <g,W>.  "second": <g,W>, u^T h v and <h,g>.
):
    _, layer, pointers, block = _this_program(programs, layers, pointers, GROUPS)
    shape = _matrix_shape(layer)
    rows, columns, _ = shape
    product_programs = tl.load(layer + column("product_programs")).to(tl.int32)
    tiles = tl.cdiv(rows, extent("tile_rows")) * tl.cdiv(columns, extent("tile_columns"))
    SUM: tl.constexpr = scratch.dtype.element_ty

    products = tl.zeros([], SUM)
    bilinear = tl.zeros([], SUM)
    gradients = tl.zeros([], SUM)
    for tile in range(block, tiles, product_programs):
        i, c = _tile(tile, columns)
        weight = _load_tile(pointers, pointer("weight"), i, c, shape, DTYPE, SUM)
        if WHAT == "sigma":
            u = _load_u(pointers, i, rows, SUM)
            v = _load_v(pointers, layer, c, columns, SUM, GROUPS)
            products += _sum_tile(weight * u[:, None] * v[None, :])
        else:
            grad = _load_tile(pointers, pointer("grad"), i, c, shape, DTYPE, SUM)
            products += _sum_tile(grad * weight)
        if WHAT == "second":
            u = _load_u(pointers, i, rows, SUM)
            v = _load_v(pointers, layer, c, columns, SUM, GROUPS)
            grad_grad_weight = _load_tile(pointers, pointer("grad_grad_weight"), i, c, shape, DTYPE, SUM)
            bilinear += _sum_tile(grad_grad_weight * u[:, None] * v[None, :])
            gradients += _sum_tile(grad_grad_weight * grad)

    result = _scratch(scratch, layer, column("products")) + block * extent("product_values")
    tl.store(result, products)
    if WHAT == "second":
        tl.store(result + 1, bilinear)
        tl.store(result + 2, gradients)


@triton.jit
def _gradient_kernel(
    layers,
    pointers,
    programs,
    scratch,
    sigmas,
    DTYPE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    number, layer, pointers, block = _this_program(programs, layers, pointers, GROUPS)
    shape = _matrix_shape(layer)
    rows, columns, _ = shape
    i, c = _tile(block, columns)
    SUM: tl.constexpr = scratch.dtype.element_ty

    product_programs = tl.load(layer + column("product_programs")).to(tl.int32)
    sigma = tl.load(sigmas + number)
    product = _sum(_scratch(scratch, layer, column("products")), product_programs, extent("product_values"))
    u = _load_u(pointers, i, rows, SUM) * _divide(_divide(product, sigma), sigma)
    v = _load_v(pointers, layer, c, columns, SUM, GROUPS)
    grad = _load_tile(pointers, pointer("grad"), i, c, shape, DTYPE, SUM)
    grad_weight = _divide(grad, sigma) - u[:, None] * v[None, :]
    _store_tile(grad_weight, pointers, pointer("grad_weight"), i, c, shape, DTYPE)


@triton.jit
def _second_gradient_kernel(
    layers,
    pointers,
    programs,
    scratch,
    sigmas,
    DTYPE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    number, layer, pointers, block = _this_program(programs, layers, pointers, GROUPS)
    shape = _matrix_shape(layer)
    rows, columns, _ = shape
    i, c = _tile(block, columns)
    SUM: tl.constexpr = scratch.dtype.element_ty

    product_programs = tl.load(layer + column("product_programs")).to(tl.int32)
    results = _scratch(scratch, layer, column("products"))
    sigma = tl.load(sigmas + number)
    product = _divide(_sum(results, product_programs, extent("product_values")), sigma)
    bilinear = _divide(_divide(_sum(results + 1, product_programs, extent("product_values")), sigma), sigma)
    gradients = _divide(_divide(_sum(results + 2, product_programs, extent("product_values")), sigma), sigma)

    weight = _load_tile(pointers, pointer("weight"), i, c, shape, DTYPE, SUM)
    grad_grad_weight = _load_tile(pointers, pointer("grad_grad_weight"), i, c, shape, DTYPE, SUM)
    grad_grad = _divide(grad_grad_weight, sigma) - bilinear * weight
    _store_tile(grad_grad, pointers, pointer("grad_grad"), i, c, shape, DTYPE)

    u = _load_u(pointers, i, rows, SUM) * (2 * product * bilinear - gradients)
    v = _load_v(pointers, layer, c, columns, SUM, GROUPS)
    grad = _load_tile(pointers, pointer("grad"), i, c, shape, DTYPE, SUM)
    grad_weight = u[:, None] * v[None, :] - bilinear * grad
    _store_tile(grad_weight, pointers, pointer("grad_weight"), i, c, shape, DTYPE)


# ---- host: the weights -------------------------------------------------------------------------------------


def _dense(weight: Tensor, dim: int) -> tuple[Tensor, Matrix]:
    """The weight, or a dense copy with the order of its strides, which is what torch's functions return."""
    matrix = matrix_of(weight.shape, weight.stride(), dim)
    if matrix is None:
        return _dense(weight.clone(), dim)
    return weight, matrix


def _state_sizes(weights: Sequence[Tensor], dims: Sequence[int]) -> list[int]:
    """The lengths of the state's parts: the sigmas, then u and v of each layer."""
    sizes = [len(weights)]
    for weight, dim in zip(weights, dims):
        sizes += (weight.shape[dim], product(size for d, size in enumerate(weight.shape) if d != dim))
    return sizes


Place = tuple[Tensor, int] | None  # so many bytes behind a tensor's first element; None of a layer that is left out


def _vectors(state: Tensor, weights: Sequence[Tensor], dims: Sequence[int]) -> tuple[list[Place], list[Place]]:
    """Where in the state they lie: u of each layer, v of each layer."""
    first, *lengths = _state_sizes(weights, dims)
    places: list[Place] = []
    for length in lengths:
        places.append((state, first * state.element_size()))
        first += length
    return places[::2], places[1::2]


def _begins(tensors: Sequence[Tensor | None]) -> list[Place]:
    return [None if tensor is None else (tensor, 0) for tensor in tensors]


_TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class _Call:
    """The tables and the scratch buffer that the launches of one call share."""

    def __init__(
        self,
        matrices: Sequence[Matrix | None],
        weights: Sequence[Tensor | None],
        vectors: Sequence[Sequence[Place]],
        like_weights: Sequence[Sequence[Tensor | None]],
        like_vectors: Sequence[Sequence[Place]] = (),
        u_first: bool = True,
    ) -> None:
        """The table of pointers has W, u and v, then `like_weights`, which are laid out as the weights are, then
        `like_vectors`. Layers whose matrix is None are left out. `u_first` matters to the power iteration only."""
        weight = next(weight for weight in weights if weight is not None)
        self.plan = plan_of(tuple(matrices), u_first, weight.device)
        tables = PointerTables(
            matrices, (0, *range(3, 3 + len(like_weights))), 16 // weight.element_size(), weight.device
        )
        rows = zip(_begins(weights), *vectors, *map(_begins, like_weights), *like_vectors)
        places = [place if matrix else None for matrix, row in zip(matrices, rows) for place in row]
        self.pointers = of_addresses(tables, places)
        self.scratch = torch.empty(self.plan.scratch_size, dtype=sum_dtype(weight.dtype), device=weight.device)
        self.dtype = _TRITON_DTYPES[weight.dtype]

    def launch(self, kernel: Any, programs: Tensor, num_warps: int, *arguments: Tensor, **constexprs: Any) -> None:
        launch(
            kernel,
            len(programs),
            constant(self.plan.layers),
            self.pointers,
            constant(programs),
            self.scratch,
            *arguments,
            DTYPE=self.dtype,
            GROUPS=self.plan.groups,
            **constexprs,
            num_warps=num_warps,
        )


# ---- host: the launchers -----------------------------------------------------------------------------------
# The kernels of gankern/ops/spectral_norm.py: the contract stands there. The weights and gradients of a call
# have one dtype. Nothing given is written to.


@planned
def forward(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dims: Sequence[int],
    n_power_iterations: int,
    eps: float,
    u_first: bool,
    add_eps: bool,
) -> tuple[list[Tensor], Tensor]:
    """The normalized weights, with the strides of the weights, and the state.

    A weight whose sigma is zero becomes zeros. Launches: 2 n_power_iterations + 1; without iterations 2. A vector that
    is not contiguous, or not in the type of the sums, costs a copy.
    """
    weights, matrices = zip(*map(_dense, weights, dims))
    normalized = [torch.empty_like(weight) for weight in weights]
    sums = sum_dtype(weights[0].dtype)
    state = weights[0].new_empty(sum(_state_sizes(weights, dims)), dtype=sums)
    vectors = [_begins([contiguous(x if x.dtype == sums else x.to(sums)) for x in xs]) for xs in (us, vs)]
    call = _Call(matrices, weights, vectors, [normalized], _vectors(state, weights, dims), u_first)
    iterated = n_power_iterations > 0
    order = {"U_FIRST": u_first, "EPS": eps, "ADD_EPS": add_eps}
    for iteration in range(n_power_iterations):
        call.launch(_power_kernel, call.plan.power_programs, POWER_WARPS, CONTINUE=iteration > 0, **order)
        call.launch(_reduce_kernel, call.plan.reduce_programs, REDUCE_WARPS, **order)
    if not iterated:
        call.launch(_products_kernel, call.plan.product_programs, TILE_WARPS, WHAT="sigma")
    warps = 2 * TILE_WARPS if state.dtype == torch.float64 else TILE_WARPS  # which would spill registers
    call.launch(_scale_kernel, call.plan.tile_programs, warps, state, ITERATED=iterated, **order)
    return normalized, state


@planned
def backward(
    grads: Sequence[Tensor | None], weights: Sequence[Tensor], state: Tensor, dims: Sequence[int]
) -> list[Tensor]:
    """The gradients of the weights, with the strides of the weights; empty where the gradient is None.
    Launches: 2."""
    inputs = _GradientInputs(weights, state, dims, grads)
    grad_weights = inputs.empty_results()
    if not inputs.present:
        return grad_weights
    call = inputs.call([*inputs.gradients, grad_weights])
    call.launch(_products_kernel, call.plan.product_programs, TILE_WARPS, WHAT="first")
    call.launch(_gradient_kernel, call.plan.tile_programs, TILE_WARPS, inputs.state)
    return grad_weights


@planned
def double_backward(
    grad_grad_weights: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    state: Tensor,
    dims: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of `backward`'s grads and weights, with the strides of the weights; both are empty where
    one of the gradients is None. Launches: 2."""
    inputs = _GradientInputs(weights, state, dims, grads, grad_grad_weights)
    grad_grads, grad_weights = inputs.empty_results(), inputs.empty_results()
    if not inputs.present:
        return grad_grads, grad_weights
    grads, grad_grad_weights = inputs.gradients
    call = inputs.call([grads, grad_weights, grad_grad_weights, grad_grads])
    call.launch(_products_kernel, call.plan.product_programs, TILE_WARPS, WHAT="second")
    call.launch(_second_gradient_kernel, call.plan.tile_programs, TILE_WARPS, inputs.state)
    return grad_grads, grad_weights


class _GradientInputs:
    """What the launches of a gradient read. The entries of a layer without one of its gradients are None."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        state: Tensor,
        dims: Sequence[int],
        *gradients: Sequence[Tensor | None],
    ) -> None:
        layers = range(len(weights))
        self.present = [i for i in layers if all(xs[i] is not None for xs in gradients)]
        self.matrices: list[Matrix | None] = [None for _ in layers]
        self.weights: list[Tensor | None] = [None for _ in layers]
        self.gradients: list[list[Tensor | None]] = [[None for _ in layers] for _ in gradients]
        self.state = contiguous(state)
        self.vectors = _vectors(self.state, weights, dims)
        self.model = weights[0]
        for i in self.present:
            weight, self.matrices[i] = _dense(weights[i], dims[i])
            self.weights[i] = weight
            for dense, given in zip(self.gradients, gradients):
                dense[i] = laid_out_as(given[i], weight)

    def call(self, like_weights: Sequence[Sequence[Tensor | None]]) -> _Call:
        return _Call(self.matrices, self.weights, self.vectors, like_weights)

    def empty_results(self) -> list[Tensor]:
        """A new tensor a layer: laid out as the weight, or without elements."""
        return [torch.empty_like(weight) if weight is not None else self.model.new_empty(0) for weight in self.weights]


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernels: either order of the iteration, and columns in groups."""
    for shape, dim, u_first in (((64, 32), 0, True), ((64, 32, 4, 4), 1, False)):
        weight = torch.empty(shape, dtype=dtype, device=device)
        if weight.ndim == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        u = torch.empty(shape[dim], dtype=sum_dtype(dtype), device=device)
        v = torch.empty(weight.numel() // shape[dim], dtype=sum_dtype(dtype), device=device)
        for iterations in (0, 2):
            _, state = forward([weight], [u], [v], [dim], iterations, 1e-12, u_first, not u_first)
        backward([weight], [weight], state, [dim])
        double_backward([weight], [weight], [weight], state, [dim])
