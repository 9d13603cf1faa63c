"""CIFAR-10's python files: the bytes that its authors' Python 2 wrote, what Python 3 writes, and what is forged."""

import pickle
import struct

import numpy as np
import pytest

from gankern.data import BrokenFile, cifar10
from gankern.data.pickles import read_batch

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (4, 3072), dtype=np.uint8)
LABELS = [3, 0, 9, 7]


def short(text):
    return b"U" + bytes([len(text)]) + text


def original(pixels=PIXELS, labels=LABELS, dtype=b"u1", state=None, extra=b""):
    """A file as cPickle wrote it, opcode by opcode: the layout of the archive's data_batch_1."""
    put = (b"q" + bytes([i]) for i in range(1, 255))
    state = state or b"(K\x03" + short(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t" + next(put)
    out = b"\x80\x02}" + next(put) + b"("
    out += short(b"batch_label") + next(put) + short(b"training batch 1 of 5") + next(put)
    out += short(b"labels") + next(put) + b"]" + next(put) + b"(" + b"".join(b"K" + bytes([x]) for x in labels) + b"e"
    out += short(b"data") + next(put) + b"cnumpy.core.multiarray\n_reconstruct\n" + next(put)
    out += b"cnumpy\nndarray\n" + next(put) + b"K\x00\x85" + next(put) + short(b"b") + b"\x87" + next(put)
    out += b"R" + next(put) + b"(K\x01M" + struct.pack("<H", len(pixels)) + b"M\x00\x0c\x86" + next(put)
    out += b"cnumpy\ndtype\n" + next(put) + short(dtype) + b"K\x00K\x01\x87" + next(put) + b"R" + next(put)
    out += state + b"b\x89T" + struct.pack("<I", pixels.size) + pixels.tobytes() + next(put) + b"t" + next(put) + b"b"
    out += short(b"filenames") + next(put) + b"]" + next(put) + b"(" + short(b"a.png") * len(labels) + b"e" + extra
    return out + b"u."


def write(folder, content, name="data_batch_1"):
    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(original())
    (folder / name).write_bytes(content)


def test_as_its_authors_wrote_it(tmp_path):
    content = read_batch(original())
    assert np.array_equal(content[b"data"], PIXELS) and content[b"labels"] == LABELS
    assert content[b"batch_label"] == b"training batch 1 of 5" and content[b"filenames"] == [b"a.png"] * 4
    as_python_reads_it = pickle.loads(original(), encoding="bytes")
    assert np.array_equal(as_python_reads_it[b"data"], PIXELS)  # the layout above is a pickle
    write(tmp_path, original())
    images, labels = cifar10(tmp_path)
    assert images.shape == (20, 3, 32, 32) and labels.tolist() == 5 * LABELS


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_as_python_3_writes_it(protocol):
    content = {
        b"labels": LABELS,
        b"data": PIXELS,
        b"filenames": [b"", b"a.png", b"b", b"c"],
        b"batch_label": b"x" * 300,
    }
    found = read_batch(pickle.dumps(content, protocol=protocol))
    assert np.array_equal(found[b"data"], PIXELS) and found[b"filenames"] == content[b"filenames"]


FORGED = {
    # numpy.dtype takes whatever state it is given: with the flag of objects its 8 bytes become a pointer.
    "objects": original(dtype=b"O8", state=b"(K\x03" + short(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?t"),
    "flags of objects": original(state=b"(K\x03" + short(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?t"),
    "fields": original(state=b"(K\x03" + short(b"|") + b"N(U\x01at}tJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"),
    "a size": original(state=b"(K\x03" + short(b"|") + b"NNNJ\x00\x00\x00\x7fJ\x01\x00\x00\x00K\x00t"),
    "another dtype": original(dtype=b"i8"),
    "more rows than bytes": original().replace(b"M\x04\x00M\x00\x0c", b"M\x05\x00M\x00\x0c"),
    "a negative size": original().replace(b"M\x04\x00M\x00\x0c", b"J\xff\xff\xff\xffM\x00\x0c"),
    "another function": original().replace(b"cnumpy\nndarray", b"cos\nsystem"),
    "another class": original().replace(b"cnumpy\ndtype", b"cnumpy\nvoid"),
    "a state for a list": b"\x80\x02](K\x01K\x02K\x03K\x04K\x05tb.",
    "a call of a call": original(extra=short(b"x") + b"cnumpy\ndtype\ncnumpy\ndtype\nU\x02u1K\x00K\x01\x87R\x85R"),
    "a dictionary as a key": b"\x80\x02}}K\x01s.",
    "a list in itself": b"\x80\x02]q\x01h\x01a.",
    "tuples in tuples": b"\x80\x02K\x01" + b"2\x86" * 50 + b".",
    "deep tuples": b"\x80\x02}U\x04data" + b"(" * 100_000 + b"t" * 100_000 + b"s.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent id": b"\x80\x02K\x01Q.",
    "an instance": b"\x80\x02(K\x01inumpy\ndtype\n.",
    "a new object": b"\x80\x02cnumpy\ndtype\n)\x81.",
    "a missing value": b"\x80\x02h\x07.",
    "no stop": b"\x80\x02}",
    "nothing on the stack": b"\x80\x02.",
    "a mark alone": b"\x80\x02(.",
    "two values": b"\x80\x02}}.",
    "something behind": original() + b"x",
    "a huge length": b"\x80\x02T\xff\xff\xff\x7fabc.",
    "a huge text": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fabc.",
    "an endless number": b"\x80\x02L" + b"9" * 5000 + b"L\n.",
}  # fmt: skip


@pytest.mark.parametrize("kind", FORGED)
def test_what_is_forged_is_a_sentence_with_the_name(tmp_path, kind):
    write(tmp_path, FORGED[kind], "data_batch_2")
    with pytest.raises(BrokenFile, match="data_batch_2: ") as caught:
        cifar10(tmp_path)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (original(labels=[3, 0, 10, 7]), "labels must be from 0 to 9, got 10"),
        (original(labels=[3, 0, 9]), "a list of 4 labels"),
        (original(labels=LABELS).replace(b"K\x03K\x00K\x09K\x07", b"NK\x00K\x09K\x07"), "labels that are integers"),
        (original(pixels=PIXELS[:0], labels=[]), "expected data of uint8"),
        (original().replace(b"labels", b"labelt"), "it has no labels"),
        (original().replace(b"M\x04\x00M\x00\x0c\x86", b"M\x00\x08M\x06\x00\x86"), "3072"),
    ],
)  # fmt: skip
def test_contents_that_are_not_cifar10s(tmp_path, content, words):
    write(tmp_path, content)
    with pytest.raises(BrokenFile, match=f"data_batch_1: .*{words}"):
        cifar10(tmp_path)


def test_a_folder_in_the_place_of_a_file(tmp_path):
    write(tmp_path, original())
    (tmp_path / "data_batch_3").unlink()
    (tmp_path / "data_batch_3").mkdir()
    with pytest.raises(BrokenFile, match="data_batch_3: Is a directory"):
        cifar10(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of escapes in mutated strings
def test_any_bytes_give_a_batch_or_a_value_error():
    """Three thousand mutations of both layouts: bytes changed, cut out, repeated, moved."""
    small = PIXELS[:1, :12].copy()
    whole = [
        original(small, [3]).replace(b"M\x00\x0c", b"M\x0c\x00"),
        pickle.dumps({b"labels": [3], b"data": small}, protocol=2),
        pickle.dumps({b"labels": [3], b"data": small}, protocol=4),
    ]
    assert all(np.array_equal(read_batch(content)[b"data"], small) for content in whole)
    random = np.random.default_rng(1)
    refused = 0
    for i in range(3000):
        content = bytearray(whole[i % 3])
        for _ in range(random.integers(1, 4)):
            a, b = sorted(random.integers(0, len(content), 2))
            match random.integers(0, 4):
                case 0:
                    content[a] = random.integers(0, 256)
                case 1:
                    del content[a : min(b, a + 8)]
                case 2:
                    content[b:b] = content[a : a + 12]
                case 3:
                    content[a] = b"(tRb}](su0.eN\x85\x86\x87h"[random.integers(0, 17)]
        try:
            assert isinstance(read_batch(bytes(content)), dict)
        except ValueError:
            refused += 1
    assert refused > 1500
