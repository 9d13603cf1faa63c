"""gankern.nn and gankern.functional in the place of torch.nn and torch.nn.functional: every name, every argument, the
same numbers, and a model file whose two import lines are changed."""

import importlib
import inspect
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations
import torch.nn.utils.prune
from torch import nn

import gankern.functional as GF
import gankern.nn as gnn

MODULES = {
    "gankern.nn": torch.nn,
    "gankern.nn.modules": torch.nn.modules,
    "gankern.nn.functional": torch.nn.functional,
    "gankern.functional": torch.nn.functional,
    "gankern.nn.init": torch.nn.init,
    "gankern.nn.utils": torch.nn.utils,
    "gankern.nn.utils.parametrizations": torch.nn.utils.parametrizations,
}
OURS = {  # name: torch's signature, where Python cannot tell it
    "BatchNorm2d": None,
    "Conv2d": None,
    "ConvTranspose2d": None,
    "InstanceNorm2d": None,
    "LeakyReLU": None,
    "PReLU": None,
    "ReLU": None,
    "conv2d": "input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1",
    "conv_transpose2d": "input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1",
    "leaky_relu": None,
    "prelu": "input, weight",
    "relu": None,
    "spectral_norm": None,
}
STANDING_IN = {
    *("functional", "init", "modules", "parametrizations", "utils"),
    *("activation", "batchnorm", "conv", "instancenorm"),
}


def arguments(function, text=None):
    """[(name, default, kind)] of a signature."""
    if text is not None:
        namespace = {}
        exec(f"def function({text}): ...", namespace)
        function = namespace["function"]
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name(name):
    theirs, ours = MODULES[name], importlib.import_module(name)
    names = [n for n in dir(theirs) if not n.startswith("_")]
    assert len(names) > 3 and set(names) <= set(dir(ours))
    different = {n for n in names if getattr(ours, n) is not getattr(theirs, n)}
    assert different <= OURS.keys() | STANDING_IN
    for n in different & OURS.keys():
        wanted = arguments(getattr(theirs, n), OURS[n])
        have = arguments(getattr(ours, n))
        assert have[: len(wanted)] == wanted, n
        assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, _, kind in have[len(wanted) :]), n
        if inspect.isclass(getattr(ours, n)):
            assert issubclass(getattr(ours, n), getattr(theirs, n))
            assert arguments(getattr(ours, n).forward) == arguments(getattr(theirs, n).forward), n


@pytest.mark.parametrize("name", MODULES)
def test_a_star_import_has_them_too(name):
    namespace = {}
    exec(f"from {name} import *", namespace)
    theirs = MODULES[name]
    listed = getattr(theirs, "__all__", None) or [n for n in vars(theirs) if not n.startswith("_")]
    missing = {n for n in listed if n not in namespace and not inspect.ismodule(getattr(theirs, n))}
    assert not missing
    assert all(namespace[n] is getattr(importlib.import_module(name), n) for n in namespace if n != "__builtins__")


def test_names_that_a_star_import_leaves_out():
    assert gnn.modules.batchnorm._BatchNorm is nn.modules.batchnorm._BatchNorm
    assert gnn.functional is GF and gnn.functional._canonical_mask is F._canonical_mask
    assert gnn.modules.activation.MultiheadAttention is nn.MultiheadAttention
    with pytest.raises(AttributeError, match=r"neither module 'gankern.nn' nor 'torch.nn' has the attribute 'Linea'"):
        gnn.Linea  # noqa: B018
    with pytest.raises(ImportError):
        exec("from gankern.functional import reluu")


