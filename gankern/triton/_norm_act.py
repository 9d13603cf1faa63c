"""The kernels of batch, instance and group normalisation with an activation. batch_norm_act.py says how they are put
together, and launches them."""

import triton
import triton.language as tl


@triton.jit
def _gate(z, v, SLOPE: tl.constexpr):
    """v where z > 0, SLOPE * v elsewhere; with slope 0, v where z is NaN too, and plain 0 elsewhere."""
    if SLOPE == 1:
        return v
    if SLOPE == 0:
        return tl.where(z <= 0, 0.0, v)
    return tl.where(z > 0, v, v * SLOPE)


@triton.jit
def _activate(z, v, slopes, c, mask, SLOPE: tl.constexpr):
    """:func:`_gate`, by PReLU's slope of each channel where there are such."""
    if slopes is None:
        result = _gate(z, v, SLOPE)
    else:  # what follows a return is compiled, too
        result = tl.where(z > 0, v, v * tl.load(slopes + c, mask=mask, other=1.0)[None, :])
    return result


@triton.jit
def _affine(vector, at, mask, otherwise: tl.constexpr, DTYPE: tl.constexpr):
    """An affine value of each channel, or a constant where there is no vector."""
    if vector is None:
        value = tl.zeros_like(at).to(DTYPE) + otherwise
    else:
        value = tl.load(vector + at, mask=mask, other=0.0).to(DTYPE)
    return value


@triton.jit
def _channels(number, channels, BLOCK_C: tl.constexpr):
    """A program's channels, and the number of its range, group times splits."""
    blocks = tl.cdiv(channels, BLOCK_C)
    return number % blocks * BLOCK_C + tl.arange(0, BLOCK_C), number // blocks


@triton.jit
def _offsets(m, c, inner, plane, LAST: tl.constexpr, INDEX: tl.constexpr):
    """Where value m (of samples times plane) of channel c is. Of more channels than the ``inner`` ones of a position,
    those behind are of an instance of its own, which has one sample."""
    if LAST:
        behind = (c // inner).to(INDEX) * inner * plane + c % inner
        return m[:, None] * inner + behind[None, :]
    n = m // plane
    return (n * inner * plane + (m - n * plane))[:, None] + (c.to(INDEX) * plane)[None, :]


@triton.jit
def _load(x, offsets, mask, SUM: tl.constexpr, LAST_USE: tl.constexpr = False):
    if LAST_USE:
        return tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(SUM)
    return tl.load(x + offsets, mask=mask, other=0.0).to(SUM)


@triton.jit
def _store(out, offsets, values, mask, LAST_USE: tl.constexpr):
    if LAST_USE:
        tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask, eviction_policy="evict_first")
    else:
        tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _moments(
    x, partial, c, split, channels, inner, plane, count, chunk,
    LAST: tl.constexpr, SUM: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    DEEP: tl.constexpr,
):  # fmt: skip
    """Number, mean and squares about it of a range of channels c."""
    begin = split.to(INDEX) * chunk
    end = tl.minimum(begin + chunk, count)
    inside_c = (c < channels)[None, :]

    m = begin + tl.arange(0, BLOCK_M)
    inside = (m < end)[:, None] & inside_c
    first = _load(x, _offsets(m, c, inner, plane, LAST, INDEX), inside, SUM)
    about = tl.sum(first, 0) / tl.minimum(end - begin, BLOCK_M).to(SUM)
    # Once more: the first sum rounds by its size, this one by that of the differences.
    about += tl.sum(tl.where(inside, first - about[None, :], 0.0), 0) / tl.minimum(end - begin, BLOCK_M).to(SUM)

    sums = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    squares = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    for start in range(0, chunk, BLOCK_M * DEEP):
        for tile in tl.static_range(DEEP):
            m = begin + start + tile * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = (m < end)[:, None] & inside_c
            d = _load(x, _offsets(m, c, inner, plane, LAST, INDEX), inside, SUM)
            d = tl.where(inside, d - about[None, :], 0.0)
            sums += d
            squares += d * d
    n = (end - begin).to(tl.float64)
    total = tl.sum(sums, 0).to(tl.float64)
    to = partial + split.to(tl.int64) * 3 * channels + c
    tl.store(to, tl.zeros([BLOCK_C], tl.float64) + n, mask=c < channels)
    tl.store(to + channels, about.to(tl.float64) + total / n, mask=c < channels)
    tl.store(to + 2 * channels, tl.sum(squares, 0).to(tl.float64) - total * (total / n), mask=c < channels)


