"""What gankern sample draws of games that have codes, classes, captions or an encoder, and of truncated latents."""

import pytest
import torch
from matplotlib.image import imread
from typer.testing import CliRunner

from gankern import data, games, training
from gankern.cli import app
from gankern.training import checkpoint, pictures

SMALL = {"batch_size": 8, "threads": 1, "steps": 1, "evaluate": 0}
RUNS = {
    "infogan": {},
    "acgan": {},
    "aae": {"width": 8},
    "bigan": {"width": 8},
    "lapgan": {"width": 2, "size": 16, "conditioning": "concatenation"},
    "cgan": {"options": {"networks": "mlp"}, "size": 16, "conditioning": "concatenation"},
    "dcgan": {"width": 2, "conditioning": "projection"},
    "sn_dcgan": {"width": 2},
    "gan_cls": {"width": 4, "options": {"encoder_steps": 1}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("runs") / name
            options = SMALL | {"latent": 4} | RUNS[name]
            of = "captions" if name == "gan_cls" else "digits"
            kind = "captions" if of == "captions" else "labels"
            size = options.get("size", 16 if name == "gan_cls" else None)
            samples = data.load(of, size)
            condition = data.condition(of, samples, kind)
            options |= {"size": samples.shape[2]}
            needs = options.get("conditioning") or games.find(name).needs
            config = training.configure(name, of, samples, condition if needs else None, **options)
            training.train(config, samples, made[name], labels=condition if needs else None)
        return made[name]

    return folder


def run(folder, tmp_path, *arguments):
    out = tmp_path / "picture.png"
    result = CliRunner().invoke(app, ["sample", str(folder), "--out", str(out), *map(str, arguments)])
    return " ".join(result.output.split()), result.exit_code, imread(out) if out.exists() else None


def cells(picture, size):
    """Rows and columns of a grid of images of one size, each pixel 64 / size times as large."""
    scale = max(1, 64 // size)
    return (picture.shape[0] // scale - 2) // (size + 2), (picture.shape[1] // scale - 2) // (size + 2)


@pytest.mark.parametrize(
    ("name", "arguments", "grid"),
    [
        ("infogan", ("--sweep", "c1"), (8, 10)),
        ("infogan", ("--sweep", "c3"), (8, 10)),
        ("acgan", ("--classes",), (8, 10)),
        ("acgan", ("--classes", "--label", 3), (8, 8)),
        ("cgan", ("--classes",), (8, 10)),
        ("cgan", ("--classes", "--label", 9), (8, 8)),
        ("lapgan", ("--classes",), (8, 10)),
        ("dcgan", ("--classes",), (8, 10)),
        ("dcgan", ("--classes", "--label", 2), (8, 8)),
        ("aae", ("--reconstruct",), (4, 8)),
        ("aae", ("--reconstruct", "--samples", 12), (2, 8)),
        ("aae", ("--attribute", "8-3"), (6, 8)),
        ("bigan", ("--reconstruct", "--samples", 12), (2, 8)),
    ],
)
def test_grids(folders, tmp_path, name, arguments, grid):
    told, code, picture = run(folders(name), tmp_path, *arguments)
    assert code == 0, told
    size = {"lapgan": 16, "cgan": 16}.get(name, 8)
    assert cells(picture, size) == grid
    _, _, again = run(folders(name), tmp_path, *arguments, "--seed", 0)
    assert (again == picture).all()
    _, _, other = run(folders(name), tmp_path, *arguments, "--seed", 5)
    assert (other != picture).any()


def test_texts_stand_beside_their_images(folders, tmp_path):
    texts = ("a red disc", "a blue ring above a green disc")
    told, code, picture = run(folders("gan_cls"), tmp_path, "--caption", texts[0], "--caption", texts[1])
    assert code == 0, told
    height, width = picture.shape[:2]
    grid, top, dark = 3 * (8 * (16 + 2) + 2), pictures.LINE, picture[..., :3].min(-1) < 0.5
    margin = width - grid
    assert abs(margin - pictures.LETTER * (len(texts[1]) + 1)) <= pictures.LETTER
    rows = dark[top:, : margin - 1], dark[top : top + (height - top) // 2, : margin - 1]
    assert rows[0].any() and rows[1].any() and not rows[0].all()  # letters, in each half
    longer = dark[top + (height - top) // 2 :, : margin // 2].any()
    assert longer and not dark[top : top + (height - top) // 2, : margin // 2].any()  # the longer text is below


def test_a_sweep_goes_from_minus_two_to_two(folders):
    game = checkpoint.game(checkpoint.load(folders("infogan") / training.CHECKPOINT), "gankern")
    asked = []
    game.generate = lambda *codes: (asked.append(codes), torch.zeros(len(codes[0]), 1, 8, 8))[1]
    game.draw_sweep("c3", 0)
    noise, classes, numbers = asked[0]
    torch.testing.assert_close(numbers[:10, 1], torch.linspace(-2, 2, 10))
    assert not numbers[:, 0].any() and all(torch.equal(row, noise[0]) for row in noise[:10])
    game.draw_sweep("c1", 0)
    assert asked[1][1][:10].tolist() == list(range(10)) and not asked[1][2].any()


def test_reconstructions_are_below_their_images(folders, tmp_path):
    """Held-out images, and what the decoder makes of the encoder's codes."""
    told, code, picture = run(folders("aae"), tmp_path, "--reconstruct", "--samples", 12)
    game = checkpoint.game(checkpoint.load(folders("aae") / training.CHECKPOINT), "gankern")
    digits = data.load("digits")
    first = torch.from_numpy(picture[16:80:8, 16:80:8, 0].copy()) * 2 - 1
    distances = (digits[:, 0] - first).abs().flatten(1).amax(1)
    assert distances.min() < 0.01
    image = digits[distances.argmin()][None]
    encode, decode = game.coding()
    below = torch.from_numpy(picture[96:160:8, 16:80:8, 0].copy()) * 2 - 1
    torch.testing.assert_close(below, decode(encode(image))[0, 0].clamp(-1, 1), rtol=0, atol=0.01)


def test_an_attribute_is_the_difference_of_the_means(folders, tmp_path):
    _, code, picture = run(folders("aae"), tmp_path, "--attribute", "8-3", "--samples", 24)
    game = checkpoint.game(checkpoint.load(folders("aae") / training.CHECKPOINT), "gankern")
    digits, labels = data.load("digits"), data.labels("digits")
    game.run.samples = digits
    _, where = game.run.held_out(game.held_out)
    encode, decode = game.coding()
    codes, labels = encode(digits[where]), labels[where]
    vector = codes[labels == 8].mean(0) - codes[labels == 3].mean(0)
    first = torch.from_numpy(picture[16:80:8, 16:80:8, 0].copy()) * 2 - 1
    threes = digits[where][labels == 3]
    image = threes[(threes[:, 0] - first).abs().flatten(1).amax(1).argmin()][None]
    changed = torch.from_numpy(picture[176:240:8, 16:80:8, 0].copy()) * 2 - 1
    expected = decode(encode(image) + vector)[0, 0].clamp(-1, 1)
    torch.testing.assert_close(changed, expected, rtol=0, atol=0.01)


def test_truncation(folders, tmp_path, monkeypatch):
    seen = []
    network = checkpoint.game(checkpoint.load(folders("sn_dcgan") / training.CHECKPOINT), "gankern").average()
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    monkeypatch.setattr("gankern.games.adversarial.Adversarial.average", lambda self: network)
    for limit in ((), ("--truncation", 0.7)):
        assert run(folders("sn_dcgan"), tmp_path, "--samples", 30, *limit)[1] == 0
    plain, drawn = seen
    within = plain.abs() <= 0.7
    assert torch.equal(drawn[within], plain[within]) and drawn.abs().max() <= 0.7 < plain.abs().max()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("aae", ("--sweep", "c1"), "aae has no codes to sweep; infogan has"),
        ("infogan", ("--sweep", "c9"), "unknown code 'c9'; .*c1, c2, c3"),
        ("aae", ("--classes",), "aae has no classes to draw a grid of; .*acgan"),
        ("sn_dcgan", ("--classes",), "sn_dcgan has classes to draw a grid of only where it was trained with labels"),
        ("acgan", ("--caption", "a red disc"), "acgan has no captions; gan_cls has"),
        ("gan_cls", ("--caption", "a red disc!"), "letters a to z and spaces.*'!'"),
        ("acgan", ("--reconstruct",), "acgan has no encoder; aae"),
        ("aae", ("--attribute", "8"), "--attribute must be A-B, two classes of digits from 0 to 9.*got '8'"),
        ("aae", ("--attribute", "8-33"), "--attribute must be A-B"),
        ("acgan", ("--truncation", "0.5"), "--truncation is for generators of latents alone; acgan"),
        ("sn_dcgan", ("--truncation", "-1"), "truncation must be a positive number, got -1"),
        ("acgan", ("--classes", "--label", 10), "--label must be from 0 to 9, got 10"),
        ("infogan", ("--sweep", "c1", "--classes"), "one of --interpolate, .* at a time, got --sweep, --classes"),
        ("sn_dcgan", ("--classes", "--each", "folder"), "--each is of samples alone"),
    ],
)
def test_what_a_game_cannot_draw(folders, tmp_path, name, arguments, message):
    import re

    told, code, picture = run(folders(name), tmp_path, *arguments)
    assert code == 2 and picture is None
    assert re.search(message, told), told
