"""The tables in which the kernels of spectral norm find their layers, and how weights lie in memory.

gankern/triton/spectral_norm.py says what they are for. Nothing here is a kernel: what the kernels share with these
tables, they ask by name, from functions that are called when they are compiled.
"""

import functools
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from gankern.triton.launch import Addresses, capturing

T = TypeVar("T")

MAX_PRODUCT_PROGRAMS = 512  # of one layer: each program of `gradient` adds up all their results
MAX_LENGTH = 2**30  # of rows and columns, which are counted in 32 bits; elements are counted in 64


@triton.constexpr_function
def extent(name: str) -> int:
    """Sizes of the work of one program, and of the tables' rows."""
    return {
        # power, u first: the program's rows, and the bits of sums a row at a time (1024 columns, 512 for fp64)
        "owned_rows": 8,
        "passed_columns_bits": 32 * 1024,
        # power, v first: the program's columns, and the bits of sums a column at a time (128 rows, 64 for fp64)
        "owned_columns": 64,
        "passed_rows_bits": 32 * 128,
        "reduced": 128,  # reduce: elements of the second vector; scratch is padded to multiples
        "reduced_blocks": 32,  # reduce: partial sums at a time
        "tile_rows": 8,  # scale, products, gradient, second_gradient
        "tile_columns": 512,
        "summed": 128,  # elements at a time in the sum of a short list
        "product_values": 3,  # room for the results of a program of `products`: <g,W>, q, <h,g>
        "layer_fields": 10,
        "pointer_fields": 8,
    }[name]


@triton.constexpr_function
def column(name: str) -> int:
    """Where a value stands in a row of the table of layers."""
    return {
        "rows": 0,
        "columns": 1,
        "inner": 2,
        "first": 3,
        "first_norms": 4,
        "partial_sums": 5,
        "second": 6,
        "second_norms": 7,
        "products": 8,
        "product_programs": 9,
    }[name]


@triton.constexpr_function
def pointer(name: str) -> int:
    """Where an address stands in a row of the table of pointers, behind whether all of them are aligned (0 or 1): W, u
    and v, then three or four that depend on the launch."""
    return {
        "aligned": 0,
        "weight": 1,
        "u": 2,
        "v": 3,
        "normalized": 4,
        "new_u": 5,
        "new_v": 6,
        "grad": 4,
        "grad_weight": 5,
        "grad_grad_weight": 6,
        "grad_grad": 7,
    }[name]


POINTER_FIELDS = extent("pointer_fields")


class Layer(NamedTuple):
    """One row of the table of layers; behind it, (size, stride) of each group of columns, innermost first.

    `rows`, `columns` and `inner` are as above. The others are places on the scratch buffer: the first vector
    of the iteration (r if u goes first) and the norms of its blocks, the partial sums of the second
    one, the second one and the norms of its blocks, and the results and number of product programs.
    """

    rows: int
    columns: int
    inner: int
    first: int
    first_norms: int
    partial_sums: int
    second: int
    second_norms: int
    products: int
    product_programs: int


class Matrix(NamedTuple):
    """A dense weight in memory as [outer, rows, inner].

    `groups` maps columns to logical ones: (size, stride) of each run of dimensions that are neighbours in
    both orders, innermost first.
    """

    rows: int
    columns: int
    inner: int
    groups: tuple[tuple[int, int], ...]


@functools.lru_cache(maxsize=4096)
def matrix_of(shape: tuple[int, ...], strides: tuple[int, ...], dim: int) -> Matrix | None:
    """None if the weight is not dense."""
    rows = shape[dim]
    columns = product(size for d, size in enumerate(shape) if d != dim)
    if max(rows, columns) > MAX_LENGTH:
        raise ValueError(
            f"spectral_norm: the matrix of a weight is {rows} x {columns}; at most {MAX_LENGTH} rows and "
            f"columns are accepted"
        )
    if rows * columns == 0:
        return Matrix(rows, columns, inner=1, groups=((1, 1),))

    in_memory = sorted((d for d, size in enumerate(shape) if size > 1), key=lambda d: -strides[d])
    step = 1
    for d in reversed(in_memory):
        if strides[d] != step:
            return None
        step *= shape[d]
    inner = columns  # a single row: everything is behind it
    if dim in in_memory:
        inner = product(shape[d] for d in in_memory[in_memory.index(dim) + 1 :])

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
    return Matrix(rows, columns, inner, tuple(groups) or ((1, 1),))


