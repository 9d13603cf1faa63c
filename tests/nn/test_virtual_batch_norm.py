"""Networks with a reference batch: that it is used, followed, saved, copied, and missed."""

import copy
import io
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gankern.functional as GF
import gankern.nn as gnn


def network(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        gnn.VirtualBatchNorm2d(6, activation="leaky_relu", **options),
        nn.Conv2d(6, 4, 3),
        gnn.VirtualBatchNorm2d(4, **options),
    ).double()


@pytest.fixture
def batch():
    return torch.randn(8, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def x():
    return torch.randn(3, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def by_hand(model, batch, x, count):
    """Reference and live batch side by side through every layer, in plain PyTorch."""
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            batch, x = layer(batch), layer(x)
            continue
        mean, mean_square = batch.mean((0, 2, 3)), batch.square().mean((0, 2, 3))
        affine = layer.weight, layer.bias
        options = {key: getattr(layer, key) for key in ("eps", "activation", "negative_slope")}
        x = GF.virtual_batch_norm(x, mean, mean_square, count, *affine, **options, implementation="reference")
        batch = GF.virtual_batch_norm(batch, mean, mean_square, None, *affine, **options, implementation="reference")
    return x


@pytest.mark.parametrize("count_itself", [True, False])
def test_values_and_gradients_through_the_reference_batch(batch, x, count_itself):
    model = gnn.set_reference_batch(network(count_itself=count_itself), batch)
    right = by_hand(model, batch, x, 8 if count_itself else None)
    torch.testing.assert_close(model(x), right)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(model(x).square().sum(), parameters)
    for mine, exact in zip(ours, torch.autograd.grad(right.square().sum(), parameters)):
        torch.testing.assert_close(mine, exact)


def test_gradient_penalty(batch, x):
    model = gnn.set_reference_batch(network(), batch)
    penalties = []
    for run in (model, lambda x: by_hand(model, batch, x, 8)):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(run(leaf).sum(), leaf, create_graph=True)
        penalties.append(torch.autograd.grad(g.square().sum(), list(model.parameters()), allow_unused=True))
    for mine, exact in zip(*penalties):
        torch.testing.assert_close(
            *(torch.zeros(()) if g is None else g.detach() for g in (mine, exact)), check_dtype=False
        )


def test_statistics_follow_the_weights(batch, x):
    model = gnn.set_reference_batch(network(), batch)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(3):
        # Two forwards before one backward.
        loss = model(x).square().sum() + model(2 * x).abs().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(model(x), by_hand(model, batch, x, 8))
    # A change that leaves no trace on the parameters: what an exponential average does.
    model[0].weight.data.mul_(1.5)
    for mode in (True, False):
        with torch.no_grad():
            torch.testing.assert_close(model.train(mode)(x), by_hand(model, batch, x, 8))


def test_evaluation_after_loading_needs_no_batch(batch, x):
    model = gnn.set_reference_batch(network(), batch)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).square().sum().backward()
    optimizer.step()
    state = nn.ModuleDict({"generator": model}).state_dict()  # of what holds the network, too
    assert not any("reference_batch" in key for key in state)
    # Those of the weights that were saved, not of the last forward's.
    loaded = network()
    loaded.load_state_dict({key.removeprefix("generator."): value for key, value in state.items()})
    expected = by_hand(model, batch, x, 8)
    torch.testing.assert_close(loaded.eval()(x), expected)
    assert model.training and model[1].training
    with pytest.raises(RuntimeError, match="no reference batch to train with: call gankern.nn.set_reference_batch"):
        loaded.train()(x)
    torch.testing.assert_close(gnn.set_reference_batch(loaded, batch)(x), expected)


def test_forgetting_is_an_error_that_says_how(batch, x):
    model = network()
    with pytest.raises(RuntimeError, match=r"no reference batch to train with: call gankern.nn.set_reference_batch\("):
        model(x)
    with pytest.raises(RuntimeError, match=r"no reference statistics: load a checkpoint that has them, or call"):
        model.eval()(x)
    gnn.set_reference_batch(model, batch)
    with pytest.raises(RuntimeError, match="called outside of the forward of the Sequential"):
        model[1](torch.randn(2, 6, 3, 3))


def test_freeze(batch, x):
    model = gnn.set_reference_batch(network(), batch)
    expected = by_hand(model, batch, x, 8)
    model[0].register_forward_hook(lambda *_: calls.append(1))
    calls = []
    gnn.freeze_reference_batch(model)
    calls.clear()
    torch.testing.assert_close(model.eval()(x), expected)
    assert len(calls) == 1
    assert not any("reference_batch" in name for name, _ in model.named_buffers())
    with pytest.raises(RuntimeError, match="no reference batch to train with"):
        model.train()(x)
    gnn.set_reference_batch(model, batch)
    calls.clear()
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="has no reference batch"):
        gnn.freeze_reference_batch(network())


def test_copies_have_their_own(batch, x):
    model = gnn.set_reference_batch(network(), batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.mul_(2)
    torch.testing.assert_close(twin(x), by_hand(twin, batch, x, 8))
    torch.testing.assert_close(model(x), by_hand(model, batch, x, 8))
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), by_hand(twin, batch, x, 8))


def test_the_batch_is_a_copy_and_moves_with_the_network(batch, x):
    mine = batch.clone()
    model = gnn.set_reference_batch(network(), mine)
    mine.zero_()
    torch.testing.assert_close(model(x), by_hand(model, batch, x, 8))
    model.bfloat16()
    assert model(x.bfloat16()).dtype == torch.bfloat16
    assert model[1].ref_mean.dtype == model[1].ref_mean_square.dtype == torch.float64