@pytest.mark.parametrize(
    "statement",
    [
        "import gankern.nn.functional as m; assert m is __import__('gankern.functional').functional",
        "import gankern.nn.utils.parametrize as m; assert m is torch.nn.utils.parametrize",
        "import gankern.nn.utils.prune as m; assert m is torch.nn.utils.prune",
        "from gankern.nn.utils.parametrizations import orthogonal as m; assert m is torch.nn.utils.parametrizations.orthogonal",
        "from gankern.nn.utils.clip_grad import clip_grad_norm_ as m; assert m is torch.nn.utils.clip_grad_norm_",
        "from gankern.nn.utils import spectral_norm, clip_grad_norm_, parametrize",
        "from gankern.nn.utils.spectral_norm import spectral_norm as m; assert m is __import__('gankern').nn.utils.spectral_norm",
        "from gankern.nn.utils.spectral_norm import SpectralNorm as m; assert issubclass(m, torch.nn.utils.spectral_norm.__globals__['SpectralNorm'])",
        "from gankern.nn.utils.spectral_norm import remove_spectral_norm as m; assert m is torch.nn.utils.remove_spectral_norm",
        "from gankern.nn.utils.weight_norm import weight_norm as m; assert m is torch.nn.utils.weight_norm",
        "from gankern.nn.modules.batchnorm import BatchNorm2d as m; assert m is __import__('gankern').nn.BatchNorm2d",
        "from gankern.nn.modules.batchnorm import BatchNorm1d as m, _BatchNorm; assert m is torch.nn.BatchNorm1d",
        "import gankern.nn.modules.conv as m; assert m.Conv2d is __import__('gankern').nn.Conv2d and m._ConvNd.__name__",
        "from gankern.nn.modules.utils import _pair; assert _pair(3) == (3, 3)",
        "import gankern.nn.modules.normalization as m; assert m is torch.nn.modules.normalization",
        "from gankern.nn.modules import loss as m; assert m is torch.nn.modules.loss",
        "from gankern.nn.parameter import Parameter as m; assert m is torch.nn.Parameter",
        "from gankern.nn.parallel.distributed import DistributedDataParallel as m; assert m is torch.nn.parallel.DistributedDataParallel",
        "from gankern.nn import functional, init, Module, Conv2d, Parameter; init.xavier_uniform_",
    ],
)
def test_import_statements(statement):
    exec(statement, {"torch": torch})


FORMER = {  # where layers once were
    "activation": ["BiasAct", "BiasActPixelNorm", "LeakyReLU", "PixelNorm", "ReLU"],
    "conditional_batch_norm": ["ConditionalBatchNorm2d"],
    "resampling": ["Blur2d", "FIRDownsample2d", "FIRUpsample2d", "SubpixelConv2d"],
}


@pytest.mark.parametrize("submodule", FORMER)
def test_former_places_of_layers(submodule):
    full = f"gankern.nn.modules.{submodule}"
    layers = [getattr(gnn, name) for name in FORMER[submodule]]
    code = f"import {full} as m; from {full} import {', '.join(FORMER[submodule])}; from gankern.nn.modules import {submodule}"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [pickle.loads(f"c{full}\n{layer.__name__}\n.".encode()) for layer in layers] == layers
    assert getattr(gnn.modules, submodule) is importlib.import_module(full)
    assert not {"BiasAct", "PixelNorm"} & vars(nn.modules.activation).keys()  # torch's own is left alone


def test_a_module_that_was_pickled_in_its_former_place(tmp_path):
    """The pickle of a network names the file of each class, in plain text; so does the archive of torch.save."""
    torch.manual_seed(0)
    network = nn.Sequential(
        gnn.SubpixelConv2d(3, 4, 3), gnn.BiasAct(4, "tanh"), gnn.PixelNorm(), gnn.Blur2d(), gnn.ReLU()
    )
    x = torch.randn(2, 3, 5, 5)
    former = {
        "convolution": "resampling",
        "bias_act": "activation",
        "pixel_norm": "activation",
        "upfirdn2d": "resampling",
    }
    now = pickle.dumps(network, protocol=0)
    then = now
    for new, old in former.items():
        assert f"cgankern.nn.modules.{new}\n".encode() in now
        then = then.replace(f"cgankern.nn.modules.{new}\n".encode(), f"cgankern.nn.modules.{old}\n".encode())
    assert torch.equal(pickle.loads(then)(x), network(x))

    with zipfile.ZipFile(Path(__file__).parent / "layers_in_former_places.pt") as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        assert b"gankern.nn.modules.resampling" in archive.read(name)
    saved = torch.load(Path(__file__).parent / "layers_in_former_places.pt", weights_only=False)
    assert torch.equal(saved["network"](saved["x"]), saved["y"])


