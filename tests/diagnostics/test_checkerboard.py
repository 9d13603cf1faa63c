"""The diagnosis on generators whose checkerboards are known, and replacements against what they replace."""

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import gankern
import gankern.nn as gnn
from gankern import diagnostics
from gankern.cli import app


def around(upsampling):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 64, 3, padding=1), nn.ReLU(), upsampling, nn.ReLU(), nn.Conv2d(32, 3, 3, padding=1)
    )


def diagnose(upsampling):
    torch.manual_seed(0)
    return diagnostics.checkerboard(around(upsampling()), torch.randn(8, 8, 16, 16))


# Overlap counted by hand: for kernel 3 and stride 2 an output reads 1 or 2 samples an axis, for 5 it is 2 or 3.
@pytest.mark.parametrize(("kernel", "padding", "extra", "ratio"), [(3, 1, 1, 4.0), (5, 2, 1, 9 / 4), (4, 1, 0, 1.0)])
def test_transposed_convolutions(kernel, padding, extra, ratio):
    report = diagnose(lambda: nn.ConvTranspose2d(64, 32, kernel, 2, padding, extra))
    (stage,) = report.stages
    assert (stage.layer, stage.kind, stage.factor) == ("2", "ConvTranspose2d", 2)
    assert stage.overlap_ratio == pytest.approx(ratio, rel=1e-9)
    assert stage.ratio == pytest.approx(ratio, rel=0.1) and stage.gradient_ratio == pytest.approx(ratio, rel=0.1)
    assert report.culprit == "2"
    if ratio > 1:
        assert f"stride 2 does not divide kernel size {kernel}" in stage.advice


@pytest.mark.parametrize(
    "upsampling",
    [
        lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(64, 32, 3, padding=1)),
        lambda: nn.Sequential(gnn.FIRUpsample2d(), nn.Conv2d(64, 32, 3, padding=1)),
        lambda: gnn.SubpixelConv2d(64, 32, 3, padding=1),
        lambda: gnn.UpsampleConv2d(64, 32, 3),
    ],
)
def test_clean_upsampling(upsampling):
    report = diagnose(upsampling)
    (stage,) = report.stages
    assert stage.overlap_ratio == pytest.approx(1, abs=0.01)
    assert stage.pattern < 1e-6
    assert report.clean and report.culprit is None and stage.advice is None