@triton.jit
def _moments_kernel(
    x,
    partial,  # [splits, 3, C]: number, mean and squares about it
    channels,
    inner,
    plane,
    count,  # values of a channel
    chunk,  # values of a range
    LAST: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,  # what values are counted in: a division of 64 bits costs more than all else
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEEP: tl.constexpr,  # blocks that are added up at a time
):
    c, split = _channels(tl.program_id(0), channels, BLOCK_C)
    _moments(x, partial, c, split, channels, inner, plane, count, chunk, LAST, SUM, INDEX, BLOCK_M, BLOCK_C, DEEP)


@triton.jit
def _settle_moments(
    partial, stats, s, channels, members, splits,
    EPS: tl.constexpr, PARTS: tl.constexpr, STATISTICS: tl.constexpr, ALIKE: tl.constexpr = False,
):  # fmt: skip
    """Statistics s of the parts of their channels, PARTS at a time: each part's values are about its own mean. ALIKE:
    the parts of a statistic are PARTS, of as many values each."""
    statistics = channels // members
    mask = s < statistics
    count = tl.zeros([STATISTICS], tl.float64)
    mean = tl.zeros([STATISTICS], tl.float64)
    squares = tl.zeros([STATISTICS], tl.float64)
    for start in range(0, splits * members, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < splits * members)[:, None] & mask[None, :]
        split = part // members
        at = (split.to(tl.int64) * 3 * channels + (part - split * members))[:, None] + (s * members)[None, :]
        n = tl.load(partial + at, mask=inside, other=0.0)
        own = tl.load(partial + channels + at, mask=inside, other=0.0)
        within = tl.load(partial + 2 * channels + at, mask=inside, other=0.0)
        more = tl.sum(n, 0)
        middle = tl.sum(own, 0) * (1.0 / PARTS) if ALIKE else tl.sum(n * own, 0) / tl.where(more == 0, 1.0, more)
        apart = own - middle[None, :]
        within = tl.sum(tl.where(within < 0, 0.0, within) + n * apart * apart, 0)
        if ALIKE:
            squares, mean, count = within, middle, more
        else:
            apart = middle - mean
            share = more / tl.where(more == 0, 1.0, count + more)
            squares += within + apart * apart * (count * share)
            mean += apart * share
            count += more
    kind = stats.dtype.element_ty
    tl.store(stats + s, mean.to(kind), mask=mask)
    tl.store(stats + statistics + s, (1.0 / tl.sqrt(squares / count + EPS)).to(kind), mask=mask)
    tl.store(stats + 2 * statistics + s, (squares / (count - 1.0)).to(kind), mask=mask)


