"""Options of modules: refused when the module is built, by the name of the argument; or obeyed."""

import math

import pytest
import torch
import torch.nn.functional as F

import gankern.functional as GF
import gankern.nn as gnn

NAN, INF = math.nan, math.inf

# (module, its required arguments, {option: values that must be refused})
NOT_NUMBERS = [NAN, INF, -INF, None, "0.1", [0.1]]
SIZES = [0, -1, 1.5, None, "3", [3], True]
NAMES = ["relv", 3, ["relu"]]
IMPLEMENTATION = {"implementation": ["gpu", 3, ["cpu"]]}
REFUSED = [
    (gnn.BiasAct, {"num_channels": 4}, {"num_channels": SIZES, "activation": NAMES, "negative_slope": NOT_NUMBERS,
        "gain": NOT_NUMBERS, "clamp": [NAN, INF, 0, -1, "1", [1]]}),
    (gnn.PixelNorm, {}, {"eps": [*NOT_NUMBERS, -1e-8], "dim": [1.5, None, "1"]}),
    (gnn.BiasActPixelNorm, {"num_channels": 4}, {"num_channels": SIZES, "activation": [*NAMES, "tanh"],
        "negative_slope": NOT_NUMBERS, "gain": NOT_NUMBERS, "eps": [*NOT_NUMBERS, -1e-8]}),
    *((layer, {"num_features": 4}, {"num_features": SIZES, "activation": [*NAMES, "tanh"], "eps": [*NOT_NUMBERS, -1e-8],
        "momentum": [NAN, INF, "0.1", [0.1]], "negative_slope": NOT_NUMBERS, **IMPLEMENTATION})
      for layer in (gnn.BatchNormAct1d, gnn.BatchNormAct2d, gnn.BatchNormAct3d)),
    (gnn.ConditionalBatchNorm2d, {"num_features": 4, "num_classes": 3}, {"num_features": SIZES, "num_classes": SIZES,
        "eps": [*NOT_NUMBERS, -1e-8], "momentum": [NAN, INF, "0.1"], "activation": NAMES, **IMPLEMENTATION}),
    (gnn.VirtualBatchNorm2d, {"num_features": 4}, {"num_features": SIZES, "eps": [*NOT_NUMBERS, -1e-8],
        "activation": NAMES, "negative_slope": NOT_NUMBERS, **IMPLEMENTATION}),
    (gnn.MinibatchStdDev, {}, {"group_size": SIZES, "num_channels": SIZES, "layout": NAMES, "on_indivisible": NAMES,
        "eps": [*NOT_NUMBERS, -1e-8], **IMPLEMENTATION}),
    (gnn.MinibatchDiscrimination, {"in_features": 4, "num_kernels": 3, "kernel_dim": 2}, {"in_features": SIZES,
        "num_kernels": SIZES, "kernel_dim": SIZES, "reduction": ["max", None, 3], **IMPLEMENTATION}),
    (gnn.UpsampleConv2d, {"in_channels": 4, "out_channels": 3}, {"kernel_size": [2, (3, 4)],
        "scale_factor": [NAN, INF, 0.5, None, "2", [2], True], "mode": ["cubic", None, ["nearest"]]}),
    (gnn.ConvDownsample2d, {"in_channels": 4, "out_channels": 3}, {"kernel_size": [2, (3, 4)]}),
    (gnn.EqualizedConv2d, {"in_channels": 4, "out_channels": 3, "kernel_size": 3}, {"gain": NOT_NUMBERS,
        "resample": ["both", 2]}),
    *((gnn.EqualizedConv2d, {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "resample": resample},
        {"padding_mode": ["reflect", "replicate", "circular"], "stride": [2], "dilation": [2], "groups": [2],
         "kernel_size": [2, 4], "padding": [2, (1, 2), "valid"]}) for resample in ("upsample", "downsample")),
    (gnn.EqualizedLinear, {"in_features": 4, "out_features": 3}, {"gain": NOT_NUMBERS}),
    (gnn.SubpixelConv2d, {"in_channels": 4, "out_channels": 3, "kernel_size": 3}, {"upscale_factor": [0, 1.5, None, "2"]}),
    (gnn.FIRUpsample2d, {}, {"scale_factor": SIZES, **IMPLEMENTATION}),
    (gnn.FIRDownsample2d, {}, {"scale_factor": SIZES, **IMPLEMENTATION}),
]  # fmt: skip