class Resize(nn.Module):
    """Upsampling by a function, not by a module."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(64, 32, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2))


def test_upsampling_by_a_function():
    (stage,) = diagnose(Resize).stages
    assert stage.kind == "Resize"
    assert stage.overlap_ratio == pytest.approx(1, abs=0.01)
    assert stage.ratio > 1  # weights at random: each phase adds up others of them


@pytest.mark.parametrize(
    "upsampling",
    [
        lambda: gnn.SubpixelConv2d(64, 32, 3, padding=1, icnr=False),
        lambda: nn.Sequential(nn.Conv2d(64, 128, 3, padding=1), nn.PixelShuffle(2)),
    ],
)
def test_subpixel_convolutions_without_icnr(upsampling):
    report = diagnose(upsampling)
    (stage,) = report.stages
    assert stage.overlap_ratio == pytest.approx(1, abs=0.01) and stage.pattern > 0.5
    assert report.culprit == stage.layer and "icnr_" in stage.advice


def test_the_spectrum_shows_the_stride():
    ct = diagnose(lambda: nn.ConvTranspose2d(64, 32, 3, 2, 1, 1))
    assert [peak["period"] for peak in ct.peaks] == [2, 2, 2]
    assert max(peak["ratio"] for peak in ct.peaks) > 20


def test_the_report(tmp_path):
    report = diagnose(lambda: nn.ConvTranspose2d(64, 32, 3, 2, 1, 1))
    assert json.loads(json.dumps(report.to_dict()))["stages"][0]["overlap_ratio"] == 4
    assert report.table().row_count == 2
    report.save_picture(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_the_generator_is_left_as_it_was():
    generator = around(nn.ConvTranspose2d(64, 32, 4, 2, 1)).train()
    generator[1].eval()
    before = copy.deepcopy(generator.state_dict())
    diagnostics.checkerboard(generator, torch.randn(2, 8, 8, 8))
    assert generator.training and not generator[1].training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), generator.state_dict().values()))
    assert all(p.grad is None for p in generator.parameters())
    assert not any(module._forward_hooks for module in generator.modules())


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up = nn.Embedding(3, 8), nn.ConvTranspose2d(8, 3, 4, 2, 1)

    def forward(self, z, labels):
        return self.up(z[:, :, None, None].expand(-1, -1, 8, 8) + self.embed(labels)[:, :, None, None])


def test_bad_input():
    latents = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"Conditional cannot be called .*labels.* pass inputs=\(latents, labels\)"):
        diagnostics.checkerboard(Conditional(), latents)
    assert diagnostics.checkerboard(Conditional(), (latents, torch.tensor([0, 1, 2, 0]))).stages
    with pytest.raises(ValueError, match="Sequential has no layer that upsamples"):
        diagnostics.checkerboard(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)), torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match="made no signals .*, images"):
        diagnostics.checkerboard(nn.Sequential(nn.Linear(8, 4)))
    with pytest.raises(ValueError, match="latents of Resize cannot be found out; pass latent=128"):
        diagnostics.checkerboard(Resize())


# ---- replacements -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "padding", "extra", "stride"),
    [(4, 1, 0, 2), (3, 1, 1, 2), (5, 2, 1, 2), (2, 0, 0, 2), (6, 2, 0, 2), (3, 0, 0, 3), (5, 1, 0, 3), (8, 2, 0, 4)],
)
def test_a_subpixel_convolution_computes_the_same(kernel, padding, extra, stride):
    before = nn.Sequential(nn.ConvTranspose2d(5, 4, kernel, stride, padding, extra)).double()
    after = copy.deepcopy(before)
    (replaced,) = gankern.replace_upsampling(after, "subpixel")
    assert isinstance(after[0], gnn.SubpixelConv2d) and replaced.exact
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(after(x), before(x))


@pytest.mark.parametrize("with_", ["resize_conv", "fir"])
def test_what_is_one_is_recognised(with_):
    """A transposed convolution with the collapsed kernel of the other layer: the map is exact."""
    up = nn.Upsample(scale_factor=2) if with_ == "resize_conv" else gnn.FIRUpsample2d()
    conv = nn.Conv2d(5, 4, 3, padding=1).double()
    impulse = torch.zeros(5, 5, 9, 9, dtype=torch.float64)
    impulse[range(5), range(5), 4, 4] = 1
    with torch.no_grad():
        response = F.conv2d(up.double()(impulse), conv.weight, padding=1)  # [in, out, 18, 18], around 8.5
        transposed = nn.ConvTranspose2d(5, 4, 6, 2, 2).double()
        transposed.weight.copy_(response[:, :, 6:12, 6:12])
        transposed.bias.copy_(conv.bias)
    before = nn.Sequential(transposed)
    after = copy.deepcopy(before)
    (replaced,) = gankern.replace_upsampling(after, with_)
    assert replaced.exact and replaced.note == "the same function"
    x = F.pad(torch.randn(2, 5, 6, 7, dtype=torch.float64), [3] * 4)
    torch.testing.assert_close(after(x)[..., 2:-2, 2:-2], before(x)[..., 2:-2, 2:-2])


@pytest.mark.parametrize("with_", ["resize_conv", "fir"])
def test_what_is_none_is_said_to_be_none(with_):
    net = around(nn.ConvTranspose2d(64, 32, 4, 2, 1))
    (replaced,) = gankern.replace_upsampling(net, with_)
    assert (
        replaced.layer == "2" and not replaced.exact and 0.3 < replaced.error < 1 and "train it again" in replaced.note
    )
    assert diagnostics.checkerboard(net, torch.randn(2, 8, 16, 16)).clean


def test_what_cannot_be_replaced_is_kept():
    net = nn.Sequential(
        nn.ConvTranspose2d(4, 4, 3, 2),
        nn.ConvTranspose2d(4, 4, 4, 2, 1, groups=2),
        nn.utils.parametrizations.spectral_norm(nn.ConvTranspose2d(4, 4, 4, 2, 1)),
        nn.ConvTranspose2d(4, 4, 3, 1, 1),
    )
    report = gankern.replace_upsampling(net, "subpixel")
    assert [r.after for r in report] == [None] * 3
    for replaced, reason in zip(report, ("not exactly 2 times", "groups", "computed from others")):
        assert reason in replaced.note
    (kept,) = gankern.replace_upsampling(nn.Sequential(nn.ConvTranspose2d(4, 4, 3, 3)), "resize_conv")
    assert kept.after is None and "stride 2" in kept.note
    with pytest.raises(ValueError, match="with_ is 'deconv'; accepted are resize_conv, subpixel, fir"):
        gankern.replace_upsampling(net, "deconv")
    with pytest.raises(ValueError, match="has no transposed convolution"):
        gankern.replace_upsampling(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="is itself a transposed convolution"):
        gankern.replace_upsampling(nn.ConvTranspose2d(4, 4, 4, 2, 1))


# ---- the command --------------------------------------------------------------------------------------------


def test_the_command(tmp_path, monkeypatch):
    (tmp_path / "my_model.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.ConvTranspose2d(8, 16, 4), nn.ConvTranspose2d(16, 3, 3, 2, 1, 1))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = CliRunner().invoke(app, ["checkerboard", "my_model:make", "--out", "p.png", "--json", "r.json"])
    assert result.exit_code == 0, result.output
    assert "The checkerboard comes from 1." in result.output
    assert json.loads((tmp_path / "r.json").read_text())["culprit"] == "1"
    assert (tmp_path / "p.png").exists()
    for target, says in (("nothing", "neither a file or folder"), ("my_model:other", "has no 'other'")):
        result = CliRunner().invoke(app, ["checkerboard", target])
        assert result.exit_code == 2 and says in result.output.replace("\n", " ")


# ---- a generator from PyPI ----------------------------------------------------------------------------------


@pytest.fixture
def mimicry(monkeypatch):
    """A module of torch-mimicry's networks by its name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "acceleration"))
    models = importlib.import_module("pypi_models")

    def find(name):
        try:
            return models.mimicry(name)
        except models.NotAvailable as reason:
            pytest.skip(str(reason))

    return find


