"""Batch normalisation and a (leaky) ReLU or PReLU, each order in two sweeps over memory.

Formulas: csrc/cpu/batch_norm_act.cpp. With w = x - mean, every order is sums over each channel (of x and its squares;
of g' and g' w; of these, h, h w and g' h), terms that follow from the sums, and results that are sums of products of
what was read with coefficients made of the terms and of the affine values.

Split. A program takes some channels and a range of their values: BLOCK_M by BLOCK_C of them at a time, one channel
where a channel's values are neighbours, 32 where channels are (channels_last). Where affine values are each sample's
own, no range holds values of two samples. Sums of ranges go to memory, [groups, splits, sums, C], and one program a
block of channels adds them up in a fixed order; the split depends on the shape alone. Where a channel has one range,
its program does all three in one launch. A variant does it for large maps too: programs sum up ranges of some channels
while others make the values of those that were summed up before (`_together_kernel`); who does what is a matter of
tickets, and no sum's order depends on it.

Traffic. Forward reads x twice and writes y; backward reads x and g twice and writes dx; double backward reads x, g and
h twice and writes two. In one launch the second time is from a cache: as much from memory as each order has operands.
The second time all goes backwards, programs and what each of them reads: what was read last is in the caches still.
Bound by memory. Sums are in fp32 (fp64 for fp64), sums of sums in fp64; sums of squares are taken about the mean of a
range's first values.

Of group normalisation the channels are those of all samples, as of instance normalisation, and a statistic is that of
`members` neighbouring ones: their sums are added up where those of ranges are. Of large maps a program does one block
of whole statistics after the other, and as many programs run at once as have room in the second-level cache for what
they read twice (`in_turn`); where neighbours are channels a block is 32 bytes of them, all that memory gives at once.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gankern.triton._norm_act import (
    _apply_kernel,
    _evaluation_kernel,
    _moments_kernel,
    _reduce_kernel,
    _settle_kernel,
    _settle_moments_kernel,
    _together_kernel,
)
from gankern.triton.launch import (
    Blocks,
    ceil_div,
    contiguous,
    index_type,
    laid_out_as,
    launch,
    next_power_of_2,
    planned,
    sum_dtype,
    sum_type,
)
from gankern.triton.sums import sum_of_parts

WARPS = 4
BLOCKS = Blocks(
    # Values of a tile; in channels_last how many of them are neighbouring channels; DEEP: tiles that are added up at a
    # time; AHEAD: megabytes that are summed up before values of the first ones are made, by one launch, 0 for a launch
    # of each.
    "batch_norm_act",
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 0},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 2, "num_warps": 4, "AHEAD": 0},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 4, "num_warps": 4, "AHEAD": 0},
    {"TILE": 1024, "CHANNELS": 64, "DEEP": 2, "num_warps": 4, "AHEAD": 0},
    {"TILE": 1024, "CHANNELS": 16, "DEEP": 1, "num_warps": 4, "AHEAD": 0},
    {"TILE": 2048, "CHANNELS": 32, "DEEP": 1, "num_warps": 8, "AHEAD": 0},
    {"TILE": 2048, "CHANNELS": 64, "DEEP": 1, "num_warps": 8, "AHEAD": 0},
    {"TILE": 4096, "CHANNELS": 64, "DEEP": 1, "num_warps": 8, "AHEAD": 0},
    {"TILE": 2048, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 0},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 8},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 16},
    {"TILE": 2048, "CHANNELS": 32, "DEEP": 1, "num_warps": 8, "AHEAD": 8},
    {"TILE": 2048, "CHANNELS": 32, "DEEP": 1, "num_warps": 8, "AHEAD": 16},
)
# Of instance and group normalisation. AT_ONCE: megabytes that all programs together read twice at a time, where they
# take turns; 0 for launches as above.
TURNS = (
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 0, "AT_ONCE": 48},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 0, "AT_ONCE": 32},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 0, "AT_ONCE": 96},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 0, "AT_ONCE": 0},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 2, "num_warps": 4, "AHEAD": 0, "AT_ONCE": 0},
    {"TILE": 2048, "CHANNELS": 32, "DEEP": 1, "num_warps": 8, "AHEAD": 0, "AT_ONCE": 0},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 8, "AT_ONCE": 0},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 16, "AT_ONCE": 0},
)
INSTANCES, GROUPS = Blocks("instance_norm_act", *TURNS), Blocks("group_norm_act", *TURNS)
WHOLE_WARPS, WHOLE_DEEP = 8, 4  # of programs that take turns, whose lanes ask for so many 16 bytes of a map at once
ROW = 32  # bytes of channels of a program's block of whole statistics, at least
MOST = 64  # channels of such a block
FEWEST = 128  # programs that fill a GPU with such tiles
LARGE = 2**26  # bytes of a map of which the next operation finds nothing in a cache
SETTLED = 32  # channels of a program that adds up
PARTS = 8  # of each of them at a time
MANY = 32  # parts, beyond which it has a quarter of the channels, and 16 times the parts at a time: a turn for them all
WHOLE_PARTS, WOVEN_PARTS = 1, 512  # the same, of one range a channel, and of a unit's channels together
VALUES = 16  # blocks of a range, at least, where there are programs enough
PROGRAMS = 1024  # enough for every GPU
MEGABYTE = 2**20
SHORT = 4  # blocks of a range where sums and values are woven: many programs hold their ranges in the cache at once
SUMS = {"backward": 2, "double_backward": 5}
TERMS = 5  # of a channel

Affine = Tensor | None  # a value of each channel, [C], or of each sample's channels, [N, C]; None: there are none

# ---- launchers: what gankern/ops/batch_norm_act.py calls ----------------------------------------------------


def _of_each(*values: Affine) -> bool:
    """Whether any of them are each sample's own."""
    return any(v is not None and v.ndim == 2 for v in values)


