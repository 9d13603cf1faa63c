"""Siblings agree: what all public functions and layers share is called, ordered and preset the same way."""

import inspect
import typing

import pytest
import torch
from torch import Tensor, nn

import gankern
import gankern.functional as GF
import gankern.nn as gnn
from gankern import data, diagnostics, games, losses, metrics, models, penalties, training

EMPTY, POSITIONAL = inspect.Parameter.empty, inspect.Parameter.POSITIONAL_OR_KEYWORD


def public(module):
    """The functions and classes of ours that a module offers."""
    names = getattr(module, "__all__", None) or [name for name in dir(module) if not name.startswith("_")]
    found = {name: getattr(module, name) for name in names}
    return {n: v for n, v in found.items() if callable(v) and getattr(v, "__module__", "").startswith("gankern")}


FUNCTIONS = {n: f for n, f in public(GF).items() if inspect.isfunction(f)}
LAYERS = {n: c for n, c in public(gnn).items() if inspect.isclass(c)}
AS_PUBLISHED = {  # names and order of torch's functions, and of StyleGAN's, as far as they go
    "conv2d": ["weight", "bias", "stride", "padding", "dilation", "groups"],
    "conv_transpose2d": ["weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"],
    "relu": ["inplace"],
    "prelu": ["weight"],
    "leaky_relu": ["negative_slope", "inplace"],
    "batch_norm_act": ["running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"],
    "group_norm_act": ["num_groups", "weight", "bias", "eps"],
    "instance_norm_act": ["running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"],
    "upfirdn1d": ["filter", "up", "down", "padding", "flip_filter", "gain"],
    "upfirdn3d": ["filter", "up", "down", "padding", "flip_filter", "gain"],
    "upfirdn2d": ["filter", "up", "down", "padding", "flip_filter", "gain"],
    "upsample2d": ["filter", "up", "padding", "flip_filter", "gain"],
    "downsample2d": ["filter", "down", "padding", "flip_filter", "gain"],
    "filter2d": ["filter", "padding", "flip_filter", "gain"],
    **{f"upsample{d}d": ["filter", "up", "padding", "flip_filter", "gain"] for d in (1, 3)},
    **{f"downsample{d}d": ["filter", "down", "padding", "flip_filter", "gain"] for d in (1, 3)},
    **{f"filter{d}d": ["filter", "padding", "flip_filter", "gain"] for d in (1, 3)},
}
# The name is torch's, and so is the preset.
SLOPE_OF_TORCH = {"leaky_relu", "LeakyReLU"}
# Their options are those of what is asked for by name, or the fields of a record.
BY_NAME = {"build", "configure", "reconfigure", "Penalty"}
MODULES = {
    m.__name__: m for m in (gankern, GF, gnn, gnn.init, gnn.utils, gnn.utils.parametrizations, penalties, losses,
                            metrics, data, models, diagnostics, training, games)
}  # fmt: skip


def is_tensor(annotation):
    """Whether an argument is a tensor, several of them, or none."""
    tensors = {Tensor, type(None)}
    given = set(typing.get_args(annotation)) or {annotation}
    if typing.get_origin(annotation) not in (None, typing.Union, type(int | None)):
        return all(is_tensor(part) for part in given)  # a sequence of them
    return given <= tensors


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_keywords_after_the_tensors(name):
    function = FUNCTIONS[name]
    types = typing.get_type_hints(function)
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind is POSITIONAL]
    if name in AS_PUBLISHED:
        assert [p.name for p in positional][1:] == AS_PUBLISHED[name]
    else:
        assert [p.name for p in positional if p.default is not EMPTY and not is_tensor(types[p.name])] == []
    assert all(p.kind in (POSITIONAL, p.KEYWORD_ONLY) for p in parameters)
    assert parameters[-1].name == "implementation" and parameters[-1].default is None


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_can_be_told_its_implementation(name):
    implementation = inspect.signature(LAYERS[name]).parameters["implementation"]
    assert implementation.kind is implementation.KEYWORD_ONLY and implementation.default is None
    needed = {p.name: 4 for p in inspect.signature(LAYERS[name]).parameters.values() if p.default is EMPTY}
    needed = {**needed, **({"kernel_size": 3} if "kernel_size" in needed else {})}
    assert LAYERS[name](**needed).implementation is None
    assert LAYERS[name](**needed, implementation="reference").implementation == "reference"
    with pytest.raises(ValueError, match="implementation is 'fast'; accepted are None, 'auto', 'reference'"):
        LAYERS[name](**needed, implementation="fast")