@pytest.mark.parametrize(
    ("module", "name"), [("dcgan.dcgan_32", "DCGANGenerator32"), ("sngan.sngan_32", "SNGANGenerator32")]
)
def test_a_generator_from_pypi(mimicry, module, name):
    """Its residual blocks upsample by F.interpolate: three stages, each found as the block, each of even geometry."""
    torch.manual_seed(0)
    generator = getattr(mimicry(module), name)(ngf=64)
    report = diagnostics.checkerboard(generator, samples=16)
    assert [stage.kind for stage in report.stages] == ["GBlock"] * 3
    assert [stage.layer for stage in report.stages] == ["block2", "block3", "block4"]
    assert report.factor == 8
    for stage in report.stages:
        assert stage.overlap_ratio == pytest.approx(1, abs=0.01)
        assert stage.pattern < 0.05
    assert report.clean


class InOneDimension(nn.Module):
    """Images whose rows are upsampled as signals."""

    def __init__(self, dimensions):
        super().__init__()
        self.up = {1: nn.ConvTranspose1d(4, 3, 3, 2), 3: nn.ConvTranspose3d(4, 3, 3, 2)}[dimensions]
        self.last = nn.ConvTranspose2d(3, 3, 4, 2, 1)

    def forward(self, z):
        y = self.up(z[:, :, 0]) if isinstance(self.up, nn.ConvTranspose1d) else self.up(z[:, :, None])[:, :, 0]
        return self.last(y if y.ndim == 4 else y[:, :, None].expand(-1, -1, 8, -1))


@pytest.mark.parametrize(("dimensions", "kind"), [(1, "signals"), (3, "volumes")])
def test_layers_of_other_dimensions_than_the_result_are_refused(dimensions, kind):
    with pytest.raises(ValueError, match=rf"up \(ConvTranspose{dimensions}d\) upsamples {kind} .*makes images"):
        diagnostics.checkerboard(InOneDimension(dimensions), torch.randn(2, 4, 8, 8))


CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BLURRED = {1: gnn.FIRUpsample1d, 3: gnn.FIRUpsample3d}
SHUFFLED = {1: gnn.SubpixelConv1d, 3: gnn.SubpixelConv3d}


def in_dimensions(d, upsampling):
    torch.manual_seed(0)
    return nn.Sequential(
        CONVOLUTION[d](4, 32, 3, padding=1), nn.ReLU(), upsampling(), CONVOLUTION[d](8, 2, 3, padding=1)
    )


def diagnose_in(d, upsampling):
    return diagnostics.checkerboard(in_dimensions(d, upsampling), torch.randn(8, 4, *[{1: 32, 3: 6}[d]] * d))