def test_imports_stay_light():
    code = (
        "import sys, gankern; assert 'gankern.functional' not in sys.modules and 'gankern.nn' not in sys.modules\n"
        "import gankern.nn; heavy = {'torch._dynamo', 'torch._inductor', 'sympy', 'triton', 'scipy', 'matplotlib', 'torchvision'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ---- the same numbers ---------------------------------------------------------------------------------------


def same_format(ours, theirs):
    if ours.ndim == 4:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            assert ours.is_contiguous(memory_format=memory_format) == theirs.is_contiguous(memory_format=memory_format)


NO_BIAS = {"bias": False} if "bias" in inspect.signature(nn.BatchNorm2d).parameters else {}  # torch 2.11 has no such
LAYERS = [
    ("Conv2d", (3, 8, 3), {}, (2, 3, 9, 8)),
    ("Conv2d", (64, 64, 3, 1, 1), {}, (4, 64, 16, 16)),
    ("Conv2d", (4, 8, 4, 2, 1, 1, 2, False), {}, (2, 4, 8, 8)),
    ("Conv2d", (4, 8, 3), {"padding": "same", "dilation": 2}, (2, 4, 9, 9)),
    ("Conv2d", (4, 8, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 4, 9, 9)),
    ("Conv2d", (4, 8, 3), {"padding": 1, "padding_mode": "circular", "dtype": torch.float64}, (2, 4, 9, 9)),
    ("Conv2d", (4, 8, (3, 1)), {"padding": (1, 0)}, (4, 9, 9)),
    ("ConvTranspose2d", (4, 8, 4, 2, 1), {}, (2, 4, 5, 6)),
    ("ConvTranspose2d", (64, 32, 4, 2, 1), {"bias": False}, (4, 64, 8, 8)),
    ("ConvTranspose2d", (4, 8, 3, 2, 1, 1, 2, True, 1, "zeros", "cpu", torch.float64), {}, (2, 4, 5, 6)),
    ("ConvTranspose2d", (4, 8, 3), {"dilation": 2}, (4, 5, 6)),
    ("BatchNorm2d", (6,), {}, (4, 6, 5, 3)),
    ("BatchNorm2d", (6, 1e-3, 0.3, False, False), {}, (4, 6, 5, 3)),
    ("BatchNorm2d", (6,), {"momentum": None, **NO_BIAS}, (4, 6, 5, 3)),
    ("BatchNorm2d", (6,), {"dtype": torch.float64}, (4, 6, 5, 3)),
    ("ReLU", (), {}, (4, 6)),
    ("ReLU", (True,), {}, (4, 6, 3, 3)),
    ("LeakyReLU", (), {}, (4, 6)),
    ("LeakyReLU", (0.2, True), {}, (4, 6, 3, 3)),
    ("LeakyReLU", (-0.5,), {}, (4, 6, 3, 3)),
    ("PReLU", (), {}, (4, 6)),
    ("PReLU", (6, 0.1), {}, (4, 6, 3, 3)),
    ("PReLU", (), {"dtype": torch.float64}, (6,)),
]


@pytest.mark.filterwarnings("ignore:ConvTranspose2d")
@pytest.mark.parametrize(("name", "args", "options", "shape"), LAYERS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_layers(name, args, options, shape, channels_last):
    sides = []
    for library in (gnn, nn):
        torch.manual_seed(0)
        layer = getattr(library, name)(*args, **options)
        x = torch.randn(shape, dtype=options.get("dtype") or next((p.dtype for p in layer.parameters()), None))
        if channels_last and x.ndim == 4:
            layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        x.requires_grad_()
        results = {f"at first {key}": value.clone() for key, value in layer.state_dict().items()}
        assert repr(layer) == repr(getattr(nn, name)(*args, **options))
        for training in (True, True, False):
            layer.train(training)
            y = layer(input=x + 0)
            grads = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], create_graph=True)
            scale = torch.linspace(1, 2, grads[0].numel(), dtype=x.dtype).view_as(grads[0])
            leaves = [x, *layer.parameters()]
            second = torch.autograd.grad((grads[0] * scale).square().sum(), leaves, allow_unused=True)
            second = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, second)]
            results[f"{training} {len(results)} y"] = y
            results |= {f"{training} {len(results) + i}": r for i, r in enumerate((*grads, *second))}
        sides.append(results | dict(layer.state_dict()))
    ours, theirs = sides
    assert ours.keys() == theirs.keys()
    for key in ours:
        if key.startswith("at first"):
            assert torch.equal(ours[key], theirs[key])
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=2e-5 * max(1.0, theirs[key].abs().max().item()))
        if key.endswith("y"):
            same_format(ours[key], theirs[key])