def product(sizes: Iterable[int]) -> int:
    return functools.reduce(lambda a, b: a * b, sizes, 1)


def outside_of_pools(make: Callable[[], T], device: torch.device) -> T:
    """What ``make`` gives, made by a thread of its own, for memory that is kept between calls.

    torch.compile's CUDA graphs, and torch.cuda.use_mem_pool, have the thread that calls allocate in a pool of theirs.
    Such graphs take what lives in their pool without being a result of theirs for free, and would give it to others
    while our kernels still read it. What another thread allocates comes from the device's common memory.
    """
    if capturing(device):
        raise RuntimeError(
            "spectral_norm: the first call with these shapes copies their table to the device, which no CUDA graph "
            "captures; run the step once before it is captured"
        )
    made: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            made.append(make())
        except BaseException as error:  # raised again below, in the thread that called
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return made[0]


class Plan(NamedTuple):
    """The tables that follow from the shapes, on the device, and the size of the scratch buffer."""

    layers: Tensor
    groups: int
    power_programs: Tensor
    reduce_programs: Tensor
    product_programs: Tensor
    tile_programs: Tensor
    scratch_size: int


@functools.cache
def plan_of(matrices: tuple[Matrix | None, ...], u_first: bool, device: torch.device) -> Plan:
    """A layer that is None gets no programs, but keeps its number.

    Kept for good, since other streams may still read it, and a captured graph does at every replay. Made once, it is
    no step of what a launcher does at each call.
    """
    groups = max(len(matrix.groups) for matrix in matrices if matrix)
    scratch_size = 0

    def allocate(count: int) -> int:
        nonlocal scratch_size
        scratch_size += blocks_of(count, extent("reduced")) * extent("reduced")
        return scratch_size - blocks_of(count, extent("reduced")) * extent("reduced")

    layers, counts = [], []
    for matrix in matrices:
        if matrix is None:
            layers.append([0] * (extent("layer_fields") + 2 * groups))
            counts.append((0, 0, 0, 0))
            continue
        rows, columns, inner, layer_groups = matrix
        if u_first:
            power, passed = blocks_of(rows, extent("owned_rows")), columns
        else:
            power, passed = blocks_of(columns, extent("owned_columns")), rows
        reduce = blocks_of(passed, extent("reduced"))
        tiles = blocks_of(rows, extent("tile_rows")) * blocks_of(columns, extent("tile_columns"))
        products = min(tiles, MAX_PRODUCT_PROGRAMS)
        layer = Layer(
            rows=rows,
            columns=columns,
            inner=inner,
            first=allocate(rows if u_first else columns),
            first_norms=allocate(power),
            partial_sums=allocate(power * reduce * extent("reduced")),
            second=allocate(passed),
            second_norms=allocate(reduce),
            products=allocate(products * extent("product_values")),
            product_programs=products,
        )
        padding = [(1, 0)] * (groups - len(layer_groups))
        layers.append([*layer, *(x for group in (*layer_groups, *padding) for x in group)])
        counts.append((power, reduce, products, tiles))

    programs = [
        [(number, block) for number, count in enumerate(kind) for block in range(count)] for kind in zip(*counts)
    ]
    tables = [(layers, torch.int64), *((table, torch.int32) for table in programs)]
    of_layers, *of_programs = outside_of_pools(
        lambda: [torch.tensor(table, dtype=dtype, device=device) for table, dtype in tables], device
    )
    power_programs, reduce_programs, product_programs, tile_programs = of_programs
    return Plan(of_layers, groups, power_programs, reduce_programs, product_programs, tile_programs, scratch_size)


