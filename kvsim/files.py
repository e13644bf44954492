"""Files appear whole or not at all: written under a temporary name beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from kvsim.errors import UserError

# Temporary files now being written. An interrupted process that cannot unwind removes them by this list.
_unfinished: set[Path] = set()


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` on success, remove it on any exception.

    Raises UserError when the place cannot be written to.
    """
    path = Path(path)
    try:
        if "\0" in str(path):
            raise ValueError("a name cannot hold a NUL character")
        if path.is_symlink():
            path = path.resolve()
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise UserError(f"{path} cannot be written: it is {kind}; choose another place")
        # Renaming would replace what its owner write-protected; for root even the system would not object.
        if path.exists() and not path.stat().st_mode & 0o222:
            raise UserError(f"{path} cannot be written: it is read-only; choose another place")
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise UserError(f"{path} cannot be written ({error}); choose another place") from None
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _unfinished.add(temporary)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); choose another place"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        _unfinished.discard(temporary)


def check_file(path: str | os.PathLike, suffixes: tuple[str, ...], flag: str = "") -> None:
    """UserError, before anything is reckoned, for a file (that `flag` names) which could not be written in the end: of
    another kind than `suffixes`, a folder, or in a folder that is not there."""
    path = Path(path)
    told = f"{flag} {path}".strip()
    if path.suffix.lower() not in suffixes:
        endings = " or ".join(filter(None, (", ".join(suffixes[:-1]), suffixes[-1])))
        raise UserError(f"{told}: give a file name that ends in {endings}")
    if path.is_dir():
        raise UserError(f"{told} is a folder; give a file")
    if not path.parent.is_dir():
        raise UserError(f"{told}: there is no folder {path.parent}; make it first")


def make_folder(path: str | os.PathLike) -> Path:
    """The folder `path`, made if need be. Raises UserError when it cannot be."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}; choose another place") from None
    return path


def remove_unfinished() -> None:
    """Remove every temporary file that is being written; for a process about to be ended."""
    for temporary in list(_unfinished):
        with contextlib.suppress(OSError):
            temporary.unlink()
