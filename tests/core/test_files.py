"""Files that are written whole or not at all, and whether one could be."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from gankern.core.files import check_can_write, remove_temporary, write_bytes, write_json


def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    write_bytes(path, b"old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_bytes(path, b"new and longer")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_made_and_links_stay_links(tmp_path):
    write_json(tmp_path / "a" / "b" / "c.json", {"x": 1})
    assert json.loads((tmp_path / "a" / "b" / "c.json").read_text()) == {"x": 1}
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_bytes(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"x"
    write_bytes(str(tmp_path / ("n" * 255)), b"x")  # as long as a name may be


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_bytes(tmp_path / "pipe", b"through")
    reader.join()
    assert read == [b"through"] and (tmp_path / "pipe").is_fifo()
    check_can_write("/dev/null")
    write_bytes("/dev/null", b"x")
    assert not os.path.isfile("/dev/null")


@pytest.mark.parametrize("name", ["folder", "file/under", "n" * 256, "file/under/deeper"])
def test_asked_before_the_work(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for ask in (check_can_write, lambda path: write_bytes(path, b"x")):
        with pytest.raises(OSError):
            ask(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "x"
    check_can_write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x" and sorted(tmp_path.rglob("*")) == before


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    program = f"""
from gankern.core.files import write_bytes
i = 0
while True:
    i = (i + 1) % 256
    write_bytes({str(tmp_path / "x")!r}, bytes([i]) * 1_000_000)
"""
    for wait in (0.01, 0.05, 0.1):
        process = subprocess.Popen([sys.executable, "-c", program])
        while not (tmp_path / "x").exists():
            time.sleep(0.01)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        content = (tmp_path / "x").read_bytes()
        assert len(content) == 1_000_000 and len(set(content)) == 1
    remove_temporary(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
