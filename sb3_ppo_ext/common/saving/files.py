"""Model files that are written whole or not at all, and what is wrong with those that cannot be read."""

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
    A model file, whole or not at all, under the name that SB3's ``save`` gives it: with ``.zip`` where there is no
    suffix, ``_2`` behind that of a folder, in a folder that is made if it is not there.

    :param path: of the file
    :param content: to write
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
    Write a file that is never seen in part, whoever reads or writes it at the same time, be the process killed or the
    power lost: it is on the disk before it gets its name, and what had that name before is there until then.

    The permissions are those of the file that is replaced, or those that a new file has. A link stays one.

    :param path: of the file, in a folder that is there
    :param content: to write
    :raises OSError: if it cannot be written
    """
    path = Path(os.path.realpath(path))
    replaced = None
    with contextlib.suppress(FileNotFoundError):
        replaced = path.stat()
        if not stat.S_ISREG(replaced.st_mode):
            path.write_bytes(content)  # a device or a pipe is not to be replaced by a file
            return
        path.open("r+b").close()  # an error where it must not be written to
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
        if sys.platform == "win32":  # which renames no open file
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
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
    A new file that no one else writes to. It is locked as long as it is open, by which :func:`_remove_leftovers` knows
    that its writer lives: the lock ends with the process, however that ends.
    """
    while True:
        path = folder / f"{uuid.uuid4().hex}.sb3_ppo_ext.tmp"
        file = path.open("xb")
        if sys.platform == "win32":
            return path, file
        with contextlib.suppress(OSError):  # on a file system without locks nothing is taken for a leftover
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink > 0:
            return path, file
        file.close()  # it was taken for a leftover in the moment before it was locked


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes of this package left in a folder that were killed while they wrote."""
    if sys.platform == "win32":
        return
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError), path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error while the writer lives
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def opened(path: str | Path | io.BufferedIOBase) -> Iterator[io.BufferedIOBase]:
    """
    A model file to read, as ``load`` takes it. Where reading it fails, and the file is the reason, an error says so.

    :param path: of the file, ``.zip`` may be left out; or an open file, which stays open
    :raises OSError: if it cannot be opened
    :raises ValueError: if it is truncated, damaged or no model
    """
    file = open_path(path, "r", suffix="zip")
    try:
        yield file
    except Exception as error:  # whatever a damaged file leads to
        damage = damage_of(file)
        if damage is None:
            raise
        raise ValueError(f"{name_of_file(path)} cannot be loaded: {damage}") from error
    finally:
        if file is not path:
            file.close()


def name_of_file(path: object) -> object:
    """
    :param path: of a file, or an open file
    :return: what to call it in a message
    """
    return getattr(path, "name", path) if isinstance(path, io.IOBase) else path


def damage_of(file: Path | ReadableFile) -> str | None:
    """What keeps a file from being read as a model; None if it is whole. Its whole content is checked."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            archive.getinfo("data")  # the end of a truncated file may pass for an archive
            archive.getinfo(WEIGHTS)
    except Exception as error:  # a flipped bit may lead to any
        return f"it cannot be read, or is truncated or damaged ({error})"
    return None if damaged is None else f"it is damaged (in its member {damaged})"
