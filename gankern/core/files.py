"""Files are written whole or not at all."""

import errno
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".*.gankern-tmp"  # what a process that was killed while it wrote can leave beside a file
LOCK = ".gankern-lock"  # in a folder that is one process's, where the folder itself cannot be locked


class UnusableFile(ValueError):
    """A file cannot be read, or is damaged, or is not what it is taken for."""


def write_bytes(path: Path | str, content: bytes) -> None:
    """Writes beside the target, waits for the disk, and renames.

    A run that is stopped at any moment leaves the old file or the new one, never half of one; so does a full disk. The
    folder is made where there is none. What is no regular file (a terminal, a pipe, /dev/null) is written to directly:
    a rename would put a file in its place.

    Raises: OSError, with the path as its file name.
    """
    path = Path(path)
    if _is_special(path):
        path.write_bytes(content)
        return
    path = Path(os.path.realpath(path))  # a link stays one
    beside = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:  # a failed write names no file, and a failed rename names both
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # after a rename, or where it could not be made, there is none
            beside.unlink()


def write_json(path: Path | str, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds a folder for this process: the system lets go of it however the process ends.

    Raises: BlockingIOError where another process holds it.
    """
    if fcntl is None:  # a folder cannot be locked on Windows, a file in it can: torch's own requirement does that
        from filelock import FileLock, Timeout

        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(folder)) from None
        try:
            yield
        finally:
            lock.release()
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(opened)


def check_can_write(path: Path | str) -> None:
    """Raises the OSError that :func:`write_bytes` would, and leaves the file as it is: to be asked before long work.

    >>> check_can_write("/")
    Traceback (most recent call last):
    IsADirectoryError: [Errno 21] Is a directory: '/'
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if _is_special(path):
        path.open("wb").close()
        return
    path = Path(os.path.realpath(path))
    probe = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.open("wb").close()
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_temporary(folder: Path) -> None:
    """Removes what a process that was killed while it wrote left in a folder, for who has the folder to himself."""
    for leftover in folder.glob(TEMPORARY):
        leftover.unlink(missing_ok=True)


def _is_special(path: Path) -> bool:
    """Whether there is something of that name that is neither a file nor a folder."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return not (path.is_file() or path.is_dir())


def _beside(path: Path) -> Path:
    """A name of this process and thread alone, and of a length that file systems take, whatever the file is called."""
    return path.with_name(f".{path.name[:40]}.{os.getpid()}.{threading.get_ident()}{TEMPORARY[2:]}")
