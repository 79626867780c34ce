"""Files and folders that appear complete: written under another name, then renamed.

The old file or folder stays until one rename replaces it by the new one. So a process may end at any time.
What a killed process leaves (``.part-...-NAME``) is removed by the next one that writes the same name.
"""

import ctypes
import errno
import glob
import hashlib
import os
import platform
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dpzoo.errors import InputError

PathLike = str | os.PathLike[str]

_NODE = hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()


def path_of(path: object, asker: str, wanted: str) -> str:
    """A path as text.

    Args:
        path: what was given for one.
        asker: the function that it was given to.
        wanted: what it takes.

    Raises:
        InputError: it is none.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(
            f"{asker} got a {type(path).__name__}, wanted {wanted}. For bytes in memory, take a temporary "
            f"file or folder."
        )
    if not os.fspath(path):
        raise InputError(f"{asker} got an empty path, wanted {wanted}.")
    return os.fspath(path)


@contextmanager
def whole_file(path: PathLike, *, mode: int = 0o666) -> Iterator[Path]:
    """A file to write, which replaces ``path`` when the block ends without an error.

    Args:
        path: of the file; of a symbolic link, what it points to is replaced.
        mode: permissions, less the umask.

    Yields:
        An empty file to write to, on the same file system and with the same suffix.

    Raises:
        OSError: it could not be written; what was there before stands.
    """
    place = _place(path)
    if place.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    part = _name(place, "part")
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        yield part
        _sync(part)
        os.replace(part, place)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync(place.parent)


def write_text(path: PathLike, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(
    path: PathLike, *, keep: Callable[[str], bool] = lambda name: False, last: str = "config.json"
) -> Iterator[Path]:
    """A folder to fill, which replaces ``path`` when the block ends without an error.

    A folder that keeps some of what it has is replaced in one step too, unless it has subfolders, is where
    the process runs, or the file system cannot move it or has no hard links. Its files are then replaced
    one after the other, with ``last`` removed first and put back last: the folder is no checkpoint
    meanwhile, and never a mixed one.

    Args:
        path: of the folder; of a symbolic link, what it points to is replaced.
        keep: name -> whether what an existing folder has under a name that the new one lacks stays.
        last: the file without which the folder counts as nothing.

    Yields:
        An empty folder to fill, on the same file system. If the block removes it, ``path`` stays as it is.

    Raises:
        OSError: it could not be written; what was there before stands.
    """
    place = _place(path)
    # A mounted folder is alone on its file system, and beside some nothing may be written.
    within = place.is_dir() and (os.path.ismount(place) or not os.access(place.parent, os.W_OK))
    part = _name(_place(place / place.name) if within else place, "part")
    try:
        part.mkdir()
        yield part
        if not part.exists():
            return
        for file in part.rglob("*"):
            _sync(file)
        kept = [name for name in _listed(place) if keep(name) and not (part / name).exists()]
        if within or not _link(place, part, kept) or not _swap(part, place):
            _one_by_one(part, place, last, kept)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    _sync(place.parent)


# --- taking the place ---------------------------------------------------------------------------


def _swap(part: Path, place: Path) -> bool:
    """Put a folder in its place; one that is there takes the other's. False where it cannot be moved."""
    _sync(part)
    if not _listed(place):
        os.rename(part, place)
        return True
    shutil.copymode(place, part)
    if _exchange(part, place):
        return True
    old = _name(place, "old")  # which the next writer puts back, if this one is killed just here
    try:
        os.rename(place, old)
    except OSError:  # a folder of a container's image, say, has to stay on its layer
        return False
    try:
        os.rename(part, place)
    except BaseException:
        os.rename(old, place)
        raise
    os.rename(old, part)
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; False where the system does not have it."""
    if os.name != "posix":
        return False
    libc = ctypes.CDLL(None)
    a, b = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):
        at_cwd, exchange = -100, 2
        return bool(libc.renameat2(at_cwd, a, at_cwd, b, exchange) == 0)
    if hasattr(libc, "renamex_np"):
        swap = 2
        return bool(libc.renamex_np(a, b, swap) == 0)
    return False


def _link(place: Path, part: Path, names: list[str]) -> bool:
    """Give the new folder the files that stay; False where it cannot take the place whole."""
    files = all(stat.S_ISREG(os.lstat(place / name).st_mode) for name in names)
    if not files or Path(os.path.realpath(".")).is_relative_to(place):
        return False
    try:
        for name in names:
            os.link(place / name, part / name)
    except OSError:
        return False
    return True


def _one_by_one(part: Path, place: Path, last: str, kept: list[str]) -> None:
    (place / last).unlink(missing_ok=True)
    new = sorted(_listed(part), key=lambda name: name == last)
    for name in {*_listed(place)} - {*kept, *new}:
        _remove(place / name)
    for name in new:
        os.replace(part / name, place / name)
    _sync(place)


# --- names and leftovers ------------------------------------------------------------------------


def is_part(path: Path) -> bool:
    """Whether a path is one that is being written, or was when its process was killed."""
    return path.name.startswith((f".part-{_NODE}", f".old-{_NODE}"))


def _place(path: PathLike) -> Path:
    """Where to write, with what killed processes left there put right."""
    place = Path(os.path.realpath(path))
    if place.is_symlink():  # to itself
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
    for left in place.parent.glob(f".*-{_NODE}-*-{glob.escape(_short(place))}"):
        if not _orphaned(left):
            continue
        if left.name.startswith(".old-") and not place.exists():
            os.rename(left, place)
        else:
            _remove(left)
    return place


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _name(place: Path, kind: str) -> Path:
    return place.parent / f".{kind}-{_NODE}-{os.getpid()}-{secrets.token_hex(4)}-{_short(place)}"


def _short(place: Path) -> str:
    """The end of the name, with its suffix: a name has a longest length."""
    return place.name[-60:]


def _orphaned(left: Path) -> bool:
    """Whether the process that made it, on this machine, is gone."""
    if not is_part(left) or os.name != "posix":
        return False
    try:
        os.kill(int(left.name.split("-")[2]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        pass
    return False


def _listed(folder: Path) -> list[str]:
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(name for name in names if not is_part(folder / name))


def _sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on disk."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # which some file systems cannot sync
            raise
    finally:
        os.close(handle)