def test_an_exception_leaves_nothing_behind(batch, x):
    model = gnn.set_reference_batch(network(), batch)
    with pytest.raises(RuntimeError):
        model(x[:, :2])
    torch.testing.assert_close(model(x), by_hand(model, batch, x, 8))
    assert all(layer._now.value is None for layer in (model[1], model[3]))


def test_several_arguments():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm = nn.Embedding(3, 5), gnn.VirtualBatchNorm1d(5)

        def forward(self, z, label):
            return self.norm(z + self.embedding(label))

    model = gnn.set_reference_batch(Conditional(), torch.randn(9, 5), torch.arange(9) % 3)
    assert model(torch.randn(2, 5), torch.tensor([0, 2])).shape == (2, 5)


def test_a_layer_twice_in_a_network():
    layer = gnn.VirtualBatchNorm1d(4)
    model = gnn.set_reference_batch(nn.Sequential(layer, nn.Linear(4, 4), layer), torch.randn(5, 4))
    with pytest.raises(RuntimeError, match="called twice"):
        model(torch.randn(2, 4))


def test_a_layer_is_a_network_too():
    """The reference batch set for the layer itself, by the formula of the paper."""
    x, reference = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(6, 4, 5, dtype=torch.float64)
    layer = gnn.VirtualBatchNorm1d(4, dtype=torch.float64)
    gnn.set_reference_batch(layer, reference)
    own, share = [x.pow(k).mean(2, keepdim=True) for k in (1, 2)], 1 / 7
    mean, square = (share * a + (1 - share) * reference.pow(k).mean((0, 2))[:, None] for k, a in enumerate(own, 1))
    right = (x - mean) / (square - mean**2 + layer.eps).sqrt() * layer.weight[:, None] + layer.bias[:, None]
    torch.testing.assert_close(layer(x), right)


def test_part_of_another_network(batch):
    model = gnn.set_reference_batch(network(), batch)
    with pytest.raises(ValueError, match="layer '0.1' has a reference batch already, through the Sequential"):
        gnn.set_reference_batch(nn.Sequential(model), batch)


def test_distributed(batch, x, tmp_path):
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("needs torch.distributed of its own")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = network()
        parallel = nn.parallel.DistributedDataParallel(model)
        gnn.set_reference_batch(parallel, batch)
        expected = by_hand(model, batch, x, 8)
        out = parallel(x)
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        exact = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
        for parameter, right in zip(model.parameters(), exact):
            torch.testing.assert_close(parameter.grad, right)
    finally:
        dist.destroy_process_group()


def test_compiled_network(batch, x):
    model = gnn.set_reference_batch(network(), batch)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), by_hand(model, batch, x, 8))


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (gnn.VirtualBatchNorm1d, [(3, 4), (3, 4, 5)]),
        (gnn.VirtualBatchNorm2d, [(3, 4, 5, 6)]),
        (gnn.VirtualBatchNorm3d, [(3, 4, 2, 5, 6)]),
    ],
)
def test_dimensions(layer, shapes):
    for shape in shapes:
        model = gnn.set_reference_batch(nn.Sequential(layer(4)), torch.randn(7, *shape[1:]))
        assert model(torch.randn(shape)).shape == shape
    with pytest.raises(ValueError, match=f"{layer.__name__}: x has shape .* with 4 channels"):
        model(torch.randn(2, 5, *shapes[0][2:]))
    with pytest.raises(ValueError, match=f"{layer.__name__}: x has shape"):
        layer(4)(torch.randn(2, 4, 1, 1, 1, 1))


def test_options_and_initialisation():
    layer = gnn.VirtualBatchNorm2d(1000, activation="leaky_relu", negative_slope=0.1, count_itself=False)
    assert abs(layer.weight.mean() - 1) < 0.005 and abs(layer.weight.std() - 0.02) < 0.005 and not layer.bias.any()
    expected = "1000, eps=1e-05, activation='leaky_relu', negative_slope=0.1, count_itself=False"
    assert layer.extra_repr() == expected
    assert set(layer.state_dict()) == {"weight", "bias", "ref_mean", "ref_mean_square", "ref_count"}
    assert set(gnn.VirtualBatchNorm1d(2, affine=False).state_dict()) == {"ref_mean", "ref_mean_square", "ref_count"}
    for arguments, message in (((0,), "num_features is 0"), ((3, -1.0), "eps is -1.0")):
        with pytest.raises(ValueError, match=message):
            gnn.VirtualBatchNorm2d(*arguments)
    with pytest.raises(ValueError, match="activation is 'elu'"):
        gnn.VirtualBatchNorm2d(3, activation="elu")


def test_bad_reference_batches(batch):
    with pytest.raises(ValueError, match="Linear has no virtual batch norm layers"):
        gnn.set_reference_batch(nn.Linear(2, 2), torch.randn(3, 2))
    with pytest.raises(ValueError, match="there is no batch"):
        gnn.set_reference_batch(network())
    with pytest.raises(ValueError, match="must not be empty"):
        gnn.set_reference_batch(network(), batch[:0])
    with pytest.raises(TypeError, match="argument 0 of the batch is int"):
        gnn.set_reference_batch(network(), 3)
    with pytest.raises(TypeError, match="network is int"):
        gnn.set_reference_batch(3, batch)


def test_the_example_of_the_documentation():
    page = Path(__file__).parents[2] / "docs" / "virtual_batch_norm.md"
    (example,) = re.findall(r"```python\n(# A complete example.*?)```", page.read_text(), re.DOTALL)
    exec(compile(example, str(page), "exec"), {"__name__": "example"})