# Along an axis an output sums 1 or 2 products for kernel 3 and stride 2, and 2 or 3 for kernel 9 and stride 4.
@pytest.mark.parametrize(
    ("d", "kernel", "stride", "ratio"), [(1, 3, 2, 2), (1, 9, 4, 3 / 2), (1, 16, 4, 1), (3, 3, 2, 8), (3, 4, 2, 1)]
)
def test_transposed_convolutions_of_signals_and_volumes(d, kernel, stride, ratio):
    report = diagnose_in(d, lambda: TRANSPOSED[d](32, 8, kernel, stride, (kernel - stride + 1) // 2))
    (stage,) = report.stages
    assert stage.overlap_ratio == pytest.approx(ratio, rel=1e-9)
    assert torch.tensor(stage.energy).shape == (stride,) * d and stage.factor == stride
    assert (report.culprit == "2") or ratio == 1
    if ratio > 1:
        assert stage.advice.startswith(f"stride {stride} does not divide kernel size {kernel}")
        assert f"SubpixelConv{d}d" in stage.advice


@pytest.mark.parametrize("d", [1, 3])
def test_clean_upsampling_of_signals_and_volumes(d):
    for upsampling in (
        lambda: nn.Sequential(nn.Upsample(scale_factor=2), CONVOLUTION[d](32, 8, 3, padding=1)),
        lambda: nn.Sequential(BLURRED[d](), CONVOLUTION[d](32, 8, 3, padding=1)),
        lambda: SHUFFLED[d](32, 8, 3, padding=1),
    ):
        report = diagnose_in(d, upsampling)
        assert report.clean and report.stages[0].pattern < 1e-6
    report = diagnose_in(d, lambda: SHUFFLED[d](32, 8, 3, padding=1, icnr=False))
    assert not report.clean and report.stages[0].pattern > 0.3  # about 1 - 1 / 2**d


@pytest.mark.parametrize("d", [1, 3])
def test_the_report_of_signals_and_volumes(d, tmp_path):
    report = diagnose_in(d, lambda: TRANSPOSED[d](32, 8, 3, 2, 1, 1))
    assert json.loads(json.dumps(report.to_dict()))["stages"][0]["kind"] == f"ConvTranspose{d}d"
    assert report.table().columns[0]._cells[-1] == {1: "signals", 3: "volumes"}[d]
    report.save_picture(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert len(report.peaks) == 2**d - 1  # a tone of half the sampling rate along each axis, face and space diagonal
    assert max(peak["ratio"] for peak in report.peaks) > 20


def test_the_latents_of_a_generator_of_signals():
    report = diagnostics.checkerboard(nn.Sequential(nn.ConvTranspose1d(8, 8, 4), nn.ConvTranspose1d(8, 1, 4, 2, 1)))
    assert [stage.layer for stage in report.stages] == ["1"]


@pytest.mark.parametrize(
    "layer",
    [nn.ConvTranspose2d(4, 3, 3, (2, 1)), nn.ConvTranspose2d(4, 3, 5, (3, 2)), nn.Upsample(scale_factor=(1, 2))],
)
def test_other_factors_for_rows_than_for_columns_are_refused(layer):
    with pytest.raises(ValueError, match=r"2\.1 .* makes \(\d, \d\) times the samples of its axes"):
        diagnostics.checkerboard(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Identity(), nn.Sequential(nn.ReLU(), layer)),
            torch.randn(2, 4, 8, 8),
        )


def test_what_is_neither_signal_nor_image_nor_volume():
    with pytest.raises(ValueError, match=r"made no signals .*, images .* or volumes .* but a tensor \(2, 16\)"):
        diagnostics.checkerboard(nn.Linear(4, 16), torch.randn(2, 4))
    with pytest.raises(TypeError, match="generator must be a torch.nn.Module, got None"):
        diagnostics.checkerboard(None)


@pytest.mark.parametrize("fails", [False, True])
def test_the_generator_is_left_in_its_modes(fails):
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4).eval(), nn.ConvTranspose2d(4, 3, 4, 2, 1))
    state = {name: value.clone() for name, value in network.state_dict().items()}
    if fails:
        with pytest.raises(ValueError):
            diagnostics.checkerboard(network, torch.randn(2, 5, 8, 8))
    else:
        diagnostics.checkerboard(network, torch.randn(2, 4, 8, 8))
    assert [module.training for module in network] == [True, False, True] and network.training
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters()) and not any(m._forward_hooks for m in network.modules())