X = torch.randn(2, 4, 8, 8)
RUN = {
    "Conv2d": lambda i: gnn.Conv2d(4, 4, 3, padding=1, implementation=i),
    "ConvTranspose2d": lambda i: gnn.ConvTranspose2d(4, 4, 4, 2, 1, implementation=i),
    "UpsampleConv2d": lambda i: gnn.UpsampleConv2d(4, 4, implementation=i),
    "ConvDownsample2d": lambda i: gnn.ConvDownsample2d(4, 4, implementation=i),
    "EqualizedConv2d": lambda i: gnn.EqualizedConv2d(4, 4, 3, padding=1, implementation=i),
    "EqualizedConv2d, upsampling": lambda i: gnn.EqualizedConv2d(4, 4, 3, resample="upsample", implementation=i),
    "SubpixelConv2d": lambda i: gnn.SubpixelConv2d(4, 4, 3, padding=1, implementation=i),
    "ReLU": lambda i: gnn.ReLU(implementation=i),
    "LeakyReLU": lambda i: gnn.LeakyReLU(implementation=i),
    "PReLU": lambda i: gnn.PReLU(implementation=i),
    "BiasAct": lambda i: gnn.BiasAct(4, "tanh", implementation=i),
    "PixelNorm": lambda i: gnn.PixelNorm(implementation=i),
    "BiasActPixelNorm": lambda i: gnn.BiasActPixelNorm(4, implementation=i),
    "BatchNorm2d": lambda i: gnn.BatchNorm2d(4, implementation=i),
    "BatchNormAct2d": lambda i: gnn.BatchNormAct2d(4, implementation=i),
    "MinibatchStdDev": lambda i: gnn.MinibatchStdDev(2, implementation=i),
    "SelfAttention2d": lambda i: gnn.SelfAttention2d(4, implementation=i),
    "Blur2d": lambda i: gnn.Blur2d(implementation=i),
    "FIRUpsample2d": lambda i: gnn.FIRUpsample2d(implementation=i),
    "spectral_norm, hook": lambda i: gnn.utils.spectral_norm(nn.Conv2d(4, 4, 3), implementation=i),
    "spectral_norm": lambda i: gnn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3), implementation=i),
}
PRIMITIVE = {
    "ReLU": "bias_act", "LeakyReLU": "bias_act", "PReLU": "bias_act", "BiasAct": "bias_act", "PixelNorm": "pixel_norm",
    "BiasActPixelNorm": "pixel_norm", "BatchNorm2d": "batch_norm_act", "BatchNormAct2d": "batch_norm_act",
    "MinibatchStdDev": "minibatch_stddev", "SelfAttention2d": "self_attention2d", "Blur2d": "upfirdn2d", "FIRUpsample2d": "upfirdn2d",
    "spectral_norm, hook": "spectral_norm", "spectral_norm": "spectral_norm",
}  # fmt: skip


@pytest.mark.parametrize("name", RUN)
def test_what_a_layer_is_told_is_what_runs(name):
    torch.manual_seed(0)
    layer = RUN[name]("reference")
    layer(X)
    assert gankern.last_implementation(PRIMITIVE.get(name, "convolution")) == "reference"
    with pytest.raises((ValueError, RuntimeError), match="implementation=.cuda.|cuda"):
        RUN[name]("cuda")(X)


@pytest.mark.parametrize("name", [*FUNCTIONS, *LAYERS])
def test_one_preset_for_each_shared_option(name):
    parameters = inspect.signature({**FUNCTIONS, **LAYERS}[name]).parameters
    presets = {
        "negative_slope": (0.01,) if name in SLOPE_OF_TORCH else (0.2,),
        "implementation": (None,),
        "clamp": (None,),
        "weight_scale": (1.0,),
        "include_self": (False,),
        "dim": (1,) if "spectral_norm" not in name else (0,),
        "flip_filter": (False,),
        "gain": (1.0, 2**0.5) if name.startswith("Equalized") else (1.0,),
    }
    for option, values in presets.items():
        if option in parameters and parameters[option].default is not EMPTY:
            assert parameters[option].default in values, option


@pytest.mark.parametrize("module", MODULES)
def test_signatures_say_what_is_accepted(module):
    """No ``*args`` and no ``**options`` that leave a reader, an editor and a type checker without names."""
    vague = []
    for name, value in public(MODULES[module]).items():
        if name in BY_NAME or (inspect.isclass(value) and issubclass(value, BaseException)):
            continue
        parameters = inspect.signature(value).parameters.values()
        vague += [(name, str(p)) for p in parameters if p.kind is p.VAR_KEYWORD or p.name in ("args", "arguments")]
    assert vague == []


def test_options_of_another_function_are_said_with_their_presets():
    own = inspect.signature(penalties.gradient_penalty).parameters
    for function, changed in (
        (penalties.lipschitz, {"one_sided": True}),
        (penalties.zero_centered, {"target": 0.0}),
        (penalties.Lipschitz, {"one_sided": True}),
    ):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                assert parameter.default == changed.get(name, own[name].default)
    assert inspect.signature(penalties.dragan).parameters["noise"].default == 0.5
    assert inspect.signature(penalties.dragan).parameters["method"].default == "auto"
    assert inspect.signature(models.wgan).parameters["generator_norm"].default == "batch"
    critic = nn.Linear(3, 1)
    nn.init.constant_(critic.weight, 0.1)
    assert penalties.lipschitz(critic, torch.zeros(4, 3), torch.ones(4, 3)) == 0  # and that is what it does
    with pytest.raises(TypeError, match="Dragan: no option is called 'alfa'; there are ") as error:
        penalties.Dragan(alfa=1)
    listed = str(error.value).partition("there are ")[2].split(", ")
    assert set(listed) == set(inspect.signature(penalties.dragan).parameters) - {"critic", "real"}
