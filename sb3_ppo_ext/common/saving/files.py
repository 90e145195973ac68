"""Write model files whole or not at all, and find out why a file cannot be read."""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import sys
import uuid
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TypeAlias

from stable_baselines3.common.save_util import open_path

if sys.platform != "win32":
    import fcntl

ReadableFile: TypeAlias = io.BufferedIOBase | IO[bytes]

WEIGHTS = "policy.pth"

_TEMPORARY = re.compile(r"[0-9a-f]{32}\.sb3_ppo_ext\.tmp")


def save_whole(path: str | os.PathLike[str], content: memoryview) -> None:
    """
    Write a model file, whole or not at all, under the name that SB3's ``save`` would give it: ``.zip`` is added if the
    path has no suffix, ``_2`` if it is a folder, and a missing parent folder is created.

    :param path: path of the file
    :param content: content of the file
    :raises OSError: if it cannot be written
    """
    path = Path(path)
    while True:
        if not path.suffix:
            path = path.with_name(f"{path.name}.zip")
        if not path.is_dir():
            break
        warnings.warn(f"Path {str(path)!r} is a folder. Will save instead to {path}_2", stacklevel=3)
        path = path.with_name(f"{path.name}_2")
    if not path.parent.exists():
        warnings.warn(f"Path {str(path.parent)!r} does not exist. Will create it.", stacklevel=3)
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def write_whole(path: Path, content: memoryview) -> None:
    """
    Write a file so that nobody ever sees a part of it, even if others read or write it at the same time, the process is
    killed or the power fails. A temporary file is first written to the disk; then it replaces the file of that name.

    The file keeps the permissions of the file that it replaces; otherwise it has those of a new file. If the path is a
    symbolic link, the target is replaced and the link stays.

    :param path: path of the file, in an existing folder
    :param content: content of the file
    :raises OSError: if it cannot be written
    """
    path = Path(os.path.realpath(path))
    replaced = None
    with contextlib.suppress(FileNotFoundError):
        replaced = path.stat()
        if not stat.S_ISREG(replaced.st_mode):
            path.write_bytes(content)  # a device or a pipe must not be replaced by a file
            return
        path.open("r+b").close()  # raises an error if the file is not writable
    _remove_leftovers(path.parent)
    temporary, file = _new_temporary(path.parent)
    try:
        with file:
            file.write(content)
            file.flush()
            if replaced is not None:
                _take_over_permissions(temporary, replaced)
            os.fsync(file.fileno())
            if sys.platform != "win32":  # while the lock is held
                os.replace(temporary, path)
        if sys.platform == "win32":  # Windows cannot rename an open file
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # on Windows a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _take_over_permissions(path: Path, replaced: os.stat_result) -> None:
    if sys.platform != "win32" and (replaced.st_uid, replaced.st_gid) != (os.geteuid(), os.getegid()):
        with contextlib.suppress(PermissionError):  # only root may give a file to another
            os.chown(path, replaced.st_uid, replaced.st_gid)
    path.chmod(stat.S_IMODE(replaced.st_mode))


def _new_temporary(folder: Path) -> tuple[Path, IO[bytes]]:
    """
    Create a temporary file that no other process uses. It is locked while it is open. The lock tells
    :func:`_remove_leftovers` that the writing process is alive, because it ends with the process in any case.
    """
    while True:
        path = folder / f"{uuid.uuid4().hex}.sb3_ppo_ext.tmp"
        file = path.open("xb")
        if sys.platform == "win32":
            return path, file
        with contextlib.suppress(OSError):  # without locks, no file is removed as a leftover
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink > 0:
            return path, file
        file.close()  # another process removed it as a leftover before it was locked


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files of processes that were killed while they wrote."""
    if sys.platform == "win32":
        return
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError), path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises an error while the writer is alive
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def opened(path: str | Path | io.BufferedIOBase) -> Iterator[io.BufferedIOBase]:
    """
    Open a model file for ``load``. If the ``with`` block fails and the file is damaged, the error says so.

    :param path: path of the file, ``.zip`` may be left out; or an open file, which stays open
    :raises OSError: if it cannot be opened
    :raises ValueError: if it is truncated, damaged or no model
    """
    file = open_path(path, "r", suffix="zip")
    try:
        yield file
    except Exception as error:  # a damaged file may raise anything
        damage = damage_of(file)
        if damage is None:
            raise
        raise ValueError(f"{name_of_file(path)} cannot be loaded: {damage}") from error
    finally:
        if file is not path:
            file.close()


def name_of_file(path: object) -> object:
    """
    :param path: path of a file, or an open file
    :return: its name for a message
    """
    return getattr(path, "name", path) if isinstance(path, io.IOBase) else path


def damage_of(file: Path | ReadableFile) -> str | None:
    """Why a file cannot be read as a model; None if it can be. Its whole content is checked."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            archive.getinfo("data")  # the end of a truncated file may look like an archive
            archive.getinfo(WEIGHTS)
    except Exception as error:  # a flipped bit may raise anything
        return f"it cannot be read, or is truncated or damaged ({error})"
    return None if damaged is None else f"it is damaged (in its member {damaged})"
