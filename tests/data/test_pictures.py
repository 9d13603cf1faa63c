"""Pictures of every kind that a folder can hold: scaled rightly, or refused by name."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from gankern import data
from gankern.data import BrokenFile, ImageFolder

RAMP = np.arange(36).reshape(6, 6) / 35.0  # no two pixels are alike, so that a turned picture shows
EIGHT = (RAMP * 255).round().astype(np.uint8)
SIXTEEN = (RAMP * 65535).round().astype(np.uint16)


def read(folder, channels):
    image = ImageFolder(folder, channels=channels)[0]
    assert image.shape == (channels, 6, 6) and image.dtype == torch.float32
    assert all(torch.equal(image[0], channel) for channel in image)
    return image[0].double().numpy() / 2 + 0.5


def tiff(path, pixels, bits, photometric=1, sample_format=1, channels=1, planar=1, order="<", width=6):
    """A TIFF file with one strip for each plane, written by its specification alone."""
    height, planes = 6, channels if planar == 2 else 1
    size = len(pixels) // planes
    tags = {256: (3, [width]), 257: (3, [height]), 258: (3, [bits] * channels), 259: (3, [1]), 262: (3, [photometric]),
            273: (4, [8 + i * size for i in range(planes)]), 277: (3, [channels]), 278: (3, [height]),
            279: (4, [size] * planes), 284: (3, [planar]), 339: (3, [sample_format] * channels)}  # fmt: skip
    directory = 8 + len(pixels)
    extra = directory + 2 + 12 * len(tags) + 4
    entries, behind = b"", b""
    for tag, (kind, values) in sorted(tags.items()):
        packed = struct.pack(order + {3: "H", 4: "I"}[kind] * len(values), *values)
        if len(packed) > 4:
            behind, packed = behind + packed, struct.pack(order + "I", extra + len(behind))
        entries += struct.pack(order + "HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", directory)
    path.write_bytes(head + pixels + struct.pack(order + "H", len(tags)) + entries + bytes(4) + behind)


def twelve(ramp):
    """Rows of 12 bits a pixel, two pixels in three bytes."""
    values = (ramp * 4095).round().astype(int).reshape(-1, 2)
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values)


def ppm(path, magic, largest, values):
    path.write_bytes(f"{magic}\n6 6\n{largest}\n".encode() + values.tobytes())


WIDE = {
    "16-bit png": lambda f: Image.fromarray(SIXTEEN).save(f / "a.png"),
    "16-bit tiff": lambda f: Image.fromarray(SIXTEEN).save(f / "a.tiff"),
    "16-bit tiff, deflated": lambda f: Image.fromarray(SIXTEEN).save(f / "a.tiff", compression="tiff_deflate"),
    "16-bit tiff, big-endian": lambda f: tiff(f / "a.tif", SIXTEEN.astype(">u2").tobytes(), 16, order=">"),
    "16-bit tiff, white is zero": lambda f: tiff(f / "a.tif", (65535 - SIXTEEN).tobytes(), 16, photometric=0),
    "12-bit tiff": lambda f: tiff(f / "a.tif", twelve(RAMP), 12),
    "16-bit pgm": lambda f: ppm(f / "a.ppm", "P5", 65535, SIXTEEN.astype(">u2")),
    "12-bit pgm": lambda f: ppm(f / "a.ppm", "P5", 4095, (RAMP * 4095).round().astype(">u2")),
}
NARROW = {
    "16-bit ppm": lambda f: ppm(f / "a.ppm", "P6", 65535, np.repeat(SIXTEEN.astype(">u2")[..., None], 3, -1)),
    "16-bit colours, tiff": lambda f: tiff(
        f / "a.tif", np.repeat(SIXTEEN[..., None], 3, -1).tobytes(), 16, 2, channels=3
    ),
    "8-bit tiff, white is zero": lambda f: tiff(f / "a.tif", (255 - EIGHT).tobytes(), 8, photometric=0),
    "8-bit colours in planes": lambda f: tiff(f / "a.tif", 3 * EIGHT.tobytes(), 8, 2, channels=3, planar=2),
    "palette png": lambda f: Image.fromarray(EIGHT).convert("P").save(f / "a.png"),
    "shuffled palette": lambda f: shuffled_palette().save(f / "a.png"),
    "gif": lambda f: Image.fromarray(EIGHT).save(f / "a.gif"),
    "grey and opaque": lambda f: Image.fromarray(EIGHT).convert("LA").save(f / "a.png"),
    "colour and opaque": lambda f: Image.fromarray(EIGHT).convert("RGBA").save(f / "a.png"),
    "cmyk tiff": lambda f: Image.fromarray(EIGHT).convert("RGB").convert("CMYK").save(f / "a.tiff"),
    "cmyk jpeg": lambda f: Image.fromarray(EIGHT).convert("RGB").convert("CMYK").save(f / "a.jpg", quality=100),
    "black ink": lambda f: Image.merge("CMYK", [*3 * [Image.new("L", (6, 6))], Image.fromarray(255 - EIGHT)]).save(
        f / "a.tif"
    ),
    "a camera's two pictures": lambda f: Image.fromarray(EIGHT).save(
        f / "a.jpg", "MPO", save_all=True, append_images=[Image.fromarray(255 - EIGHT)], quality=100
    ),
}


def shuffled_palette():
    """A palette whose i-th colour is not grey i."""
    palette = np.zeros((256, 3), np.uint8)
    for value in range(256):
        palette[value * 7 % 256] = value
    image = Image.new("P", (6, 6))
    image.putdata((EIGHT.astype(int) * 7 % 256).ravel().tolist())
    image.putpalette(palette.tobytes())
    return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [*WIDE, *NARROW])
def test_a_ramp_comes_as_a_ramp(tmp_path, kind, channels):
    (WIDE | NARROW)[kind](tmp_path)
    bound = 0.5 / 4095 + 1e-6 if kind in WIDE else 1.01 / 255  # 8 bits, of which conversions take half a step more
    np.testing.assert_allclose(read(tmp_path, channels), RAMP, rtol=0, atol=bound)


def test_one_bit(tmp_path):
    Image.fromarray(EIGHT > 127).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path, 3), EIGHT > 127)


def transparent(mode, alpha=128):
    image = Image.fromarray(EIGHT).convert(mode)
    image.putalpha(alpha)
    return image


def frames(path, **options):
    Image.fromarray(EIGHT).save(path, save_all=True, append_images=[Image.fromarray(255 - EIGHT)], **options)


REFUSED = {
    "floats": (lambda f: Image.fromarray(RAMP.astype(np.float32)).save(f / "a.tiff"), "floats"),
    "32-bit integers": (lambda f: Image.fromarray(SIXTEEN.astype(np.int32)).save(f / "a.tiff"), "integers with a sign"),
    "unsigned 32 bits": (lambda f: tiff(f / "a.tif", SIXTEEN.astype("<u4").tobytes(), 32), "integers of 32 bits"),
    "signed 16 bits": (lambda f: tiff(f / "a.tif", SIXTEEN.tobytes(), 16, sample_format=2), "with a sign"),
    "signed 8 bits": (lambda f: tiff(f / "a.tif", EIGHT.tobytes(), 8, sample_format=2), "with a sign"),
    "16-bit colours in planes": (
        lambda f: tiff(f / "a.tif", 3 * SIXTEEN.tobytes(), 16, 2, channels=3, planar=2),
        "channels of more than 8 bits lie apart",
    ),
    "lab": (lambda f: Image.new("LAB", (6, 6)).save(f / "a.tiff"), "the kind 'LAB'"),
    "transparent": (lambda f: transparent("RGB").save(f / "a.png"), "transparent"),
    "nearly opaque": (lambda f: transparent("RGB", 254).save(f / "a.webp", lossless=True), "transparent"),
    "transparent grey": (lambda f: transparent("L").save(f / "a.png"), "transparent"),
    "one colour transparent": (
        lambda f: Image.fromarray(EIGHT).save(f / "a.png", transparency=int(EIGHT[1, 1])),
        "transparent",
    ),
    "transparent palette": (
        lambda f: Image.fromarray(EIGHT).convert("P").save(f / "a.gif", transparency=int(EIGHT[1, 1])),
        "transparent",
    ),
    "transparent 16 bits": (lambda f: Image.fromarray(SIXTEEN).save(f / "a.png", transparency=0), "transparent"),
    "gif of two": (lambda f: frames(f / "a.gif"), "holds 2 pictures"),
    "tiff of two": (lambda f: frames(f / "a.tiff"), "holds 2 pictures"),
    "png of two": (lambda f: frames(f / "a.png"), "holds 2 pictures"),
    "webp of two": (lambda f: frames(f / "a.webp", lossless=True), "holds 2 pictures"),
    "a program": (
        lambda f: (f / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n"),
        "not a picture of",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_one_reading_is_refused_by_name(tmp_path, kind):
    write, words = REFUSED[kind]
    write(tmp_path)
    with pytest.raises(BrokenFile, match=rf"{tmp_path.name}/a\..*{words}"):
        ImageFolder(tmp_path)
    with pytest.raises(BrokenFile, match=words):
        ImageFolder(tmp_path, size=6, verify=False)[0]


# How a picture is stored that its orientation makes upright again: PIL's transpositions.
STORED = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["jpg", "png", "tiff", "webp", "16-bit png", "16-bit tiff"])
def test_a_camera_says_which_side_is_up(tmp_path, kind, orientation):
    image = Image.fromarray(SIXTEEN if "16" in kind else EIGHT)
    if STORED[orientation] is not None:
        image = image.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 100}, "webp": {"lossless": True}}.get(kind, {})
    image.save(tmp_path / f"a.{kind.split()[-1]}", exif=exif, **options)
    np.testing.assert_allclose(read(tmp_path, 1), RAMP, rtol=0, atol=1.6 / 255)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
def test_the_size_is_that_of_the_upright_picture(tmp_path, suffix, verify):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (8, 4)).save(tmp_path / f"a.{suffix}", exif=exif)
    with pytest.raises(BrokenFile, match="is 4x8, not a square"):
        ImageFolder(tmp_path, verify=verify)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("pixels", [EIGHT[:3], SIXTEEN[:3]], ids=["8 bits", "16 bits"])
def test_a_picture_on_its_side_that_is_no_square(tmp_path, pixels, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # upright after a turn to the right
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", exif=exif)
    image = ImageFolder(tmp_path, size=3, channels=1)[0][0].double().numpy() / 2 + 0.5
    expected = np.rot90(pixels / np.iinfo(pixels.dtype).max, -1)[1:4]  # [6, 3], its middle
    np.testing.assert_allclose(image, expected, rtol=0, atol=1e-5)


def test_resized_wide_pictures_stay_in_range(tmp_path):
    """Cubic interpolation overshoots at an edge."""
    pixels = np.zeros((16, 16), np.uint16)
    pixels[:, 8:] = 65535
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = ImageFolder(tmp_path, size=7)[0]
    assert image.min() == -1.0 and image.max() == 1.0


@pytest.mark.filterwarnings("ignore::UserWarning")  # what Pillow says of damaged files
def test_damaged_pictures_are_named(tmp_path):
    """A byte changed, or the end missing: a picture, or a BrokenFile, and nothing else."""
    for name in ("a.png", "a.jpg", "a.gif", "a.tiff", "a.webp", "a.bmp", "a.ppm"):
        Image.fromarray(EIGHT).convert("RGB").save(tmp_path / name)
    random = np.random.default_rng(0)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        folder = tmp_path / path.suffix[1:]
        folder.mkdir()
        for _ in range(40):
            content = bytearray(whole[: random.integers(1, len(whole) + 1)] if random.random() < 0.3 else whole)
            for place in random.integers(0, len(content), random.integers(1, 4)):
                content[place] = random.integers(0, 256)
            (folder / path.name).write_bytes(content)
            for verify in (True, False):
                try:
                    assert ImageFolder(folder, size=4, verify=verify)[0].isfinite().all()
                except BrokenFile as error:
                    assert path.name in str(error)


def test_sources_are_indexed_as_a_first_dimension(tmp_path):
    shapes = data.Shapes(8)
    assert torch.equal(shapes[[3, 1]], shapes[torch.tensor([3, 1])])
    for wrong in (None, ..., (0, 1), (slice(None), 0), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(TypeError, match="indexed by an integer"):
            shapes[wrong]
    with pytest.raises(IndexError):
        shapes[100_000]


def test_a_source_that_is_moved_leaves_the_first_where_it_is():
    shapes = data.Shapes(8)
    moved = shapes.to("meta")
    assert shapes[0].device.type == "cpu" and moved[0].device.type == "meta"