def _repeated(values: Affine, x: Tensor) -> Tensor | None:
    """[C] or [N, C] as [N C]."""
    return None if values is None else values.expand(x.shape[:2]).reshape(-1)


def _settled(parts: int) -> tuple[int, int]:
    """Of so many parts, the channels of a program that adds them up, and how many it takes at a time."""
    return (SETTLED // 4, 16 * PARTS) if parts > MANY else (SETTLED, PARTS)


class _Call:
    """A tensor x, how it is split, and what all kernels take. With ``instances`` it is one sample, whose channels are
    those of all samples of x; affine values and slopes of C channels are then those of each C of them, and a statistic
    is that of ``members`` of them."""

    def __init__(
        self,
        x: Tensor,
        weight: Affine,
        bias: Affine,
        slope: float,
        others: Sequence[Affine] = (),
        instances: bool = False,
        slopes: Affine = None,
        members: int = 1,
    ) -> None:
        self.given = weight, bias, slopes
        self.last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
        self.x = x if self.last else contiguous(x)
        self.samples, self.channels = x.shape[:2]
        if instances:
            self.samples, self.channels = 1, self.samples * self.channels
        self.period = x.shape[1] if instances and not _of_each(weight, bias, slopes, *others) else self.channels
        self.inner = x.shape[1] if self.last else self.channels
        self.members, self.statistics = members, self.channels // members
        self.plane = math.prod(x.shape[2:])
        self.count = self.samples * self.plane
        self.groups = self.samples if _of_each(weight, bias, *others) and not instances else 1
        if instances and self.period == self.channels:
            weight, bias, slopes, *others = (_repeated(v, x) for v in (weight, bias, slopes, *others))
        self.sum = sum_dtype(x.dtype)
        self.weight, self.bias, *self.others = (contiguous(v) for v in (weight, bias, *others))
        self.slope, self.slopes = slope, contiguous(slopes)
        blocks = (BLOCKS if not instances else INSTANCES if members == 1 else GROUPS)(x.device)
        self.ahead, self.at_once = blocks["AHEAD"] * MEGABYTE, blocks.get("AT_ONCE", 0) * MEGABYTE
        self.large = x.numel() * x.element_size() > LARGE
        self.block_c = blocks["CHANNELS"] if self.last else 1
        self.block_m = blocks["TILE"] // self.block_c
        self.blocks = ceil_div(self.channels, self.block_c)
        self.group = self.count // max(self.groups, 1)
        splits = min(ceil_div(self.group, VALUES * self.block_m), PROGRAMS // max(self.blocks * self.groups, 1))
        self.chunk = ceil_div(ceil_div(self.group, max(splits, 1)), self.block_m) * self.block_m
        self.splits = ceil_div(self.group, max(self.chunk, 1))
        index = index_type(x.numel() + self.chunk * self.groups)
        self.tile = {"LAST": self.last, "SUM": sum_type(x.dtype), "INDEX": index}
        self.tile |= {"BLOCK_M": self.block_m, "BLOCK_C": self.block_c}
        self.tile |= {"DEEP": blocks["DEEP"], "num_warps": blocks["num_warps"]}

    def in_turn(self, maps: int) -> tuple[int, int]:
        """How many programs read so many maps twice, and of how many channels each at a time, where those take turns
        that have room in the second-level cache; otherwise none."""
        size = self.x.element_size()
        channels = max(ROW // size if self.last else 1, self.members)
        if size > 4 or channels % self.members or channels != next_power_of_2(channels) or channels > MOST:
            return 0, 0
        programs = self.at_once // (channels * self.count * size * maps)
        return (programs, channels) if FEWEST <= programs < ceil_div(self.channels, channels) else (0, 0)

    def gradient(self, wanted: bool, values: Affine) -> Tensor | None:
        """What a kernel writes of the affine values' gradient, [groups, C]; None where there is none."""
        if not wanted or values is None:
            return None
        made = self.x.new_empty(self.groups * self.channels, dtype=self.sum)
        return made if self.count else made.zero_()

    def gradient_of_slopes(self) -> Tensor | None:
        """The same of PReLU's slopes, [C]: a group has none of its own."""
        if self.slopes is None:
            return None
        made = self.x.new_empty(self.channels, dtype=self.sum)
        return made if self.count else made.zero_()

    def as_given(self, made: Tensor | None, values: Affine) -> Tensor:
        """A gradient that a kernel wrote, in the shape of the values: where it has one for each sample and they are
        common to all, summed up over these. Empty where there is none."""
        if made is None or values is None:
            return self.x.new_empty(0, dtype=self.sum)
        if made.numel() != values.numel():
            return sum_of_parts(made.view(-1, values.shape[0], 1), self.sum)
        return made if values.ndim == 1 else made.view(values.shape)

    def evaluation(self, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        stats = self.x.new_empty((3, self.channels), dtype=self.sum)
        launch(
            _evaluation_kernel,
            ceil_div(self.channels, SETTLED),
            contiguous(mean),
            contiguous(var),
            stats,
            self.channels,
            EPS=eps,
            BLOCK_C=SETTLED,
            num_warps=1,
        )
        return stats

    def like_x(self, values: Tensor | None) -> Tensor:
        """The values as x lies in memory; zeros for None."""
        return torch.zeros_like(self.x) if values is None else laid_out_as(values, self.x)

    def partial(self, sums: int) -> Tensor:
        return self.x.new_empty((self.groups * self.splits, sums, self.channels), dtype=torch.float64)

    def empty_terms(self) -> Tensor:
        return self.x.new_empty((TERMS, self.statistics), dtype=torch.float64)

    def moments(self, eps: float, stats: Tensor) -> None:
        """Statistics of all samples: their ranges are those of one group."""
        chunk = self.chunk * self.groups
        splits = ceil_div(self.count, chunk)
        partial = self.x.new_empty((splits, 3, self.channels), dtype=torch.float64)
        launch(
            _moments_kernel,
            self.blocks * splits,
            self.x,
            partial,
            self.channels,
            self.inner,
            self.plane,
            self.count,
            chunk,
            **self.tile,
        )
        settled, parts = _settled(splits * self.members)
        launch(
            _settle_moments_kernel,
            ceil_div(self.statistics, settled),
            partial,
            stats,
            self.channels,
            self.members,
            splits,
            EPS=eps,
            PARTS=parts,
            BLOCK_C=settled,
            num_warps=WARPS,
        )

    def forward(self, eps: float, y: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """Writes y; returns the statistics of x, [3, statistics], or of another shape."""
        stats = self.x.new_empty(shape or (3, self.statistics), dtype=self.sum)
        if not self.together("forward", None, None, None, None, stats, True, eps, (None, None, None), y, None):
            self.moments(eps, stats)
            self.apply("forward", None, None, None, None, stats, None, y, None)
        return stats

    def together(
        self,
        order: str,
        grad: Tensor | None,
        h: Tensor | None,
        h_weight: Affine,
        h_bias: Affine,
        stats: Tensor,
        training: bool,
        eps: float,
        made: Sequence[Tensor | None],
        out: Tensor,
        out_x: Tensor | None,
    ) -> bool:
        """Sums, terms, affine gradients and results by one launch; False where that is not the way."""
        maps = 1 + (grad is not None) + (h is not None)
        programs, channels = self.in_turn(maps) if h is None and max(self.splits, self.members) > 1 else (0, 0)
        in_turn, tile = programs > 0, self.tile
        statistics = max(1, (channels or self.block_c) // self.members)  # of a unit, which has whole blocks of channels
        unit = 1 if in_turn else statistics * self.members // self.block_c
        if self.groups != 1 or (not in_turn and unit * self.block_c != statistics * self.members):
            return False
        of_block = self.count * self.block_c * self.x.element_size() * maps
        chunk, splits, counters, ahead, parts = self.chunk, self.splits, None, 0, WHOLE_PARTS
        units = ceil_div(self.blocks, unit)
        if in_turn:
            block_m = 32 * WHOLE_WARPS * 16 // self.x.element_size() // channels
            chunk, splits = ceil_div(self.count, 2 * block_m) * 2 * block_m, 1
            parts = self.members if order == "forward" else 1
            tile = {**tile, "BLOCK_M": block_m, "BLOCK_C": channels, "DEEP": WHOLE_DEEP, "num_warps": WHOLE_WARPS}
            tile["INDEX"] = index_type(self.x.numel() + chunk)
        elif self.splits > 1:
            if unit * of_block > self.ahead:
                return False
            chunk = SHORT * self.block_m
            splits = ceil_div(self.count, chunk)
            ahead = min(max(unit, self.ahead // of_block), self.blocks)
            programs = 2 * splits * (self.blocks + ahead)
            counters = self.x.new_zeros(1 + 2 * units, dtype=torch.int32)
            parts = max(WHOLE_PARTS, WOVEN_PARTS // statistics)
        elif unit > 1:
            return False
        else:
            programs = units
        sums = 3 if order == "forward" or self.slopes is not None else SUMS[order]
        partial = self.x.new_empty((splits, sums, self.channels), dtype=torch.float64)
        terms = self.empty_terms() if order != "forward" and training else None
        launch(
            _together_kernel,
            programs,
            self.x,
            grad,
            h,
            self.weight,
            self.bias,
            self.slopes,
            h_weight,
            h_bias,
            stats,
            partial,
            terms,
            *made,
            out,
            out_x,
            counters,
            self.channels,
            self.inner,
            self.period,
            self.members,
            self.plane,
            self.count,
            splits,
            chunk,
            unit,
            ahead,
            ORDER=order,
            SLOPE=self.slope,
            EPS=eps,
            TRAINING=training,
            GROUPED=self.members > 1,
            PARTS=parts,
            STATISTICS=statistics,
            IN_TURN=in_turn,
            **tile,
        )
        return True

    def terms(
        self,
        order: str,
        grad: Tensor | None,
        h: Tensor | None,
        h_weight: Affine,
        stats: Tensor,
        training: bool,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        grad_slope: Tensor | None,
    ) -> Tensor | None:
        """What the results need of each channel's sums, None in evaluation; writes the affine gradients, and PReLU's
        slope's."""
        partial = self.partial(SUMS[order] if self.slopes is None else 3)
        terms = self.empty_terms() if training else None
        launch(
            _reduce_kernel,
            self.blocks * self.groups * self.splits,
            self.x,
            grad,
            h,
            self.weight,
            self.bias,
            self.slopes,
            stats,
            partial,
            self.channels,
            self.inner,
            self.period,
            self.members,
            self.plane,
            self.group,
            self.splits,
            self.chunk,
            ORDER=order,
            SLOPE=self.slope,
            **self.tile,
        )
        # Of statistics of several channels, a double backward has no registers for more parts.
        settled, parts = _settled(self.splits if self.members == 1 else 1)
        launch(
            _settle_kernel,
            ceil_div(self.statistics, settled),
            partial,
            self.weight,
            h_weight,
            stats,
            terms,
            grad_weight,
            grad_bias,
            grad_slope,
            self.channels,
            self.period,
            self.members,
            self.groups,
            self.splits,
            self.count * self.members,
            ORDER=order,
            TRAINING=training,
            GROUPED=self.members > 1,
            PARTS=parts,
            BLOCK_C=settled,
            num_warps=WARPS,
        )
        return terms

    def apply(
        self,
        order: str,
        grad: Tensor | None,
        h: Tensor | None,
        h_weight: Affine,
        h_bias: Affine,
        stats: Tensor,
        terms: Tensor | None,
        out: Tensor,
        out_x: Tensor | None,
    ) -> None:
        launch(
            _apply_kernel,
            self.blocks * self.groups * self.splits,
            self.x,
            grad,
            h,
            self.weight,
            self.bias,
            self.slopes,
            h_weight,
            h_bias,
            stats,
            terms,
            out,
            out_x,
            self.channels,
            self.inner,
            self.period,
            self.members,
            self.plane,
            self.group,
            self.splits,
            self.chunk,
            ORDER=order,
            SLOPE=self.slope,
            **{name: value for name, value in self.tile.items() if name not in ("DEEP", "num_warps")},
            LAST_USE=self.large,
            num_warps=self.tile["num_warps"],
        )

    def backward(
        self, grad: Tensor, stats: Tensor, training: bool, affine: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of x, weight, bias and slope."""
        grad, stats, grad_x = self.like_x(grad), contiguous(stats), torch.empty_like(self.x)
        weight, bias, _ = self.given
        made = self.gradient(affine, weight), self.gradient(affine, bias), self.gradient_of_slopes()
        if self.x.numel():
            if not training and all(gradient is None for gradient in made):
                self.apply("backward", grad, None, None, None, stats, None, grad_x, None)
            elif not self.together("backward", grad, None, None, None, stats, training, 0.0, made, grad_x, None):
                terms = self.terms("backward", grad, None, None, stats, training, *made)
                self.apply("backward", grad, None, None, None, stats, terms, grad_x, None)
        grad_weight, grad_bias, grad_slope = map(self.as_given, made, self.given)
        return grad_x, grad_weight, grad_bias, grad_slope

    def double_backward(
        self, grad_grad_x: Tensor | None, grad: Tensor, stats: Tensor, training: bool, affine: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of ``grad``, x and weight; ``others`` are those of the first weight's and bias's gradients."""
        grad, h, stats = self.like_x(grad), self.like_x(grad_grad_x), contiguous(stats)
        (h_weight, h_bias), weight = self.others, self.given[0]
        grad_grad, grad_x = torch.empty_like(self.x), torch.empty_like(self.x)
        made = self.gradient(affine and grad_grad_x is not None, weight)
        if self.x.numel():
            given, gradients = (grad, h, h_weight, h_bias, stats), (made, None, None)
            if not self.together("double_backward", *given, training, 0.0, gradients, grad_grad, grad_x):
                terms = self.terms("double_backward", grad, h, h_weight, stats, training, *gradients)
                self.apply("double_backward", *given, terms, grad_grad, grad_x)
        if h_weight is None and (grad_grad_x is None or not training):
            grad_x = self.x.new_empty(0)
        return grad_grad, grad_x, self.as_given(made, weight)


@planned
def forward(
    x: Tensor,
    weight: Affine,
    bias: Affine,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    negative_slope: float,
    slope: Affine = None,
) -> tuple[Tensor, Tensor]:
    """The result, and the statistics [3, C]. Launches: 3; 1 where a channel has one range, and in evaluation."""
    call = _Call(x, weight, bias, negative_slope, slopes=slope)
    y = torch.empty_like(call.x)
    if training:
        return y, call.forward(eps, y) if call.count else x.new_zeros((3, call.channels), dtype=call.sum)
    assert running_mean is not None and running_var is not None  # there, in evaluation
    stats = call.evaluation(running_mean, running_var, eps)
    if call.count:
        call.apply("forward", None, None, None, None, stats, None, y, None)
    return y, stats


@planned
def backward(
    grad: Tensor,
    x: Tensor,
    weight: Affine,
    bias: Affine,
    stats: Tensor,
    training: bool,
    negative_slope: float,
    affine: bool,
    slope: Affine = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and slope (empty where not wanted, or there is none). Launches: 3; 1 where
    a channel has one range, and in evaluation without these."""
    call = _Call(x, weight, bias, negative_slope, slopes=slope)
    return call.backward(grad, stats, training, affine)


@planned
def double_backward(
    grad_grad_x: Tensor | None,
    grad_grad_weight: Affine,
    grad_grad_bias: Affine,
    grad: Tensor,
    x: Tensor,
    weight: Affine,
    bias: Affine,
    stats: Tensor,
    training: bool,
    negative_slope: float,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `backward`'s grad, x and weight (empty where there are none). Launches: 3, or 1 where a
    channel has one range."""
    call = _Call(x, weight, bias, negative_slope, (grad_grad_weight, grad_grad_bias))
    return call.double_backward(grad_grad_x, grad, stats, training, affine)


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernels: a channel has two ranges, or one."""
    vector = torch.empty(32, dtype=sum_dtype(dtype), device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(4, 32, 64, 128, dtype=dtype, device=device).contiguous(memory_format=layout)
        options = True, 0.2, True
        y, stats = forward(x, vector, vector, None, None, True, 1e-5, 0.2)
        backward(y, x, vector, vector, stats, *options)
        forward(x, vector, vector, None, None, True, 1e-5, 0.0, vector)
        forward(x, None, None, vector, vector, False, 1e-5, 0.2)
        backward(y, x, None, None, stats, False, 0.2, False)
        backward(y, x, vector, vector, stats, *options, vector)
        double_backward(y, vector, vector, y, x, vector, vector, stats, *options)
        # Of many ranges, where channels are neighbours.
        wide = torch.empty(4, 32, 128, 128, dtype=dtype, device=device).contiguous(memory_format=layout)
        y, stats = forward(wide, vector, vector, None, None, True, 1e-5, 0.2)
        backward(y, wide, vector, vector, stats, *options)
        double_backward(y, vector, vector, y, wide, vector, vector, stats, *options)
        x = torch.empty(4, 32, 16, 16, dtype=dtype, device=device).contiguous(memory_format=layout)
        y, stats = forward(x, vector, vector, None, None, True, 1e-5, 0.2)
        backward(y, x, vector, vector, stats, *options)
        double_backward(y, vector, vector, y, x, vector, vector, stats, *options)