def blocks_of(count: int, each: int) -> int:
    """Programs for `count` things. One for none: it reads nothing, but writes the results for nothing."""
    return max(1, -(-count // each))


# Of one call on one stream, for the sets of addresses that it meets; where one more comes, the oldest is overwritten.
POINTER_TABLES = 64


class _StreamTables:
    """The tables of one stream: rows of one piece of memory, each for a set of addresses."""

    def __init__(self, size: int, device: torch.device) -> None:
        empty = functools.partial(torch.empty, POINTER_TABLES, size, dtype=torch.int64, device=device)
        self.memory = outside_of_pools(empty, device)
        if device.type == "cuda":
            # It was allocated on the default stream, where its former owner may still be at work; and lives as long as
            # this stream reads it.
            stream = torch.cuda.current_stream(device)
            stream.wait_stream(torch.cuda.default_stream(device))
            self.memory.record_stream(stream)
        self.rows = self.memory.unbind()
        self.known: dict[Hashable, Tensor] = {}
        self.used = 0

    def place(self, addresses: Hashable) -> Tensor:
        """A row for these addresses. Whoever read it before did so earlier on this stream."""
        if len(self.known) == POINTER_TABLES:
            self.known.pop(next(iter(self.known)))
        self.known[addresses] = row = self.rows[self.used % POINTER_TABLES]
        self.used += 1
        return row


class PointerTables:
    """The tables of pointers of a call whose shapes stay, one for each set of addresses, each uploaded once.

    A table holds addresses and nothing else, so that it is right for whatever lies there: what a launch finds at them
    follows from the shapes.

    Args:
        matrices: of the layers; None for those that are left out.
        tiles: which of a layer's addresses are of tensors that are laid out as the weight is.
        vector: how many elements are 16 bytes.
        device: where the tables are.
    """

    def __init__(
        self, matrices: Sequence[Matrix | None], tiles: Sequence[int], vector: int, device: torch.device
    ) -> None:
        self.vectors = [matrix is not None and matrix.inner % vector == 0 for matrix in matrices]
        self.tiles, self.device = tiles, device
        self.streams: dict[int, _StreamTables] = {}

    def __call__(self, addresses: Addresses) -> Tensor:
        """The table of these addresses, those of the first layer first.

        Each stream has tables of its own, which puts the upload before its readers, and these before the next owner of
        the memory. One that is uploaded within a capture lies in the graph's memory, is filled at each replay, and is
        nobody else's."""
        size = len(self.vectors) * POINTER_FIELDS
        if capturing(self.device):
            return self.upload(addresses, torch.empty(size, dtype=torch.int64, device=self.device))
        stream = torch._C._cuda_getCurrentRawStream(self.device.index) if self.device.type == "cuda" else 0
        tables = self.streams.get(stream)
        if tables is None:
            tables = self.streams[stream] = _StreamTables(size, self.device)
        table = tables.known.get(addresses)
        return self.upload(addresses, tables.place(addresses)) if table is None else table

    def upload(self, addresses: Addresses, table: Tensor) -> Tensor:
        """As the scalars of a foreach function: these travel as arguments of a kernel, so that nothing waits and,
        unlike a copy from the host's memory, the upload can be captured in a CUDA graph."""
        each = len(addresses) // len(self.vectors)
        values: list[int] = []
        for layer, fits in enumerate(self.vectors):
            of_layer = [addresses[place] for place in range(layer * each, (layer + 1) * each)]
            aligned = fits and all(of_layer[place] % 16 == 0 for place in self.tiles)
            values += (int(aligned), *of_layer, *[0] * (POINTER_FIELDS - 1 - each))
        table.zero_()
        torch._foreach_add_(table.unbind(), values)
        return table