@pytest.mark.parametrize(("module", "arguments", "options"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_refused_when_built(module, arguments, options):
    module(**arguments)  # which is right
    for option, values in options.items():
        for value in values:
            with pytest.raises((ValueError, TypeError)) as error:
                module(**{**arguments, option: value})
            message = str(error.value)
            assert option.partition("_")[0] in message, (option, value, message)


# (function of a value, name of the argument, values): of functions.
X = torch.randn(4, 6, 4, 4)
V = torch.ones(6)
FUNCTIONS = [
    (lambda v: GF.bias_act(X, gain=v), "gain", NOT_NUMBERS),
    (lambda v: GF.bias_act(X, activation="leaky_relu", negative_slope=v), "negative_slope", NOT_NUMBERS),
    (lambda v: GF.bias_act(X, activation="prelu", slope=v), "slope", [None, 0.25, V[:2], V.double(), V[:, None]]),
    (lambda v: GF.bias_act(X, activation="relu", slope=v), "slope", [V, V[:1]]),
    (lambda v: GF.batch_norm_act(X, None, None, activation="prelu", slope=v), "slope", [None, 0.25, V[:2], V.double()]),
    (lambda v: GF.batch_norm_act(X, None, None, slope=v), "slope", [V, V[:1]]),
    (lambda v: GF.instance_norm_act(X, activation="prelu", slope=v), "slope", [None, 0.25, V[:2], V.double()]),
    (lambda v: GF.bias_act(X, clamp=v), "clamp", [NAN, INF, 0.0, -1.0, "1", [1.0]]),
    (lambda v: GF.bias_act(X, activation=v), "activation", NAMES),
    (lambda v: GF.bias_act_pixel_norm(X, gain=v), "gain", NOT_NUMBERS),
    (lambda v: GF.bias_act_pixel_norm(X, negative_slope=v), "negative_slope", NOT_NUMBERS),
    (lambda v: GF.pixel_norm(X, eps=v), "eps", [*NOT_NUMBERS, -1.0]),
    (lambda v: GF.minibatch_stddev(X, eps=v), "eps", [*NOT_NUMBERS, -1.0]),
    (lambda v: GF.minibatch_stddev(X, group_size=v), "group_size", SIZES),
    (lambda v: GF.gradient_penalty(X, target=v), "target", [*NOT_NUMBERS, -1.0]),
    (lambda v: GF.batch_norm_act(X, None, None, eps=v), "eps", [*NOT_NUMBERS, -1.0]),
    (lambda v: GF.batch_norm_act(X, V * 0, V * 1, training=True, momentum=v), "momentum", NOT_NUMBERS),
    (lambda v: GF.batch_norm_act(X, None, None, activation="leaky_relu", negative_slope=v), "negative_slope", NOT_NUMBERS),
    (lambda v: GF.virtual_batch_norm(X, V * 0, V, 4, eps=v), "eps", [*NOT_NUMBERS, -1.0]),
    (lambda v: GF.virtual_batch_norm(X, V * 0, V, v), "ref_count", [NAN, INF, 0, "4", [4]]),
    (lambda v: GF.spectral_norm(X, torch.ones(4), torch.ones(96), eps=v), "eps", [*NOT_NUMBERS, 0, -1.0]),
    (lambda v: GF.spectral_norm(X, torch.ones(4), torch.ones(96), n_power_iterations=v), "n_power_iterations", SIZES),
    (lambda v: GF.spectral_norm(X, torch.ones(4), torch.ones(96), dialect=v), "dialect", [*NAMES, None]),
    (lambda v: GF.upfirdn2d(X, torch.ones(3), gain=v), "gain", NOT_NUMBERS),
    (lambda v: GF.conv2d(X, torch.ones(5, 6, 3, 3), weight_scale=v), "weight_scale", NOT_NUMBERS),
    (lambda v: GF.conv_transpose2d(X, torch.ones(6, 5, 3, 3), weight_scale=v), "weight_scale", NOT_NUMBERS),
    (lambda v: GF.upsample_conv2d(X, torch.ones(5, 6, 3, 3), weight_scale=v), "weight_scale", NOT_NUMBERS),
    (lambda v: GF.upsample_conv2d(X, torch.ones(5, 6, 3, 3), scale_factor=v), "scale_factor", [NAN, INF, 0.5, None, "2"]),
    (lambda v: GF.conv2d_downsample(X, torch.ones(5, 6, 3, 3), weight_scale=v), "weight_scale", NOT_NUMBERS),
]  # fmt: skip


@pytest.mark.parametrize("row", range(len(FUNCTIONS)))
def test_functions_refuse_by_name(row):
    call, name, values = FUNCTIONS[row]
    for value in values:
        with pytest.raises((ValueError, TypeError), match=name):
            call(value)


WEIGHTS = {"conv2d": (5, 6, 3, 3), "conv_transpose2d": (6, 5, 3, 3), "upsample_conv2d": (5, 6, 3, 3), "conv2d_downsample": (5, 6, 3, 3)}  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*WEIGHTS, "fir_upsample_conv2d", "fir_downsample_conv2d"])
def test_a_bias_neither_broadcasts_nor_changes_the_dtype(name, dtype, scale):
    fir = name.startswith("fir")
    x, weight = X.to(dtype), torch.ones(WEIGHTS.get(name, (5, 6, 3, 3)), dtype=dtype)
    function = getattr(GF, name)

    def call(bias):
        return function(x, weight, bias, torch.ones(4) / 4) if fir else function(x, weight, bias, weight_scale=scale)

    assert call(torch.ones(5, dtype=dtype)).dtype == dtype
    for bias in (torch.ones(1, dtype=dtype), torch.ones(6, dtype=dtype), torch.ones(5, 1, dtype=dtype), torch.ones(5).double(), torch.ones(5, dtype=torch.int64)):  # fmt: skip
        if name == "conv_transpose2d" and _torch_takes(x, weight, bias):
            continue  # torch 2.11 in bfloat16, of another dtype: its result is what torch returns
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            call(bias)


