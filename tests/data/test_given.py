"""Data that people have: whatever holds the images, they come out as the same numbers, or are refused in one line."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from gankern import data, training
from gankern.data.given import labels as labels_of

LEVELS = torch.randint(256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
EXPECTED = LEVELS.float() / 127.5 - 1.0
LABELS = torch.arange(12) % 3


class Torchvision(Dataset):
    """As torchvision's: pictures of Pillow's through a transform, and targets."""

    def __init__(self, transform=None, targets=True):
        self.transform = transform
        if targets:
            self.targets = LABELS.tolist()

    def __len__(self):
        return len(LEVELS)

    def __getitem__(self, index):
        picture = Image.fromarray(LEVELS[index].permute(1, 2, 0).numpy())
        return (self.transform(picture) if self.transform else picture), int(LABELS[index])


class HuggingFace:
    """As datasets.Dataset: rows by number, columns by name."""

    column_names = ["image", "label"]  # noqa: RUF012

    def __len__(self):
        return len(LEVELS)

    def __getitem__(self, key):
        if key == "label":
            return LABELS.tolist()
        if key == "image":
            raise AssertionError("a whole column of pictures")
        return {"image": Image.fromarray(LEVELS[key].permute(1, 2, 0).numpy()), "label": int(LABELS[key])}


class Stream(IterableDataset):
    def __iter__(self):
        yield from ((image, int(label)) for image, label in zip(EXPECTED, LABELS))


def to_tensor(picture):
    """torchvision's ToTensor."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255.0


WITHOUT_LABELS = {
    "tensor": lambda: EXPECTED,
    "bytes": lambda: LEVELS,
    "doubles": lambda: EXPECTED.double(),
    "array": lambda: LEVELS.numpy(),
    "array, channels last": lambda: LEVELS.permute(0, 2, 3, 1).numpy(),
    "array of floats, channels last": lambda: EXPECTED.permute(0, 2, 3, 1).numpy(),
    "list of tensors": lambda: list(EXPECTED),
    "list of pictures": lambda: [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in LEVELS],
    "iterator": lambda: iter(LEVELS.numpy()),
    "dictionaries": lambda: [{"pixel_values": x} for x in EXPECTED],
    "DataLoader that stacks": lambda: DataLoader(TensorDataset(EXPECTED), batch_size=5),
}
WITH_LABELS = {
    "TensorDataset": lambda: TensorDataset(EXPECTED, LABELS),
    "torchvision": Torchvision,
    "without targets": lambda: Torchvision(targets=False),
    "subset": lambda: Subset(Torchvision(), range(12)),
    "Hugging Face": HuggingFace,
    "DataLoader": lambda: DataLoader(TensorDataset(EXPECTED, LABELS), batch_size=5, shuffle=True, drop_last=True),
    "stream": Stream,
    "DataLoader of a stream": lambda: DataLoader(Stream(), batch_size=5),
    "DataLoader of dictionaries": lambda: DataLoader(
        IterableDatasetOf({"image": x, "label": int(y)} for x, y in zip(EXPECTED, LABELS)), batch_size=5
    ),
}


class IterableDatasetOf(IterableDataset):
    def __init__(self, items):
        self.items = list(items)

    def __iter__(self):
        return iter(self.items)


@pytest.mark.parametrize("kind", [*WITHOUT_LABELS, *WITH_LABELS])
def test_the_images_are_the_same(kind):
    images = data.wrap((WITHOUT_LABELS | WITH_LABELS)[kind]())
    assert images.shape == EXPECTED.shape
    torch.testing.assert_close(images[:], EXPECTED, rtol=0, atol=1e-6)
    torch.testing.assert_close(images[torch.tensor([7, 2])], EXPECTED[[7, 2]], rtol=0, atol=1e-6)
    assert data.wrap(images) is images
    found = labels_of(images)
    assert found is None if kind in WITHOUT_LABELS else torch.equal(found, LABELS)


