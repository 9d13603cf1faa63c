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
    power    blocks of rows          M, v                  r, |r_block|^2, partial sums of M^T r
    reduce   128 columns             partial sums          t, |t_block|^2
    scale    tiles of M              M, r, t               W / sigma, u, v, sigma

power and reduce repeat with each further iteration. Without iterations, `products` takes their place: it sums
up u^T M v over tiles. Forward with one iteration is 2 reads and 1 write of W in 3 launches. Backward is
`products` (<g,W>) and `gradient`, 3 reads and 1 write in 2 launches; double backward is `products` and
`second_gradient`, 6 reads and 2 writes in 2 launches. All of it is bound by memory bandwidth, and for small
networks by the launches. Sums are in fp32 (fp64 for fp64), have a fixed order, and use no atomics.

Memory. A dense weight lies in memory as [outer, rows, inner], with the dimensions before and behind `dim` in
order of their strides, so no layout needs a copy. Column c of row i, with c counted in memory order, is
element (c // inner, i, c % inner). Vectors on the scratch buffer are in that order too. Only u and v, the
caller's and the state's, are in logical order, and `_logical_position` translates for v (channels_last is
where they differ). The state is what forward leaves for the gradients: one vector in the type of the sums,
with sigma of all layers, then u and v of each layer.

Tables. The kernels find their layers in two int64 tables, one row a layer: what follows from the shapes
(`_Plan`), and the pointers (`_pointer_table`). Both are kept on the device between calls, so a training loop,
whose allocator hands out the same addresses every step, uploads nothing. A third table names the layer of
each program and which of its blocks is meant. To be captured in a CUDA graph, a call must have run before
with the same shapes: a plan is copied from the host's memory.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton.aot import AotEntry

# ---- sizes of the work of one program ----------------------------------------------------------------------

# power, u first: the program's rows, and the bits of sums a row at a time (1024 columns, 512 for fp64)
OWNED_ROWS, PASSED_COLUMNS_BITS = tl.constexpr(8), tl.constexpr(32 * 1024)
# power, v first: the program's columns, and the bits of sums a column at a time (128 rows, 64 for fp64)
OWNED_COLUMNS, PASSED_ROWS_BITS = tl.constexpr(64), tl.constexpr(32 * 128)
REDUCED = tl.constexpr(128)  # reduce: elements of the second vector; scratch is padded to multiples
REDUCED_BLOCKS = tl.constexpr(32)  # reduce: partial sums at a time
TILE_ROWS, TILE_COLUMNS = tl.constexpr(8), tl.constexpr(512)  # scale, products, gradient, second_gradient
SUMMED = tl.constexpr(128)  # elements at a time in the sum of a short list
MAX_PRODUCT_PROGRAMS = 512  # of one layer: each program of `gradient` adds up all their results
MAX_LENGTH = 2**30  # of rows and columns, which are counted in 32 bits; elements are counted in 64
POWER_WARPS, REDUCE_WARPS, TILE_WARPS = 8, 4, 8

# ---- the tables --------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """One row of the table of layers; behind it, (size, stride) of each group of columns, innermost first.

    `rows`, `columns` and `inner` are as above. The others are places on the scratch buffer: the first vector
    of the iteration (r if u goes first) and the sums of squares of its blocks, the partial sums of the second
    one, the second one and the sums of squares of its blocks, and the results and number of product programs.
    """

    rows: int
    columns: int
    inner: int
    first: int
    first_squares: int
    partial_sums: int
    second: int
    second_squares: int
    products: int
    product_programs: int


LAYER_FIELDS = tl.constexpr(len(_Layer._fields))
ROWS = tl.constexpr(_Layer._fields.index("rows"))
COLUMNS = tl.constexpr(_Layer._fields.index("columns"))
INNER = tl.constexpr(_Layer._fields.index("inner"))
FIRST = tl.constexpr(_Layer._fields.index("first"))
FIRST_SQUARES = tl.constexpr(_Layer._fields.index("first_squares"))
PARTIAL_SUMS = tl.constexpr(_Layer._fields.index("partial_sums"))
SECOND = tl.constexpr(_Layer._fields.index("second"))
SECOND_SQUARES = tl.constexpr(_Layer._fields.index("second_squares"))
PRODUCTS = tl.constexpr(_Layer._fields.index("products"))
PRODUCT_PROGRAMS = tl.constexpr(_Layer._fields.index("product_programs"))

# One row of the table of pointers: ALIGNED (0 or 1), W, u, v, then three or four that depend on the launch.
POINTER_FIELDS = tl.constexpr(8)
ALIGNED, WEIGHT, U, V = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
NORMALIZED, NEW_U, NEW_V = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
GRAD, GRAD_WEIGHT = tl.constexpr(4), tl.constexpr(5)
GRAD_GRAD_WEIGHT, GRAD_GRAD = tl.constexpr(6), tl.constexpr(7)

# What `products` sums up.
SIGMA, FIRST_ORDER, SECOND_ORDER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
PRODUCT_VALUES = tl.constexpr(3)  # room for the results of a program: <g,W>, q, <h,g>

# ---- device functions --------------------------------------------------------------------------------------


@triton.jit
def _this_program(programs, layers, pointers, GROUPS: tl.constexpr):
    """The number of the program's layer, its row of either table, and which of its blocks is meant."""
    number = tl.load(programs + 2 * tl.program_id(0))
    block = tl.load(programs + 2 * tl.program_id(0) + 1)
    return number, layers + number * (LAYER_FIELDS + 2 * GROUPS), pointers + number * POINTER_FIELDS, block


@triton.jit
def _matrix_shape(layer):
    rows = tl.load(layer + ROWS).to(tl.int32)
    columns = tl.load(layer + COLUMNS).to(tl.int32)
    inner = tl.load(layer + INNER).to(tl.int32)
    return rows, columns, inner


@triton.jit
def _scratch(scratch, layer, FIELD: tl.constexpr):
    """Where one of the layer's vectors lies on the scratch buffer."""
    return scratch + tl.multiple_of(tl.load(layer + FIELD), REDUCED)


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
    if tl.load(pointers + ALIGNED) != 0:
        elements, inside = _elements(pointers, FIELD, i, c, shape, DTYPE, 16)
        tile = tl.load(elements, mask=inside, other=0.0)
    else:
        elements, inside = _elements(pointers, FIELD, i, c, shape, DTYPE, 1)
        tile = tl.load(elements, mask=inside, other=0.0)
    return tile.to(SUM)


@triton.jit
def _store_tile(tile, pointers, FIELD: tl.constexpr, i, c, shape, DTYPE: tl.constexpr):
    if tl.load(pointers + ALIGNED) != 0:
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
        size = tl.load(layer + LAYER_FIELDS + 2 * group).to(tl.int32)
        stride = tl.load(layer + LAYER_FIELDS + 2 * group + 1).to(tl.int32)
        position += c % size * stride
        c = c // size
    return position


@triton.jit
def _load_u(pointers, i, rows, SUM: tl.constexpr):
    return tl.load(_pointer(pointers, U, SUM) + i, mask=i < rows, other=0.0)


@triton.jit
def _load_v(pointers, layer, c, columns, SUM: tl.constexpr, GROUPS: tl.constexpr):
    position = _logical_position(c, layer, GROUPS)
    return tl.load(_pointer(pointers, V, SUM) + position, mask=c < columns, other=0.0)


@triton.jit
def _sum(values, count, STRIDE: tl.constexpr):
    """The sum of a short list, in a fixed order."""
    total = tl.zeros([SUMMED], values.dtype.element_ty)
    for start in range(0, count, SUMMED):
        k = start + tl.arange(0, SUMMED)
        total += tl.load(values + k * STRIDE, mask=k < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _sum_tile(tile):
    return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def _denominator(squares, EPS: tl.constexpr, ADD_EPS: tl.constexpr):
    """den(n) of a vector by the sum of its squares."""
    norm = tl.sqrt(squares)
    eps = tl.full([], EPS, norm.dtype)
    if ADD_EPS:
        return norm + eps
    return tl.where(norm < eps, eps, norm)  # unlike maximum, keeps NaN


@triton.jit
def _normalized(
    scratch,
    layer,
    VECTOR: tl.constexpr,
    SQUARES: tl.constexpr,
    blocks,
    k,
    length,
    EPS: tl.constexpr,
    ADD_EPS: tl.constexpr,
):
    """Elements k of a vector on the scratch buffer, divided by den of its norm."""
    denominator = _denominator(_sum(_scratch(scratch, layer, SQUARES), blocks, 1), EPS, ADD_EPS)
    return tl.load(_scratch(scratch, layer, VECTOR) + k, mask=k < length, other=0.0) / denominator


@triton.jit
def _divide(x, sigma):
    """x / sigma, and zero where sigma is zero."""
    return tl.where(sigma == 0, 0.0, x / sigma)


@triton.jit
def _tiles_across(columns):
    return tl.maximum(tl.cdiv(columns, TILE_COLUMNS), 1)


@triton.jit
def _tile(block, columns):
    """The rows and the columns of a tile. The tiles of a matrix are counted row by row."""
    across = _tiles_across(columns)
    i = block // across * TILE_ROWS + tl.arange(0, TILE_ROWS)
    c = block % across * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
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
    U_FIRST: tl.constexpr,
    CONTINUE: tl.constexpr,  # from the second vector of the iteration before, not from the caller's u or v
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
        OWNED: tl.constexpr = OWNED_ROWS
        PASSED: tl.constexpr = PASSED_COLUMNS_BITS // SUM.primitive_bitwidth
        passed_size = columns
    else:
        PASSED_AXIS: tl.constexpr = 0
        OWNED: tl.constexpr = OWNED_COLUMNS
        PASSED: tl.constexpr = PASSED_ROWS_BITS // SUM.primitive_bitwidth
        passed_size = rows
    TILE: tl.constexpr = [OWNED, PASSED] if U_FIRST else [PASSED, OWNED]
    owned = block * OWNED + tl.arange(0, OWNED)
    if CONTINUE:
        second = _scratch(scratch, layer, SECOND)
        squares = _sum(_scratch(scratch, layer, SECOND_SQUARES), tl.cdiv(passed_size, REDUCED), 1)
        denominator = _denominator(squares, EPS, ADD_EPS)

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
        tile = _load_tile(pointers, WEIGHT, i, c, shape, DTYPE, SUM)
        products += tile * tl.expand_dims(factor, 1 - PASSED_AXIS)
    first = tl.sum(products, PASSED_AXIS)
    tl.store(_scratch(scratch, layer, FIRST) + owned, first)
    tl.store(_scratch(scratch, layer, FIRST_SQUARES) + block, tl.sum(first * first, 0))

    # Its share of M^T r, or of M t, for which the block is read again, now from the cache.
    passed_length = tl.cdiv(passed_size, REDUCED) * REDUCED
    partial_sums = _scratch(scratch, layer, PARTIAL_SUMS) + block.to(tl.int64) * passed_length
    for start in range(0, passed_length, PASSED):
        passed = start + tl.arange(0, PASSED)
        i, c = (owned, passed) if U_FIRST else (passed, owned)
        tile = _load_tile(pointers, WEIGHT, i, c, shape, DTYPE, SUM)
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
        blocks = tl.cdiv(rows, OWNED_ROWS)
        length = tl.cdiv(columns, REDUCED) * REDUCED
    else:
        blocks = tl.cdiv(columns, OWNED_COLUMNS)
        length = tl.cdiv(rows, REDUCED) * REDUCED
    denominator = _denominator(_sum(_scratch(scratch, layer, FIRST_SQUARES), blocks, 1), EPS, ADD_EPS)

    j = block * REDUCED + tl.arange(0, REDUCED)
    partial_sums = _scratch(scratch, layer, PARTIAL_SUMS)
    sums = tl.zeros([REDUCED_BLOCKS, REDUCED], scratch.dtype.element_ty)
    for start in range(0, blocks, REDUCED_BLOCKS):
        k = start + tl.arange(0, REDUCED_BLOCKS)
        inside = (k < blocks)[:, None] & (j < length)[None, :]
        sums += tl.load(partial_sums + k.to(tl.int64)[:, None] * length + j[None, :], mask=inside, other=0.0)
    second = tl.sum(sums, 0) / denominator
    tl.store(_scratch(scratch, layer, SECOND) + j, second)
    tl.store(_scratch(scratch, layer, SECOND_SQUARES) + block, tl.sum(second * second, 0))


@triton.jit
def _scale_kernel(
    layers,
    pointers,
    programs,
    scratch,
    sigmas,
    DTYPE: tl.constexpr,
    GROUPS: tl.constexpr,
    U_FIRST: tl.constexpr,
    ITERATED: tl.constexpr,
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
            U_VECTOR: tl.constexpr = FIRST
            U_SQUARES: tl.constexpr = FIRST_SQUARES
            V_VECTOR: tl.constexpr = SECOND
            V_SQUARES: tl.constexpr = SECOND_SQUARES
            u_blocks = tl.cdiv(rows, OWNED_ROWS)
            v_blocks = tl.cdiv(columns, REDUCED)
            second_blocks = v_blocks
        else:
            U_VECTOR: tl.constexpr = SECOND
            U_SQUARES: tl.constexpr = SECOND_SQUARES
            V_VECTOR: tl.constexpr = FIRST
            V_SQUARES: tl.constexpr = FIRST_SQUARES
            u_blocks = tl.cdiv(rows, REDUCED)
            v_blocks = tl.cdiv(columns, OWNED_COLUMNS)
            second_blocks = u_blocks
        # sigma = second . second / den(|second|)
        squares = _sum(_scratch(scratch, layer, SECOND_SQUARES), second_blocks, 1)
        sigma = squares / _denominator(squares, EPS, ADD_EPS)
        # The tiles on the matrix's left edge write u, those on its top edge v.
        if block % _tiles_across(columns) == 0:
            u = _normalized(scratch, layer, U_VECTOR, U_SQUARES, u_blocks, i, rows, EPS, ADD_EPS)
            tl.store(_pointer(pointers, NEW_U, SUM) + i, u, mask=i < rows)
        if block < _tiles_across(columns):
            v = _normalized(scratch, layer, V_VECTOR, V_SQUARES, v_blocks, c, columns, EPS, ADD_EPS)
            position = _logical_position(c, layer, GROUPS)
            tl.store(_pointer(pointers, NEW_V, SUM) + position, v, mask=c < columns)
    else:
        product_programs = tl.load(layer + PRODUCT_PROGRAMS).to(tl.int32)
        sigma = _sum(_scratch(scratch, layer, PRODUCTS), product_programs, PRODUCT_VALUES)
    if block == 0:
        tl.store(sigmas + number, sigma)

    weight = _load_tile(pointers, WEIGHT, i, c, shape, DTYPE, SUM)
    _store_tile(_divide(weight, sigma), pointers, NORMALIZED, i, c, shape, DTYPE)


# ---- gradients ---------------------------------------------------------------------------------------------


@triton.jit
def _products_kernel(
    layers,
    pointers,
    programs,
    scratch,
    DTYPE: tl.constexpr,
    GROUPS: tl.constexpr,
    WHAT: tl.constexpr,  # SIGMA: u^T W v.  FIRST_ORDER: <g,W>.  SECOND_ORDER: <g,W>, u^T h v and <h,g>.
):
    _, layer, pointers, block = _this_program(programs, layers, pointers, GROUPS)
    shape = _matrix_shape(layer)
    rows, columns, _ = shape
    product_programs = tl.load(layer + PRODUCT_PROGRAMS).to(tl.int32)
    tiles = tl.cdiv(rows, TILE_ROWS) * tl.cdiv(columns, TILE_COLUMNS)
    SUM: tl.constexpr = scratch.dtype.element_ty

    products = tl.zeros([], SUM)
    bilinear = tl.zeros([], SUM)
    gradients = tl.zeros([], SUM)
    for tile in range(block, tiles, product_programs):
        i, c = _tile(tile, columns)
        weight = _load_tile(pointers, WEIGHT, i, c, shape, DTYPE, SUM)
        if WHAT == SIGMA:
            u = _load_u(pointers, i, rows, SUM)
            v = _load_v(pointers, layer, c, columns, SUM, GROUPS)
            products += _sum_tile(weight * u[:, None] * v[None, :])
        else:
            grad = _load_tile(pointers, GRAD, i, c, shape, DTYPE, SUM)
            products += _sum_tile(grad * weight)
        if WHAT == SECOND_ORDER:
            u = _load_u(pointers, i, rows, SUM)
            v = _load_v(pointers, layer, c, columns, SUM, GROUPS)
            grad_grad_weight = _load_tile(pointers, GRAD_GRAD_WEIGHT, i, c, shape, DTYPE, SUM)
            bilinear += _sum_tile(grad_grad_weight * u[:, None] * v[None, :])
            gradients += _sum_tile(grad_grad_weight * grad)

    result = _scratch(scratch, layer, PRODUCTS) + block * PRODUCT_VALUES
    tl.store(result, products)
    if WHAT == SECOND_ORDER:
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

    product_programs = tl.load(layer + PRODUCT_PROGRAMS).to(tl.int32)
    sigma = tl.load(sigmas + number)
    product = _sum(_scratch(scratch, layer, PRODUCTS), product_programs, PRODUCT_VALUES)
    u = _load_u(pointers, i, rows, SUM) * _divide(_divide(product, sigma), sigma)
    v = _load_v(pointers, layer, c, columns, SUM, GROUPS)
    grad = _load_tile(pointers, GRAD, i, c, shape, DTYPE, SUM)
    grad_weight = _divide(grad, sigma) - u[:, None] * v[None, :]
    _store_tile(grad_weight, pointers, GRAD_WEIGHT, i, c, shape, DTYPE)


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

    product_programs = tl.load(layer + PRODUCT_PROGRAMS).to(tl.int32)
    results = _scratch(scratch, layer, PRODUCTS)
    sigma = tl.load(sigmas + number)
    product = _divide(_sum(results, product_programs, PRODUCT_VALUES), sigma)
    bilinear = _divide(_divide(_sum(results + 1, product_programs, PRODUCT_VALUES), sigma), sigma)
    gradients = _divide(_divide(_sum(results + 2, product_programs, PRODUCT_VALUES), sigma), sigma)

    weight = _load_tile(pointers, WEIGHT, i, c, shape, DTYPE, SUM)
    grad_grad_weight = _load_tile(pointers, GRAD_GRAD_WEIGHT, i, c, shape, DTYPE, SUM)
    grad_grad = _divide(grad_grad_weight, sigma) - bilinear * weight
    _store_tile(grad_grad, pointers, GRAD_GRAD, i, c, shape, DTYPE)

    u = _load_u(pointers, i, rows, SUM) * (2 * product * bilinear - gradients)
    v = _load_v(pointers, layer, c, columns, SUM, GROUPS)
    grad = _load_tile(pointers, GRAD, i, c, shape, DTYPE, SUM)
    grad_weight = u[:, None] * v[None, :] - bilinear * grad
    _store_tile(grad_weight, pointers, GRAD_WEIGHT, i, c, shape, DTYPE)


# ---- host: how weights lie in memory -----------------------------------------------------------------------


class _Matrix(NamedTuple):
    """A dense weight in memory as [outer, rows, inner].

    `groups` maps columns to logical ones: (size, stride) of each run of dimensions that are neighbours in
    both orders, innermost first.
    """

    rows: int
    columns: int
    inner: int
    groups: tuple[tuple[int, int], ...]


@functools.lru_cache(maxsize=4096)
def _matrix(shape: tuple[int, ...], strides: tuple[int, ...], dim: int) -> _Matrix | None:
    """None if the weight is not dense."""
    rows = shape[dim]
    columns = _product(size for d, size in enumerate(shape) if d != dim)
    if max(rows, columns) > MAX_LENGTH:
        raise ValueError(
            f"spectral_norm: the matrix of a weight is {rows} x {columns}; at most {MAX_LENGTH} rows and "
            f"columns are accepted"
        )
    if rows * columns == 0:
        return _Matrix(rows, columns, inner=1, groups=((1, 1),))

    in_memory = sorted((d for d, size in enumerate(shape) if size > 1), key=lambda d: -strides[d])
    step = 1
    for d in reversed(in_memory):
        if strides[d] != step:
            return None
        step *= shape[d]
    inner = columns  # a single row: everything is behind it
    if dim in in_memory:
        inner = _product(shape[d] for d in in_memory[in_memory.index(dim) + 1 :])

    logical_strides = {}
    step = 1
    for d in reversed(range(len(shape))):
        if d != dim:
            logical_strides[d] = step
            step *= shape[d]
    groups: list[tuple[int, int]] = []
    for d in reversed(in_memory):
        if d == dim:
            continue
        if groups and logical_strides[d] == groups[-1][0] * groups[-1][1]:
            groups[-1] = (groups[-1][0] * shape[d], groups[-1][1])
        else:
            groups.append((shape[d], logical_strides[d]))
    return _Matrix(rows, columns, inner, tuple(groups) or ((1, 1),))


def _product(sizes) -> int:
    return functools.reduce(lambda a, b: a * b, sizes, 1)


def _dense(weight: Tensor, dim: int) -> tuple[Tensor, _Matrix]:
    """The weight, or a dense copy with the order of its strides, which is what torch's functions return."""
    weight = weight.detach()
    matrix = _matrix(weight.shape, weight.stride(), dim)
    if matrix is None:
        return _dense(weight.clone(), dim)
    return weight, matrix


def _laid_out_like(weight: Tensor, other: Tensor) -> Tensor:
    other = other.detach()
    return other if other.stride() == weight.stride() else torch.empty_like(weight).copy_(other)


def _sum_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _state_sizes(weights: Sequence[Tensor], dims: Sequence[int]) -> list[int]:
    """The lengths of the state's parts: the sigmas, then u and v of each layer."""
    sizes = [len(weights)]
    for weight, dim in zip(weights, dims):
        sizes += (weight.shape[dim], _product(size for d, size in enumerate(weight.shape) if d != dim))
    return sizes


def _vectors(state: Tensor, weights: Sequence[Tensor], dims: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Views of the state: u of each layer, v of each layer."""
    _, *vectors = state.split(_state_sizes(weights, dims))
    return vectors[::2], vectors[1::2]


# ---- host: the tables --------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """The tables that follow from the shapes, on the device, and the size of the scratch buffer."""

    layers: Tensor
    groups: int
    power_programs: Tensor
    reduce_programs: Tensor
    product_programs: Tensor
    tile_programs: Tensor
    scratch_size: int


@functools.cache
def _plan(matrices: tuple[_Matrix | None, ...], u_first: bool, device: torch.device) -> _Plan:
    """A layer that is None gets no programs, but keeps its number.

    Kept for good, since other streams may still read it, and a captured graph does at every replay.
    """
    groups = max(len(matrix.groups) for matrix in matrices if matrix)
    scratch_size = 0

    def allocate(count: int) -> int:
        nonlocal scratch_size
        scratch_size += _blocks(count, REDUCED) * REDUCED.value
        return scratch_size - _blocks(count, REDUCED) * REDUCED.value

    layers, counts = [], []
    for matrix in matrices:
        if matrix is None:
            layers.append([0] * (LAYER_FIELDS.value + 2 * groups))
            counts.append((0, 0, 0, 0))
            continue
        rows, columns, inner, layer_groups = matrix
        if u_first:
            power, passed = _blocks(rows, OWNED_ROWS), columns
        else:
            power, passed = _blocks(columns, OWNED_COLUMNS), rows
        reduce = _blocks(passed, REDUCED)
        tiles = _blocks(rows, TILE_ROWS) * _blocks(columns, TILE_COLUMNS)
        products = min(tiles, MAX_PRODUCT_PROGRAMS)
        layer = _Layer(
            rows=rows,
            columns=columns,
            inner=inner,
            first=allocate(rows if u_first else columns),
            first_squares=allocate(power),
            partial_sums=allocate(power * reduce * REDUCED.value),
            second=allocate(passed),
            second_squares=allocate(reduce),
            products=allocate(products * PRODUCT_VALUES.value),
            product_programs=products,
        )
        padding = [(1, 0)] * (groups - len(layer_groups))
        layers.append([*layer, *(x for group in (*layer_groups, *padding) for x in group)])
        counts.append((power, reduce, products, tiles))

    programs = [
        [(number, block) for number, count in enumerate(kind) for block in range(count)] for kind in zip(*counts)
    ]
    return _Plan(
        torch.tensor(layers, dtype=torch.int64, device=device),
        groups,
        *(torch.tensor(table, dtype=torch.int32, device=device) for table in programs),
        scratch_size,
    )


def _blocks(count: int, size: tl.constexpr) -> int:
    """Programs for `count` things. One for none: it reads nothing, but writes the results for nothing."""
    return max(1, -(-count // size.value))


@functools.lru_cache(maxsize=1024)
def _pointer_table(rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    """Uploaded as the scalars of a foreach function: these travel as arguments of a kernel, so that nothing
    waits and, unlike a copy from the host's memory, the upload can be captured in a CUDA graph. Each stream
    has its own, which puts the upload before its readers, and these before the next owner of the memory."""
    table = torch.zeros(len(rows) * POINTER_FIELDS.value, dtype=torch.int64, device=device)
    torch._foreach_add_(table.unbind(), [value for row in rows for value in row])
    return table


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
        matrices: Sequence[_Matrix | None],
        like_weights: Sequence[Sequence[Tensor | None]],
        like_vectors: Sequence[Sequence[Tensor]],
        u_first: bool = True,
    ) -> None:
        """The table of pointers has W, u, v, then the rest of `like_weights`, which starts with W and whose
        tensors are laid out as the weights are, then the rest of `like_vectors`, which starts with u and v.
        Layers whose matrix is None are left out. `u_first` matters to the power iteration only."""
        weights, *like_weights = like_weights
        us, vs, *like_vectors = like_vectors
        weight = next(weight for weight, matrix in zip(weights, matrices) if matrix)
        stream, capturing = 0, False
        if weight.is_cuda:
            stream = torch.cuda.current_stream(weight.device).cuda_stream
            capturing = torch.cuda.is_current_stream_capturing()
        self.plan = _plan(tuple(matrices), u_first, weight.device)

        columns = (weights, us, vs, *like_weights, *like_vectors)
        padding = [0] * (POINTER_FIELDS.value - 1 - len(columns))
        vector = 16 // weight.element_size()
        rows = []
        for matrix, *tensors in zip(matrices, *columns):
            if matrix is None:
                rows.append((0,) * POINTER_FIELDS.value)
                continue
            pointers = [tensor.data_ptr() for tensor in tensors]
            tiles = (pointers[0], *pointers[3 : 3 + len(like_weights)])
            aligned = matrix.inner % vector == 0 and all(pointer % 16 == 0 for pointer in tiles)
            rows.append((int(aligned), *pointers, *padding))
        # A table that is uploaded within a capture lies in the graph's memory and is filled at replay only.
        pointer_table = _pointer_table.__wrapped__ if capturing else _pointer_table
        self.pointers = pointer_table(tuple(rows), weight.device, stream)

        self.scratch = torch.empty(self.plan.scratch_size, dtype=_sum_dtype(weight), device=weight.device)
        self.tensors = columns  # alive until everything is launched
        self.dtype = _TRITON_DTYPES[weight.dtype]

    def launch(self, kernel, programs: Tensor, num_warps: int, *arguments: Tensor, **constexprs) -> None:
        tables = (self.plan.layers, self.pointers, programs, self.scratch)
        kernel[(len(programs),)](
            *tables, *arguments, DTYPE=self.dtype, GROUPS=self.plan.groups, **constexprs, num_warps=num_warps
        )


# ---- host: the launchers -----------------------------------------------------------------------------------
# The kernels of gankern/ops/spectral_norm.py: the contract stands there. The weights and gradients of a call
# have one dtype. Nothing given is written to.


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

    A weight whose sigma is zero becomes zeros. Launches: 2 n_power_iterations + 1; without iterations 3, of
    which one copies u and v. u and v that are not contiguous vectors in the type of the sums cost another one.
    """
    weights, matrices = zip(*map(_dense, weights, dims))
    normalized = [torch.empty_like(weight) for weight in weights]
    sums = _sum_dtype(weights[0])
    state = weights[0].new_empty(sum(_state_sizes(weights, dims)), dtype=sums)
    new_us, new_vs = _vectors(state, weights, dims)

    iterated = n_power_iterations > 0
    if not iterated or any(x.dtype != sums or not x.is_contiguous() for x in (*us, *vs)):
        # The kernels then read these, before `scale` overwrites them.
        torch._foreach_copy_([*new_us, *new_vs], [x.detach() for x in (*us, *vs)])
        us, vs = new_us, new_vs
    call = _Call(matrices, [weights, normalized], [us, vs, new_us, new_vs], u_first)
    order = {"U_FIRST": u_first, "EPS": eps, "ADD_EPS": add_eps}
    for iteration in range(n_power_iterations):
        call.launch(_power_kernel, call.plan.power_programs, POWER_WARPS, CONTINUE=iteration > 0, **order)
        call.launch(_reduce_kernel, call.plan.reduce_programs, REDUCE_WARPS, **order)
    if not iterated:
        call.launch(_products_kernel, call.plan.product_programs, TILE_WARPS, WHAT=SIGMA.value)
    call.launch(_scale_kernel, call.plan.tile_programs, TILE_WARPS, state, ITERATED=iterated, **order)
    return normalized, state


def backward(
    grads: Sequence[Tensor | None], weights: Sequence[Tensor], state: Tensor, dims: Sequence[int]
) -> list[Tensor]:
    """The gradients of the weights, with the strides of the weights; empty where the gradient is None.
    Launches: 2."""
    inputs = _GradientInputs(weights, state, dims, grads)
    grad_weights = inputs.empty_results()
    if not inputs.present:
        return grad_weights
    call = _Call(inputs.matrices, [inputs.weights, *inputs.gradients, grad_weights], inputs.vectors)
    call.launch(_products_kernel, call.plan.product_programs, TILE_WARPS, WHAT=FIRST_ORDER.value)
    call.launch(_gradient_kernel, call.plan.tile_programs, TILE_WARPS, state)
    return grad_weights


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
    like_weights = [inputs.weights, grads, grad_weights, grad_grad_weights, grad_grads]
    call = _Call(inputs.matrices, like_weights, inputs.vectors)
    call.launch(_products_kernel, call.plan.product_programs, TILE_WARPS, WHAT=SECOND_ORDER.value)
    call.launch(_second_gradient_kernel, call.plan.tile_programs, TILE_WARPS, state)
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
        self.matrices: list[_Matrix | None] = [None for _ in layers]
        self.weights: list[Tensor | None] = [None for _ in layers]
        self.gradients: list[list[Tensor | None]] = [[None for _ in layers] for _ in gradients]
        self.vectors = _vectors(state, weights, dims)
        self.model = weights[0]
        for i in self.present:
            weight, self.matrices[i] = _dense(weights[i], dims[i])
            self.weights[i] = weight
            for dense, given in zip(self.gradients, gradients):
                dense[i] = _laid_out_like(weight, given[i])

    def empty_results(self) -> list[Tensor]:
        """A new tensor a layer: laid out as the weight, or without elements."""
        return [torch.empty_like(weight) if weight is not None else self.model.new_empty(0) for weight in self.weights]


# ---- what the ahead-of-time check compiles -----------------------------------------------------------------


def _aot_entries() -> list[AotEntry]:
    """fp32 is what mostly runs, and in full; fp64 has the widest elements and sums, bf16 the narrowest."""
    entries = []

    def add(kernel, num_warps, *more_arguments, **constexprs):
        sums = "*fp64" if constexprs["DTYPE"] == tl.float64 else "*fp32"
        arguments = {"layers": "*i64", "pointers": "*i64", "programs": "*i32", "scratch": sums}
        arguments.update((name, sums) for name in more_arguments)
        entries.append(AotEntry(kernel, arguments, constexprs, num_warps))

    for dtype, groups in ((tl.float64, 4), (tl.float32, 1), (tl.bfloat16, 2)):
        dtypes = {"DTYPE": dtype, "GROUPS": groups}
        u_first = {**dtypes, "U_FIRST": True, "EPS": 1e-12, "ADD_EPS": False}
        v_first = {**dtypes, "U_FIRST": False, "EPS": 1e-12, "ADD_EPS": True}
        add(_power_kernel, POWER_WARPS, **v_first, CONTINUE=True)
        add(_scale_kernel, TILE_WARPS, "sigmas", **u_first, ITERATED=True)
        add(_second_gradient_kernel, TILE_WARPS, "sigmas", **dtypes)
        if dtype != tl.bfloat16:
            add(_power_kernel, POWER_WARPS, **u_first, CONTINUE=False)
            add(_products_kernel, TILE_WARPS, **dtypes, WHAT=SECOND_ORDER.value)
        if dtype == tl.float32:  # these do less than the ones above
            add(_reduce_kernel, REDUCE_WARPS, **u_first)
            add(_scale_kernel, TILE_WARPS, "sigmas", **v_first, ITERATED=False)
            add(_products_kernel, TILE_WARPS, **dtypes, WHAT=SIGMA.value)
            add(_gradient_kernel, TILE_WARPS, "sigmas", **dtypes)
    return entries


AOT = _aot_entries()