def _torch_takes(x, weight, bias):
    try:
        return F.conv_transpose2d(x, weight, bias).dtype == x.dtype
    except RuntimeError:
        return False


def test_classes_out_of_range_are_said_so():
    layer = gnn.ConditionalBatchNorm2d(6, 3)
    for y in ([0, 1, 2, 3], [-1, 0, 1, 2]):
        with pytest.raises(ValueError, match="classes from -?[0-9] to [0-9]; they must be from 0 to 2"):
            layer(X, torch.tensor(y))
    assert layer(X, torch.tensor([0, 1, 2, 2])).shape == X.shape


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 2}, {"dilation": 2}, {"bias": False}], ids=str)
@pytest.mark.parametrize("layer", ["Conv2d", "EqualizedConv2d", "SubpixelConv2d"])
def test_convolutions_obey_torch_options(layer, options, mode):
    if layer == "SubpixelConv2d" and "stride" in options:
        return
    torch.manual_seed(0)
    ours = getattr(gnn, layer)(6, 4, 3, padding=1, padding_mode=mode, dtype=torch.float64, **options)
    out = 16 if layer == "SubpixelConv2d" else 4
    right = torch.nn.Conv2d(6, out, 3, padding=1, padding_mode=mode, dtype=torch.float64, **options)
    right.load_state_dict(ours.state_dict())
    with torch.no_grad():
        right.weight.mul_(getattr(ours, "weight_scale", 1.0))
    expected = right(X.double())
    torch.testing.assert_close(ours(X.double()), F.pixel_shuffle(expected, 2) if out == 16 else expected)