def test_grey_is_the_same_from_wherever_it_comes(tmp_path):
    """0.299, 0.587 and 0.114 of red, green and blue: of arrays, tensors, lists of pictures, and files, which are read
    in 8 bits."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    expected = torch.from_numpy(pixels @ np.array([0.299, 0.587, 0.114]))[:, None].float() / 127.5 - 1
    pictures = [Image.fromarray(x) for x in pixels]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    floats = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    for given, exact in ((pixels, True), (floats, True), (floats.double(), True), (pictures, True), (tmp_path, False)):
        found = data.wrap(given, channels=1)[:]
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-6 if exact else 1 / 127)
    white = data.wrap(np.full((2, 4, 4, 3), 255, np.uint8), channels=1)[:]
    assert white.max() <= 1 and white.min() == pytest.approx(1)


def test_grey_and_sizes():
    grey = LEVELS[:, 0]
    assert data.wrap(grey.numpy()).shape == (12, 1, 8, 8)
    pictures = [Image.fromarray(x.numpy()) for x in grey]
    torch.testing.assert_close(data.wrap(pictures)[:], grey[:, None].float() / 127.5 - 1.0)
    assert data.wrap(pictures, channels=3).shape == (12, 3, 8, 8)
    assert data.wrap(LEVELS, channels=1)[:].shape == (12, 1, 8, 8)
    torch.testing.assert_close(data.wrap(LEVELS, size=4)[:], data.resize(EXPECTED, 4))
    torch.testing.assert_close(data.wrap(Torchvision(), size=4)[:], data.resize(EXPECTED, 4))
    with pytest.raises(ValueError, match=r"samples\[0\] has 3 channels, not 1|1 or 3"):
        data.wrap(Torchvision(), channels=2)


def test_ranges():
    """Floats from 0 to 1 are not taken for images of [-1, 1]; what is said of them is done."""
    unit = LEVELS.float() / 255.0
    for samples in (unit, Torchvision(to_tensor), list(unit), unit.numpy()):
        with pytest.raises(ValueError, match=r"none below 0: gankern.data.wrap\(samples, value_range=\(0, 1\)\)"):
            data.wrap(samples)
        said = data.wrap(samples, value_range=(0, 1))
        torch.testing.assert_close(said[:], EXPECTED, rtol=0, atol=1e-6)
        assert torch.equal(data.wrap(said)[:], said[:])
        as_they_are = data.wrap(samples, value_range=(-1, 1))
        torch.testing.assert_close(data.wrap(as_they_are)[:], unit, rtol=0, atol=1e-6)
    for samples in (LEVELS.float(), list(LEVELS.float())):
        with pytest.raises(ValueError, match=r"values from \S+ to 25\d, not from -1 to 1; gankern.data.wrap"):
            data.wrap(samples)
        torch.testing.assert_close(data.wrap(samples, value_range=(0, 255))[:], EXPECTED)
    bright = (LEVELS // 4 + 190).float() / 255.0
    assert torch.equal(data.wrap(data.wrap(bright, value_range=(0, 1)))[:], bright * 2 - 1)


def late(change):
    """Images of which one that nobody looks at beforehand is another."""
    items = list(EXPECTED.repeat(10, 1, 1, 1))
    items[101] = change(items[101])
    return data.wrap(items)


def test_every_image_is_looked_at_when_it_is_used():
    with pytest.raises(ValueError, match=r"samples\[101\] has values from .* to 2\d"):
        late(lambda x: x + 20.0)[:]
    with pytest.raises(ValueError, match=r"samples\[101\] is 3x8x4, not 3x8x8 as the first"):
        late(lambda x: x[:, :, :4])[:]


@pytest.mark.parametrize(
    ("samples", "error", "says"),
    [
        (3, TypeError, "samples must be images"),
        ({"image": EXPECTED}, TypeError, "samples must be images"),
        ([], ValueError, "no images"),
        (EXPECTED[:0], ValueError, "N at least 1"),
        (EXPECTED[0, 0], ValueError, r"\[N, C, H, W\]"),
        (EXPECTED.permute(0, 2, 3, 1), ValueError, r"samples.permute\(0, 3, 1, 2\)"),
        (LEVELS.long(), ValueError, "uint8 or of floating-point"),
        (EXPECTED * float("nan"), ValueError, "not from -1 to 1"),
        ([{"text": "a"}], TypeError, r"samples\[0\] has text, and no image"),
        ([("a", 1)], TypeError, r"samples\[0\] must be a tensor"),
        (["a.png"], TypeError, r"samples\[0\] must be a tensor"),
        ([Image.new("RGBA", (8, 8), (0, 0, 0, 9))], ValueError, "transparent"),
        ([Image.new("F", (8, 8))], ValueError, "of the kind 'F'"),
        ("nowhere", ValueError, "unknown data 'nowhere'"),
    ],
)
def test_what_is_refused(samples, error, says):
    with pytest.raises(error, match=says):
        data.wrap(samples)


@pytest.mark.parametrize("kind", WITH_LABELS)
def test_a_run_on_data_of_ones_own(kind, tmp_path):
    """Under a name of its own, with its own labels: the losses are those of the tensors."""
    options = dict(width=4, latent=8, steps=2, batch_size=4, threads=1, conditioning="projection", checkpoint_every=9)
    samples = WITH_LABELS[kind]()
    config = training.configure("sn_dcgan", "mine", samples, **options)
    assert (config.data, config.num_classes) == ("mine", 3)
    record = training.train(config, samples, tmp_path / "run")
    plain = training.Trainer(config, "gankern", EXPECTED, LABELS)
    losses = [plain.step().losses for _ in range(2)][-1]
    final = record["sides"]["gankern"]["final_loss"]
    assert final == pytest.approx({"discriminator": losses["d"], "generator": losses["g"]}, rel=1e-5)


def test_figures_on_data_of_ones_own(tmp_path):
    """The classifier is trained on the images and labels that were given."""
    images, labels = data.load("digits"), data.labels("digits")
    options = dict(width=4, latent=8, steps=1, threads=1, conditioning="projection", evaluate=1, evaluate_samples=100)
    config = training.configure("sn_dcgan", "my digits", images, labels.tolist(), **options)
    record = training.train(config, images, tmp_path / "run", labels=labels.tolist())
    assert any("fid" in name for name in record["figures"]["gankern"])


# ---- zip files, grey folders, workers ------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for i, (image, label) in enumerate(zip(LEVELS, LABELS)):
        path = tmp_path / "mine" / "abc"[label] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return tmp_path / "mine"


@pytest.mark.parametrize("top", ["", "pictures/deep/"])
def test_a_zip_file_is_as_good_as_its_folder(folder, tmp_path, top):
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, f"{top}{path.relative_to(folder)}")
        archive.writestr("__MACOSX/._00.png", b"notes")
        archive.writestr(f"{top}readme.txt", b"words")
    plain, zipped = data.load(folder), data.load(tmp_path / "mine.zip")
    assert torch.equal(plain[:], zipped[:])
    assert torch.equal(data.condition(folder, plain, "labels"), data.condition("x", zipped, "labels"))
    assert zipped.classes == ["a", "b", "c"]
    config = training.configure("dcgan", str(tmp_path / "mine.zip"), zipped, width=4, batch_size=4)
    assert training.Trainer(config, "gankern", zipped).step().d_loss > 0


def test_zip_files_that_cannot_be_used(tmp_path):
    (tmp_path / "not.zip").write_bytes(b"a text")
    with pytest.raises(data.BrokenFile, match=r"not.zip is neither a folder nor a zip file of pictures"):
        data.load(tmp_path / "not.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("a.txt", b"")
    with pytest.raises(FileNotFoundError, match=r"no pictures .* in .*empty.zip"):
        data.load(tmp_path / "empty.zip")
    with zipfile.ZipFile(tmp_path / "broken.zip", "w") as archive:
        archive.writestr("a.png", b"no picture")
    with pytest.raises(data.BrokenFile, match=r"broken.zip/a.png"):
        data.load(tmp_path / "broken.zip")
    buffer = io.BytesIO()
    Image.fromarray(LEVELS[0, 0].numpy()).save(buffer, "PNG")
    with zipfile.ZipFile(tmp_path / "damaged.zip", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.png", buffer.getvalue())
    content = bytearray((tmp_path / "damaged.zip").read_bytes())
    content[content.index(b"IDAT") + 8] ^= 1
    (tmp_path / "damaged.zip").write_bytes(content)
    with pytest.raises(data.BrokenFile, match=r"damaged.zip/a.png.*CRC"):
        data.load(tmp_path / "damaged.zip")


def test_grey_folders_have_one_channel(tmp_path):
    for i in range(3):
        Image.fromarray(LEVELS[i, 0].numpy()).save(tmp_path / f"{i}.png")
    images = data.load(tmp_path)
    torch.testing.assert_close(images[:], EXPECTED[:3, :1])
    assert data.load(tmp_path, channels=3).shape == (3, 3, 8, 8)
    Image.fromarray(LEVELS[3].permute(1, 2, 0).numpy()).save(tmp_path / "3.png")
    assert data.load(tmp_path).shape == (4, 3, 8, 8)


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_workers_change_nothing(folder, workers):
    source = data.load(folder)
    few, many = (data.EndlessBatches(source, 5, seed=1, labels=LABELS, workers=n) for n in (0, workers))
    for _ in range(3):
        for a, b in zip(next(few), next(many), strict=True):
            assert torch.equal(a, b)
    resumed = data.EndlessBatches(source, 5, seed=7, labels=LABELS, workers=workers)
    next(resumed)
    resumed.load_state_dict(many.state_dict())
    for _ in range(4):
        expected = next(few)
        for batches in (many, resumed):
            assert all(torch.equal(a, b) for a, b in zip(expected, next(batches), strict=True))


def test_a_broken_file_in_a_thread_is_named(folder):
    source = data.load(folder)
    next(folder.rglob("05.png")).write_bytes(b"")
    batches = data.EndlessBatches(source, 4, seed=0, workers=2)
    with pytest.raises(data.BrokenFile, match=r"05.png"):
        for _ in range(3):
            next(batches)


def test_pictures_with_transparency_are_not_taken_for_many_channels():
    with pytest.raises(ValueError, match="samples must have 1 or 3 channels"):
        data.wrap(np.zeros((5, 32, 32, 4), np.uint8))
    assert data.wrap(np.zeros((5, 4, 32, 32), np.uint8)).shape == (5, 4, 32, 32)
