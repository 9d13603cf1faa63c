"""Every module under every transformation of programs that torch has: the numbers of the plain call."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, stack_module_state

import gankern.functional as GF
import gankern.nn as gnn

pytestmark = pytest.mark.usefixtures("onnx_functions_once")

F64 = {"dtype": torch.float64}


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def virtual():
    net = nn.Sequential(gnn.VirtualBatchNorm2d(4, activation="relu", device=None).double())
    gnn.set_reference_batch(net, values(5, 4, 6, 6, seed=3))
    gnn.freeze_reference_batch(net)
    return net


def virtual_in_training():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, **F64), gnn.VirtualBatchNorm2d(4, activation="relu").double())
    return gnn.set_reference_batch(net, values(5, 4, 6, 6, seed=3))


def attention():
    layer = gnn.SelfAttention2d(4, **F64)
    nn.init.constant_(layer.gamma, 0.5)
    return layer


IMAGES = (4, 4, 6, 6)
# Every module that gankern has in place of or beside torch's: how it is made, and the shape that it takes.
MODULES = {
    "BatchNorm2d": (lambda: gnn.BatchNorm2d(4, **F64), IMAGES),
    "BatchNormAct1d": (lambda: gnn.BatchNormAct1d(4, **F64), (6, 4)),
    "BatchNormAct2d": (lambda: gnn.BatchNormAct2d(4, negative_slope=0.2, **F64), IMAGES),
    "BatchNormAct3d": (lambda: gnn.BatchNormAct3d(4, activation="relu", **F64), (4, 4, 3, 3, 2)),
    "BiasAct": (lambda: gnn.BiasAct(4, "leaky_relu", clamp=1.0, **F64), IMAGES),
    "BiasActPixelNorm": (lambda: gnn.BiasActPixelNorm(4, **F64), IMAGES),
    "Blur1d": (lambda: gnn.Blur1d().double(), (4, 4, 6)),
    "Blur2d": (lambda: gnn.Blur2d().double(), IMAGES),
    "Blur3d": (lambda: gnn.Blur3d().double(), (2, 4, 2, 4, 2)),
    "Conv2d": (lambda: gnn.Conv2d(4, 3, 3, padding=1, **F64), IMAGES),
    "Conv2d reflect": (lambda: gnn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect", **F64), IMAGES),
    "ConvDownsample2d": (lambda: gnn.ConvDownsample2d(4, 3, 3, **F64), IMAGES),
    "ConvTranspose2d": (lambda: gnn.ConvTranspose2d(4, 3, 4, 2, 1, **F64), IMAGES),
    "EqualizedConv2d": (lambda: gnn.EqualizedConv2d(4, 3, 3, padding=1, **F64), IMAGES),
    "EqualizedConv1d": (lambda: gnn.EqualizedConv1d(4, 3, 3, padding=1, **F64), (4, 4, 6)),
    "EqualizedConv3d": (lambda: gnn.EqualizedConv3d(4, 3, 3, padding=1, **F64), (4, 4, 3, 3, 2)),
    "EqualizedLinear": (lambda: gnn.EqualizedLinear(4, 3, **F64), (6, 4)),
    "FIRDownsample1d": (lambda: gnn.FIRDownsample1d().double(), (4, 4, 6)),
    "FIRDownsample2d": (lambda: gnn.FIRDownsample2d().double(), IMAGES),
    "FIRDownsample3d": (lambda: gnn.FIRDownsample3d().double(), (2, 4, 2, 4, 2)),
    "FIRUpsample1d": (lambda: gnn.FIRUpsample1d().double(), (4, 4, 6)),
    "FIRUpsample2d": (lambda: gnn.FIRUpsample2d().double(), IMAGES),
    "FIRUpsample3d": (lambda: gnn.FIRUpsample3d().double(), (2, 4, 2, 4, 2)),
    "GroupNormAct": (lambda: gnn.GroupNormAct(2, 4, negative_slope=0.2, **F64), IMAGES),
    "InstanceNorm2d": (lambda: gnn.InstanceNorm2d(4, affine=True, **F64), IMAGES),
    "InstanceNormAct1d": (lambda: gnn.InstanceNormAct1d(4, **F64), (4, 4, 6)),
    "InstanceNormAct2d": (lambda: gnn.InstanceNormAct2d(4, affine=True, activation="relu", **F64), IMAGES),
    "InstanceNormAct3d": (lambda: gnn.InstanceNormAct3d(4, negative_slope=0.2, **F64), (4, 4, 3, 3, 2)),
    "SelfAttention2d": (attention, IMAGES),
    "LeakyReLU": (lambda: gnn.LeakyReLU(0.2), IMAGES),
    "PReLU": (lambda: gnn.PReLU(dtype=torch.float64), IMAGES),
    "MinibatchDiscrimination": (lambda: gnn.MinibatchDiscrimination(4, 3, 2, **F64), (6, 4)),
    "MinibatchStdDev": (lambda: gnn.MinibatchStdDev(2), IMAGES),
    "PixelNorm": (lambda: gnn.PixelNorm(), IMAGES),
    "ReLU in place": (lambda: nn.Sequential(nn.Identity(), gnn.Conv2d(4, 3, 3, **F64), gnn.ReLU(True)), IMAGES),
    "SubpixelConv1d": (lambda: gnn.SubpixelConv1d(4, 3, 3, 2, padding=1, **F64), (4, 4, 6)),
    "SubpixelConv2d": (lambda: gnn.SubpixelConv2d(4, 3, 3, 2, **F64), IMAGES),
    "SubpixelConv3d": (lambda: gnn.SubpixelConv3d(4, 3, 1, 2, **F64), (2, 4, 2, 4, 2)),
    "UpsampleConv2d": (lambda: gnn.UpsampleConv2d(4, 3, 3, **F64), IMAGES),
    "VirtualBatchNorm2d": (virtual, IMAGES),
    "VirtualBatchNorm2d in training": (virtual_in_training, IMAGES),
    "spectral_norm": (
        lambda: gnn.utils.spectral_norm(nn.Conv2d(4, 3, 3, **F64)),
        IMAGES,
    ),
    "spectral_norm wrapper": (lambda: gnn.utils.spectral_norm(nn.Linear(4, 3, **F64), dialect="wrapper"), (6, 4)),
    "spectral_norm biggan": (lambda: gnn.utils.spectral_norm(nn.Linear(4, 3, **F64), dialect="biggan"), (6, 4)),
    "parametrization": (lambda: gnn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 3, 3, **F64)), IMAGES),
    "group_spectral_norm": (
        lambda: gnn.utils.group_spectral_norm(nn.Sequential(gnn.utils.spectral_norm(nn.Conv2d(4, 3, 3, **F64)))),
        IMAGES,
    ),
}
NAMES = list(MODULES)


def made(name, training=False):
    torch.manual_seed(0)
    return MODULES[name][0]().train(training)


def image(name, seed=1):
    return values(*MODULES[name][1], seed=seed)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def parameters(module):
    return {n: p.detach() for n, p in module.named_parameters()}, dict(module.named_buffers())


def loss(module):
    def of(weights, buffers, x):
        return functional_call(module, (weights, buffers), (x,)).square().sum()

    return of


def gradients(module, x):
    """By eager backwards."""
    if not list(module.parameters()):
        pytest.skip("it has no parameters")
    found = torch.autograd.grad(module(x).square().sum(), list(module.parameters()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(module.named_parameters(), found)}


def traced(name, training):
    module, twin = made(name, training), made(name, training)
    program = torch.jit.trace(module, image(name), check_trace=not training)
    state = dict([*twin.named_parameters(), *twin.named_buffers()])
    with torch.no_grad():  # which tracing has moved on
        for n, x in (*program.named_parameters(), *program.named_buffers()):
            x.copy_(state[n])
    x = image(name, seed=2)
    return program(x), twin(x)


def exported(name, training):
    module, twin = made(name, training), made(name, training)
    program = torch.export.export(module, (image(name),))
    assert not [n for n in program.graph.nodes if "gankern" in str(n.target)]
    x = image(name, seed=2)
    run = program.module()
    found, expected = run(x), twin(x)
    close({n: b for n, b in run.named_buffers() if n in dict(twin.named_buffers())}, dict(run.named_buffers()))
    return found, expected


def per_sample(name, training):
    module = made(name)
    x = torch.stack([image(name), image(name, seed=2)])
    rows = [gradients(made(name), one) for one in x]
    found = torch.func.vmap(torch.func.grad(loss(module)), (None, None, 0))(*parameters(module), x)
    return found, {n: torch.stack([r[n] for r in rows]) for n in rows[0]}


def ensemble(name, training):
    nets = [made(name), made(name)]
    if not [*nets[0].parameters(), *nets[0].buffers()]:
        pytest.skip("it has no state")
    if nn.utils.parametrize.is_parametrized(nets[0]):
        pytest.skip("torch stacks modules of one class, and a parametrized one has a class of its own")
    for p in nets[1].parameters():
        p.data.mul_(1.5).add_(0.1)
    base = copy.deepcopy(nets[0]).to("meta")
    weights, buffers = stack_module_state(nets)
    x = image(name)

    def one(weights, buffers):
        return functional_call(base, (weights, buffers), (x,))

    return torch.func.vmap(one)(weights, buffers), torch.stack([net(x) for net in nets])


def pushed(name, training):
    module = made(name, training)
    x, v = image(name), image(name, seed=2)
    twin = made(name, training)
    jacobian = torch.autograd.functional.jacobian(copy.deepcopy(twin), x)
    weights, buffers = parameters(module)

    def run(x):  # buffers that were made outside of the transform may not be written to: torch's too
        return functional_call(module, (weights, {n: b.clone() for n, b in buffers.items()}), (x,))

    return torch.func.jvp(run, (x,), (v,)), (twin(x), torch.tensordot(jacobian, v, x.ndim))


def dual(name, training):
    module, twin = made(name, training), made(name, training)
    x, v = image(name), image(name, seed=2)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(module(forward_ad.make_dual(x, v))).tangent
    return found, torch.tensordot(torch.autograd.functional.jacobian(twin, x), v, x.ndim)


def of_weights(name, training):
    """torch.func.grad of a loss, by functional_call."""
    module = made(name, training)
    weights, buffers = parameters(module)
    buffers = {n: b.clone() for n, b in buffers.items()}
    return torch.func.grad(loss(module))(weights, buffers, image(name)), gradients(made(name, training), image(name))


def on_meta(name, training):
    module = made(name, training).to("meta")
    y = module(image(name).to("meta"))
    expected = made(name, training)(image(name))
    assert y.device.type == "meta" and (y.shape, y.dtype) == (expected.shape, expected.dtype)
    return (), ()


def in_onnxruntime(name, training):
    """In single precision, which is what that computes convolutions in; for batches of the exported size and of another.
    A sample of zeros is in them: the exporter's optimiser takes small constants for zero."""
    if training:
        pytest.skip("an ONNX program has no state to train")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    module = made(name).float()
    x = image(name).float()
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.onnx.export(module, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    expected, found = [], []
    for samples in (x, torch.cat([torch.zeros_like(x), x.flip(0)])):
        (ours,) = session.run(None, {session.get_inputs()[0].name: samples.numpy()})
        right = made(name)(samples.double())
        scale = 2e-7 / 1e-9 * right.abs().max()  # two roundings, where close() allows 1e-9
        expected.append(right / scale)
        found.append(torch.from_numpy(ours).double() / scale)
    return found, expected


TRANSFORMATIONS = [traced, exported, per_sample, ensemble, pushed, dual, of_weights, on_meta, in_onnxruntime]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transformation", TRANSFORMATIONS, ids=lambda f: f.__name__)
def test_transformation(transformation, name, training):
    if training and name == "VirtualBatchNorm2d":
        pytest.skip("it trains with a reference batch")
    found, expected = transformation(name, training)
    close(found, expected)


STATEFUL = {name: MODULES[name] for name in NAMES if "spectral" in name or name == "parametrization"} | {
    "InstanceNorm2d": (lambda: gnn.InstanceNorm2d(4, track_running_stats=True, **F64), IMAGES),
    "BatchNormAct2d": (lambda: gnn.BatchNormAct2d(4, momentum=0.2, **F64), IMAGES),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_state_that_was_made_outside_goes_on(name):
    """Under torch.func too, without functional_call, where torch's goes on; torch refuses to count batch norm's calls."""
    make, shape = STATEFUL[name]
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(make().train())
        nets[-1].num_batches_tracked = None
    module, twin = nets
    x = values(*shape, seed=1).requires_grad_()
    for _ in range(2):
        found = torch.func.grad(lambda x: module(x).square().sum())(x.detach())
        close(found, torch.autograd.grad(twin(x).square().sum(), x)[0])
    close(dict(module.named_buffers()), dict(twin.named_buffers()))


def test_every_module_is_in_the_table():
    ours = {n for n in gnn.__all__ if isinstance(getattr(gnn, n), type) and "gankern" in getattr(gnn, n).__module__}
    tested = {name.partition(" ")[0] for name in NAMES} | {"VirtualBatchNorm1d", "VirtualBatchNorm3d"}
    conditional = {n for n in ours if n.startswith(("ConditionalBatchNorm", "LinearBatchNorm"))}  # labels, a vector
    assert ours <= tested | {"ReLU"} | conditional


@pytest.mark.parametrize("name", NAMES)
def test_scripting_is_refused_in_one_sentence(name):
    """By a module as well as by a network that has one in it."""
    for module in (made(name), nn.Sequential(nn.Flatten(0, 0), made(name))):
        with pytest.raises(TypeError, match="torch.jit.script cannot compile gankern's .*: use torch.jit.trace or"):
            torch.jit.script(module)


@pytest.mark.parametrize(
    "name", [n for n in GF.__all__ if "gankern" in (getattr(getattr(GF, n), "__module__", "") or "")]
)
def test_scripting_of_functions_is_refused_in_one_sentence(name):
    function = getattr(GF, name)
    if not callable(function):
        pytest.skip("it is no function")
    with pytest.raises(TypeError, match="torch.jit.script cannot compile gankern's"):
        torch.jit.script(function)


def test_what_has_spectral_norm_taken_off_can_be_scripted():
    layers = gnn.utils.spectral_norm(nn.Linear(3, 2)), gnn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))
    nn.utils.remove_spectral_norm(layers[0])
    nn.utils.parametrize.remove_parametrizations(layers[1], "weight")
    for layer in layers:
        assert torch.jit.script(layer)(torch.ones(1, 3)).shape == (1, 2)
