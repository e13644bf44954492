"""A journal of finished cells: one JSON line each, appended as they finish, so that a killed sweep goes on later."""

from __future__ import annotations

import json
import os
from pathlib import Path

from kvsim.errors import UserError


class Journal:
    """The file `path`, opened for appending.

    `known` maps the key of each cell that was finished before to what was written about it. A line that is no
    whole JSON object, such as the last one of a process that was killed while it wrote, is left out.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self.known = _read(self.path)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            if self._file.tell() and not _ends_whole(self.path):
                self._file.write(b"\n")  # what was torn stays a line of its own
        except OSError as error:
            raise UserError(
                f"the journal {self.path} cannot be used ({error.strerror}); choose another place for the table"
            ) from None

    def add(self, key: str, content: dict) -> None:
        """Append a finished cell, in one write. UserError when the disk is full."""
        line = json.dumps({"key": key, **content}, separators=(",", ":")).encode() + b"\n"
        try:
            self._file.write(line)
        except OSError as error:
            raise UserError(f"the journal {self.path} cannot be written ({error.strerror})") from None

    def close(self) -> None:
        self._file.close()


def _read(path: Path) -> dict[str, dict]:
    known = {}
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                content = json.loads(line)
                known[content.pop("key")] = content
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
    return known


def _ends_whole(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"