METHODS = {  # of torch's layers, that people override
    "any dimensions": ("BatchNorm2d", (4,), (6, 4), "_check_input_dim", lambda base: lambda self, x: None),
    "any volumes": ("InstanceNorm2d", (4,), (2, 4, 3, 3, 2), "_check_input_dim", lambda base: lambda self, x: None),
    "scaled": ("InstanceNorm2d", (4,), (2, 4, 3, 3), "_apply_instance_norm", lambda base: lambda self, x: 2 * base(self, x)),
    "convolution": (
        *("Conv2d", (4, 4, 3), (2, 4, 5, 5), "_conv_forward"),
        lambda base: lambda self, x, weight, bias: base(self, x, 2 * weight, bias),
    ),
    "transposed": (
        *("ConvTranspose2d", (4, 4, 3, 2), (2, 4, 5, 5), "_output_padding"),
        lambda base: lambda self, *args, **options: [1, 1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", METHODS)
def test_subclasses_may_override_what_torchs_may(case):
    name, arguments, shape, method, override = METHODS[case]
    x, results = torch.randn(shape), []
    for library in (gnn, nn):
        cls = getattr(library, name)
        torch.manual_seed(0)
        layer = type("Overriding", (cls,), {method: override(getattr(cls, method))})(*arguments)
        results.append([layer(x), *layer.state_dict().values()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_activations_take_what_torchs_take(name, inplace):
    ours, theirs = getattr(GF, name), getattr(F, name)
    inputs = [torch.randn(3, 4), torch.randn(()), torch.randn(0, 3), torch.randn(3, 4).half(), torch.randn(4, 3).t()]
    if name == "relu":
        inputs += [torch.arange(-3, 3), torch.randn(3, 4).to_sparse()]
    for x in inputs:
        a, b = x.clone(), x.clone()
        y = ours(input=a, inplace=inplace)
        assert torch.equal(y.to_dense(), theirs(b, inplace=inplace).to_dense()) and y.layout is x.layout
        assert torch.equal(a.to_dense(), b.to_dense()) and (y is a) == inplace


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "conv2d", "conv_transpose2d"])
def test_functions_under_torch_func_and_fx(name):
    weights = {"conv2d": (4, 64, 3, 3), "conv_transpose2d": (64, 4, 4, 4)}
    rest = [torch.randn(weights[name])] if name in weights else []
    options = {"stride": 2, "padding": 1} if name == "conv_transpose2d" else {}
    x, v = torch.randn(3, 2, 64, 16, 16), torch.randn(3, 2, 64, 16, 16)

    def run(function):
        def one(x):
            return function(x, *rest, **options)

        mapped = torch.func.vmap(one)(x)
        per_sample = torch.func.vmap(torch.func.grad(lambda x: one(x).square().sum()))(x)
        return mapped, per_sample, *torch.func.jvp(one, (x[0],), (v[0],))

    for ours, theirs in zip(run(getattr(GF, name)), run(getattr(F, name))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    traced = torch.fx.symbolic_trace(lambda x: getattr(GF, name)(x, *rest, **options))
    assert any(node.target is getattr(GF, name) for node in traced.graph.nodes)
    assert torch.equal(traced(x[0]), getattr(GF, name)(x[0], *rest, **options))


def test_tensor_subclasses_see_the_functions():
    seen = []

    class Watching(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.randn(2, 3, 8, 8).as_subclass(Watching)
    assert isinstance(GF.relu(x), Watching) and GF.relu in seen
    assert isinstance(GF.conv2d(x, torch.randn(4, 3, 3, 3)), Watching) and GF.conv2d in seen


# ---- a model file -------------------------------------------------------------------------------------------

FILE = """
import torch
import torch.nn as nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, channels, out, down):
        super().__init__()
        self.down = down
        self.c1 = nn.utils.spectral_norm(nn.Conv2d(channels, out, 3, padding=1))
        self.c2 = nn.utils.parametrizations.spectral_norm(nn.Conv2d(out, out, kernel_size=3, stride=1, padding=1))
        self.shortcut = nn.Conv2d(channels, out, 1, bias=False)
        nn.init.orthogonal_(self.shortcut.weight, gain=0.5)

    def forward(self, x):
        h = self.c2(F.relu(self.c1(F.leaky_relu(input=x, negative_slope=0.2)), inplace=True))
        y = h + self.shortcut(x)
        return F.avg_pool2d(y, 2) if self.down else y


class Generator(nn.Module):
    def __init__(self, latent=16, width=16):
        super().__init__()
        self.net = nn.Sequential(
            nn.ConvTranspose2d(latent, 2 * width, 4, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(True),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Upsample(scale_factor=2), nn.Conv2d(width, 3, 3, 1, 1), nn.Tanh(),
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, 0.0, 0.05)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, z):
        return self.net(z[:, :, None, None])


class Discriminator(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.first = nn.Conv2d(3, width, 4, 2, 1)
        self.act = nn.LeakyReLU(0.2, inplace=True)
        self.blocks = nn.ModuleList([Block(width, 2 * width, True), Block(2 * width, 2 * width, False)])
        self.out = nn.utils.spectral_norm(nn.Linear(2 * width, 1), n_power_iterations=2)

    def forward(self, x):
        h = self.act(self.first(x))
        for block in self.blocks:
            h = block(h)
        return self.out(F.relu(h).sum((2, 3)))


def train(steps):
    torch.manual_seed(0)
    g, d = Generator(), Discriminator()
    optimisers = [torch.optim.SGD(m.parameters(), 1e-3) for m in (g, d)]
    losses = []
    for _ in range(steps):
        real, fake = torch.randn(4, 3, 16, 16), g(torch.randn(4, 16))
        x = (0.5 * real + 0.5 * fake.detach()).requires_grad_()
        (gradient,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
        loss = F.relu(1 - d(real)).mean() + F.relu(1 + d(fake.detach())).mean()
        loss = loss + 10 * (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        optimisers[1].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(d.parameters(), 10.0)
        optimisers[1].step()
        g_loss = -d(g(torch.randn(4, 16))).mean()
        optimisers[0].zero_grad()
        g_loss.backward()
        optimisers[0].step()
        losses += [loss.detach(), g_loss.detach()]
    return g, d, torch.stack(losses)
"""


def test_a_model_file_with_two_lines_changed():
    changed = FILE.replace("torch.nn as nn", "gankern.nn as nn").replace(
        "torch.nn.functional as F", "gankern.functional as F"
    )
    assert sum(a != b for a, b in zip(FILE.splitlines(), changed.splitlines())) == 2
    sides = []
    for text in (FILE, changed):
        namespace = {"__name__": "model"}
        exec(text, namespace)
        sides.append(namespace["train"](3))
    (g, d, losses), (own_g, own_d, own_losses) = sides
    assert (
        type(own_d.first) is gnn.Conv2d and type(own_d.act) is gnn.LeakyReLU and type(own_g.net[1]) is gnn.BatchNorm2d
    )
    torch.testing.assert_close(own_losses, losses, rtol=1e-4, atol=1e-4)
    for ours, theirs in ((own_g, g), (own_d, d)):
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-3, atol=1e-4)
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