@triton.jit
def _settle_moments_kernel(
    partial,
    stats,  # [3, C / members]: mean, 1 / sqrt(var + EPS), unbiased var
    channels,
    members,  # channels of a statistic
    splits,
    EPS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    s = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    _settle_moments(partial, stats, s, channels, members, splits, EPS, PARTS, BLOCK_C)


@triton.jit
def _evaluation_kernel(mean, var, stats, channels, EPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The statistics [3, C] of given mean and var."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < channels
    kind = stats.dtype.element_ty
    v = tl.load(var + c, mask=mask, other=1.0).to(kind)
    tl.store(stats + c, tl.load(mean + c, mask=mask, other=0.0).to(kind), mask=mask)
    r = 1.0 / tl.sqrt(v.to(tl.float64) + tl.full([1], EPS, tl.float64))
    tl.store(stats + channels + c, r.to(kind), mask=mask)
    tl.store(stats + 2 * channels + c, v, mask=mask)


@triton.jit
def _reduce(
    x, grad, h, weight, bias, slopes, stats, partial, c, at, channels, inner, period, members, plane, group, splits,
    chunk, ORDER: tl.constexpr, SLOPE: tl.constexpr, LAST: tl.constexpr, SUM: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """The sums of range ``at`` of channels c."""
    mask = c < channels
    own = at.to(INDEX) // splits
    start = (at % splits).to(INDEX) * chunk
    begin = own * group + start
    end = own * group + tl.minimum(start + chunk, group)
    statistic = c // members
    mean = tl.load(stats + statistic, mask=mask, other=0.0)[None, :]
    k = tl.load(stats + channels // members + statistic, mask=mask, other=0.0)
    repeated = c % period
    affine = own * channels + repeated
    k = (k * _affine(weight, affine, mask, 1.0, SUM))[None, :]
    beta = _affine(bias, affine, mask, 0.0, SUM)[None, :]

    sum_g = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    sum_gw = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    sum_h = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    sum_hw = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    sum_gh = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    sum_gz = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    for step in range(0, chunk, BLOCK_M * DEEP):
        for tile in tl.static_range(DEEP):
            m = begin + step + tile * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = (m < end)[:, None] & mask[None, :]
            where = _offsets(m, c, inner, plane, LAST, INDEX)
            w = _load(x, where, inside, SUM) - mean
            z = w * k + beta
            given = _load(grad, where, inside, SUM)
            g = _activate(z, given, slopes, repeated, mask, SLOPE)
            if slopes is not None:
                sum_gz += tl.where(z > 0, 0.0, given * z)
            sum_g += g
            sum_gw += g * w
            if ORDER == "double_backward":
                second = _load(h, where, inside, SUM)
                sum_h += second
                sum_hw += second * w
                sum_gh += g * second
    sums: tl.constexpr = 3 if slopes is not None else 2 if ORDER == "backward" else 5
    to = partial + at.to(tl.int64) * sums * channels + c
    tl.store(to, tl.sum(sum_g, 0).to(tl.float64), mask=mask)
    tl.store(to + channels, tl.sum(sum_gw, 0).to(tl.float64), mask=mask)
    if slopes is not None:
        tl.store(to + 2 * channels, tl.sum(sum_gz, 0).to(tl.float64), mask=mask)
    if ORDER == "double_backward":
        tl.store(to + 2 * channels, tl.sum(sum_h, 0).to(tl.float64), mask=mask)
        tl.store(to + 3 * channels, tl.sum(sum_hw, 0).to(tl.float64), mask=mask)
        tl.store(to + 4 * channels, tl.sum(sum_gh, 0).to(tl.float64), mask=mask)


@triton.jit
def _reduce_kernel(
    x,
    grad,
    h,
    weight,  # [groups, C], or None for 1
    bias,  # the same, or None for 0; so h_weight and h_bias
    slopes,  # [C], PReLU's, or None
    stats,
    partial,  # [groups * splits, sums, C]
    channels,
    inner,
    period,  # after how many channels affine values and slopes repeat
    members,
    plane,
    group,  # values of a channel in a group: all, or a sample's
    splits,  # of a group
    chunk,
    ORDER: tl.constexpr,  # "forward", "backward" or "double_backward"
    SLOPE: tl.constexpr,
    LAST: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEEP: tl.constexpr,
):
    c, at = _channels(tl.program_id(0), channels, BLOCK_C)
    _reduce(
        x, grad, h, weight, bias, slopes, stats, partial, c, at, channels, inner, period, members, plane, group, splits,
        chunk, ORDER, SLOPE, LAST, SUM, INDEX, BLOCK_M, BLOCK_C, DEEP,
    )  # fmt: skip


@triton.jit
def _total(partial, splits, step, mask, PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum over a group's ranges, PARTS at a time."""
    total = tl.zeros([BLOCK_C], tl.float64)
    for start in range(0, splits, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < splits)[:, None] & mask[None, :]
        total += tl.sum(tl.load(partial[None, :] + (part.to(tl.int64) * step)[:, None], mask=inside, other=0.0), 0)
    return total


@triton.jit
def _settle(
    partial, weight, h_weight, stats, terms, grad_weight, grad_bias, grad_slope, c, channels, period, members, groups,
    splits, count, ORDER: tl.constexpr, TRAINING: tl.constexpr, GROUPED: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Terms and affine gradients of statistics c."""
    statistics = channels // members
    mask = c < statistics
    r = tl.load(stats + statistics + c, mask=mask, other=0.0).to(tl.float64)
    kind = stats.dtype.element_ty
    sums: tl.constexpr = 3 if grad_slope is not None else 2 if ORDER == "backward" else 5
    step = sums * channels
    a = tl.zeros([BLOCK_C], tl.float64)
    aw = tl.zeros([BLOCK_C], tl.float64)
    h = tl.zeros([BLOCK_C], tl.float64)
    hw = tl.zeros([BLOCK_C], tl.float64)
    ha = tl.zeros([BLOCK_C], tl.float64)
    u = tl.zeros([BLOCK_C], tl.float64)
    uw = tl.zeros([BLOCK_C], tl.float64)
    gz = tl.zeros([BLOCK_C], tl.float64)
    first = c.to(tl.int64) * members
    at = partial + first
    affine = first
    given = (c * members % period).to(tl.int64)  # in 32 bits: of 64, a remainder is a call
    next_sums = 1 if GROUPED else splits * step
    next_affine = 1 if GROUPED else channels
    for _ in range(0, members if GROUPED else groups):
        gamma = _affine(weight, given, mask, 1.0, tl.float64)
        g = _total(at, splits, step, mask, PARTS, BLOCK_C)
        gw = _total(at + channels, splits, step, mask, PARTS, BLOCK_C)
        a += gamma * g
        aw += gamma * gw
        if grad_slope is not None:
            gz += _total(at + 2 * channels, splits, step, mask, PARTS, BLOCK_C)
            if GROUPED:
                tl.store(grad_slope + affine, gz.to(kind), mask=mask)
                gz = tl.zeros([BLOCK_C], tl.float64)
        if ORDER == "backward":
            if grad_weight is not None:
                tl.store(grad_weight + affine, (r * gw).to(kind), mask=mask)
            if grad_bias is not None:
                tl.store(grad_bias + affine, g.to(kind), mask=mask)
        else:
            h_gamma = _affine(h_weight, given, mask, 0.0, tl.float64)
            h += _total(at + 2 * channels, splits, step, mask, PARTS, BLOCK_C)
            hw += _total(at + 3 * channels, splits, step, mask, PARTS, BLOCK_C)
            ha += gamma * _total(at + 4 * channels, splits, step, mask, PARTS, BLOCK_C)
            u += h_gamma * g
            uw += h_gamma * gw
        at += next_sums
        affine += next_affine
        given += next_affine
    if grad_slope is not None and not GROUPED:
        tl.store(grad_slope + c, gz.to(kind), mask=mask)
    if TRAINING:  # in evaluation no value depends on the others
        # Means; of r w in place of w.
        scale = 1.0 / (tl.zeros([BLOCK_C], tl.float64) + count)
        a *= scale
        aw *= r * scale
        if ORDER == "backward":
            tl.store(terms + c, -r * r * aw, mask=mask)
            tl.store(terms + statistics + c, -r * a, mask=mask)
        else:
            h *= scale
            hw *= r * scale
            difference = ha * scale - h * a - hw * aw
            u = u * scale - r * (hw * a + aw * h)
            uw = uw * r * scale - 2.0 * r * hw * aw
            tl.store(terms + c, -r * hw, mask=mask)
            tl.store(terms + statistics + c, -h, mask=mask)
            tl.store(terms + 2 * statistics + c, -r * r * aw, mask=mask)
            tl.store(terms + 3 * statistics + c, -r * r * (uw + r * difference), mask=mask)
            tl.store(terms + 4 * statistics + c, -r * u, mask=mask)
    if ORDER == "double_backward" and grad_weight is not None:
        at = partial + first
        affine = first
        for _ in range(0, members if GROUPED else groups):
            value = _total(at + 4 * channels, splits, step, mask, PARTS, BLOCK_C)
            if TRAINING:
                g = _total(at, splits, step, mask, PARTS, BLOCK_C)
                gw = _total(at + channels, splits, step, mask, PARTS, BLOCK_C)
                value -= h * g + hw * r * gw
            tl.store(grad_weight + affine, (r * value).to(kind), mask=mask)
            at += next_sums
            affine += next_affine


@triton.jit
def _settle_kernel(
    partial,
    weight,
    h_weight,
    stats,
    terms,  # [TERMS, C / members]; None in evaluation
    grad_weight,  # [groups, C], or None
    grad_bias,
    grad_slope,  # [C], PReLU's, or None
    channels,
    period,
    members,
    groups,
    splits,
    count,  # values of a statistic
    ORDER: tl.constexpr,  # "forward", "backward" or "double_backward"
    TRAINING: tl.constexpr,
    GROUPED: tl.constexpr,  # a statistic is of several channels, which follow one another; else of groups
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    _settle(
        partial, weight, h_weight, stats, terms, grad_weight, grad_bias, grad_slope, c, channels, period, members,
        groups, splits, count, ORDER, TRAINING, GROUPED, PARTS, BLOCK_C,
    )  # fmt: skip


@triton.jit
def _apply(
    x, grad, h, weight, bias, slopes, h_weight, h_bias, stats, terms, out, out_x, c, at, channels, inner, period,
    members, plane, group, splits, chunk, ORDER: tl.constexpr, SLOPE: tl.constexpr, LAST: tl.constexpr,
    SUM: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    LAST_USE: tl.constexpr = False,
):  # fmt: skip
    """The results of range ``at`` of channels c. LAST_USE: what is read and written may leave the caches first."""
    mask = c < channels
    own = at.to(INDEX) // splits
    start = (at % splits).to(INDEX) * chunk
    begin = own * group + start
    end = own * group + tl.minimum(start + chunk, group)
    repeated = c % period
    affine = own * channels + repeated
    statistic = c // members
    statistics = channels // members
    mean = tl.load(stats + statistic, mask=mask, other=0.0)[None, :]
    r = tl.load(stats + statistics + statistic, mask=mask, other=0.0)[None, :]
    k = r * _affine(weight, affine, mask, 1.0, SUM)[None, :]
    beta = _affine(bias, affine, mask, 0.0, SUM)[None, :]
    # In evaluation nothing depends on the other values: no terms, not even zeros, of which an infinity makes NaN.
    if terms is not None:
        term0 = tl.load(terms + statistic, mask=mask, other=0.0).to(SUM)[None, :]
        term1 = tl.load(terms + statistics + statistic, mask=mask, other=0.0).to(SUM)[None, :]
    if ORDER == "double_backward":
        e = r * _affine(h_weight, affine, mask, 0.0, SUM)[None, :]
        f = _affine(h_bias, affine, mask, 0.0, SUM)[None, :]
        if terms is not None:
            e += k * term0
            f += k * term1
            term2 = tl.load(terms + 2 * statistics + statistic, mask=mask, other=0.0).to(SUM)[None, :]
            term3 = tl.load(terms + 3 * statistics + statistic, mask=mask, other=0.0).to(SUM)[None, :]
            term4 = tl.load(terms + 4 * statistics + statistic, mask=mask, other=0.0).to(SUM)[None, :]
    for back in range(BLOCK_M, chunk + BLOCK_M, BLOCK_M):
        m = begin + (chunk - back) + tl.arange(0, BLOCK_M)
        inside = (m < end)[:, None] & mask[None, :]
        where = _offsets(m, c, inner, plane, LAST, INDEX)
        w = _load(x, where, inside, SUM, LAST_USE) - mean
        z = w * k + beta
        if ORDER == "forward":
            result = _activate(z, z, slopes, repeated, mask, SLOPE)
        else:
            g = _activate(z, _load(grad, where, inside, SUM, LAST_USE), slopes, repeated, mask, SLOPE)
            if ORDER == "backward":
                result = k * g
                if terms is not None:
                    result += term0 * w + term1
            else:
                second = _load(h, where, inside, SUM, LAST_USE)
                result = _gate(z, k * second + (e * w + f), SLOPE)
                result_x = e * g
                if terms is not None:
                    result_x += term2 * second + (term3 * w + term4)
                _store(out_x, where, result_x, inside, LAST_USE)
        _store(out, where, result, inside, LAST_USE)


@triton.jit
def _apply_kernel(
    x,
    grad,
    h,
    weight,  # [groups, C], or None for 1
    bias,  # the same, or None for 0; so h_weight and h_bias
    slopes,  # [C], PReLU's, or None
    h_weight,
    h_bias,
    stats,
    terms,  # None in the forward and in evaluation
    out,  # y, dx or dg
    out_x,  # double backward: dx
    channels,
    inner,
    period,
    members,
    plane,
    group,
    splits,
    chunk,
    ORDER: tl.constexpr,  # "forward", "backward" or "double_backward"
    SLOPE: tl.constexpr,
    LAST: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LAST_USE: tl.constexpr,
):
    c, at = _channels(tl.num_programs(0) - 1 - tl.program_id(0), channels, BLOCK_C)
    _apply(
        x, grad, h, weight, bias, slopes, h_weight, h_bias, stats, terms, out, out_x, c, at, channels, inner, period,
        members, plane, group, splits, chunk, ORDER, SLOPE, LAST, SUM, INDEX, BLOCK_M, BLOCK_C, LAST_USE,
    )  # fmt: skip


@triton.jit
def _whole(
    number, x, grad, h, weight, bias, slopes, h_weight, h_bias, stats, partial, terms, grad_weight, grad_bias,
    grad_slope, out, out_x, channels, inner, period, members, plane, count, splits, chunk, ORDER: tl.constexpr,
    SLOPE: tl.constexpr, EPS: tl.constexpr, TRAINING: tl.constexpr, GROUPED: tl.constexpr, PARTS: tl.constexpr,
    STATISTICS: tl.constexpr, LAST: tl.constexpr, SUM: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, DEEP: tl.constexpr, IN_TURN: tl.constexpr,
):  # fmt: skip
    """Sums, what follows from them, and values of a block of channels that have one range."""
    c = number * BLOCK_C + tl.arange(0, BLOCK_C)
    at = number * 0
    if ORDER == "forward":
        _moments(x, partial, c, at, channels, inner, plane, count, chunk, LAST, SUM, INDEX, BLOCK_M, BLOCK_C, DEEP)
    else:
        _reduce(
            x, grad, h, weight, bias, slopes, stats, partial, c, at, channels, inner, period, members, plane, count,
            splits, chunk, ORDER, SLOPE, LAST, SUM, INDEX, BLOCK_M, BLOCK_C, DEEP,
        )  # fmt: skip
    tl.debug_barrier()
    s = number * STATISTICS + tl.arange(0, STATISTICS)
    if ORDER == "forward":
        _settle_moments(partial, stats, s, channels, members, splits, EPS, PARTS, STATISTICS, IN_TURN)
    else:
        _settle(
            partial, weight, h_weight, stats, terms, grad_weight, grad_bias, grad_slope, s, channels, period,
            members, 1, splits, count * members, ORDER, TRAINING, GROUPED, PARTS, STATISTICS,
        )  # fmt: skip
    tl.debug_barrier()
    _apply(
        x, grad, h, weight, bias, slopes, h_weight, h_bias, stats, terms, out, out_x, c, at, channels, inner,
        period, members, plane, count, splits, chunk, ORDER, SLOPE, LAST, SUM, INDEX,
        BLOCK_M * 2 if IN_TURN and (GROUPED or ORDER == "forward") else BLOCK_M, BLOCK_C, IN_TURN,
    )  # fmt: skip


@triton.jit
def _together_kernel(
    x,
    grad,
    h,
    weight,
    bias,
    slopes,
    h_weight,
    h_bias,
    stats,
    partial,
    terms,
    grad_weight,
    grad_bias,
    grad_slope,
    out,
    out_x,
    counters,  # None, or zeros: tickets, then of each unit the ranges that are summed up, and whether it is settled
    channels,
    inner,
    period,
    members,
    plane,
    count,
    splits,
    chunk,
    unit,  # blocks of channels whose sums are settled together
    ahead,  # how many blocks of channels are summed up before values of the first one are made
    ORDER: tl.constexpr,
    SLOPE: tl.constexpr,
    EPS: tl.constexpr,
    TRAINING: tl.constexpr,
    GROUPED: tl.constexpr,
    PARTS: tl.constexpr,
    STATISTICS: tl.constexpr,  # of a unit
    IN_TURN: tl.constexpr,
    LAST: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEEP: tl.constexpr,
):
    """Sums, what follows from them, and values, in one launch.

    Without counters a program does all of it for a block of channels that have one range, or for one such block after
    the other, in turn with the others. With counters a program takes a ticket. Tickets alternate between a range to sum
    up, of one block of channels, and a range whose values to make, of the block ``ahead`` before. Who sums up a unit's
    last range settles it; who makes values waits until that was done. All whom he waits for have earlier tickets, so
    that they run, and none of those who sum up waits: however few programs run at once, it comes to an end. What was
    summed up is read again after as many ranges as ``ahead`` says, out of the second-level cache."""
    blocks = tl.cdiv(channels, BLOCK_C)
    if IN_TURN:
        # What is the same in all turns is made anew in each: kept in registers, it would spill.
        for number in tl.range(tl.program_id(0), blocks, tl.num_programs(0), disable_licm=True):
            _whole(
                number, x, grad, h, weight, bias, slopes, h_weight, h_bias, stats, partial, terms, grad_weight,
                grad_bias, grad_slope, out, out_x, channels, inner, period, members, plane, count, splits, chunk, ORDER,
                SLOPE, EPS, TRAINING, GROUPED, PARTS, STATISTICS, LAST, SUM, INDEX, BLOCK_M, BLOCK_C, DEEP, True,
            )  # fmt: skip
    elif counters is None:
        _whole(
            tl.program_id(0), x, grad, h, weight, bias, slopes, h_weight, h_bias, stats, partial, terms, grad_weight,
            grad_bias, grad_slope, out, out_x, channels, inner, period, members, plane, count, splits, chunk, ORDER,
            SLOPE, EPS, TRAINING, GROUPED, PARTS, STATISTICS, LAST, SUM, INDEX, BLOCK_M, BLOCK_C, DEEP, False,
        )  # fmt: skip
    else:
        ticket = tl.atomic_add(counters, 1, sem="relaxed")
        block = ticket // (2 * splits)
        at = ticket // 2 - block * splits
        units = tl.cdiv(blocks, unit)
        if ticket % 2 == 0:
            if block < blocks:
                c = block * BLOCK_C + tl.arange(0, BLOCK_C)
                if ORDER == "forward":
                    _moments(
                        x, partial, c, at, channels, inner, plane, count, chunk, LAST, SUM, INDEX, BLOCK_M, BLOCK_C,
                        DEEP,
                    )  # fmt: skip
                else:
                    _reduce(
                        x, grad, h, weight, bias, slopes, stats, partial, c, at, channels, inner, period, members,
                        plane, count, splits, chunk, ORDER, SLOPE, LAST, SUM, INDEX, BLOCK_M, BLOCK_C, DEEP,
                    )  # fmt: skip
                number = block // unit
                tl.debug_barrier()
                before = tl.atomic_add(counters + 1 + number, 1, sem="acq_rel")
                if before == splits * unit - 1:
                    s = number * STATISTICS + tl.arange(0, STATISTICS)
                    if ORDER == "forward":
                        _settle_moments(partial, stats, s, channels, members, splits, EPS, PARTS, STATISTICS)
                    else:
                        _settle(
                            partial, weight, h_weight, stats, terms, grad_weight, grad_bias, grad_slope, s, channels,
                            period, members, 1, splits, count * members, ORDER, TRAINING, GROUPED, PARTS, STATISTICS,
                        )  # fmt: skip
                    tl.debug_barrier()
                    tl.atomic_add(counters + 1 + units + number, 1, sem="release")
        elif block >= ahead:
            number = (block - ahead) // unit
            while tl.atomic_add(counters + 1 + units + number, 0, sem="acquire") == 0:
                pass
            tl.debug_barrier()
            c = (block - ahead) * BLOCK_C + tl.arange(0, BLOCK_C)
            _apply(
                x, grad, h, weight, bias, slopes, h_weight, h_bias, stats, terms, out, out_x, c, at, channels, inner,
                period, members, plane, count, splits, chunk, ORDER, SLOPE, LAST, SUM, INDEX, BLOCK_M, BLOCK_C, True,
            )  # fmt: skip
