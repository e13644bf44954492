"""Where a trace comes from: bundled names, files, gzip or plain, and what is not a trace at all."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from kvsim import traces
from kvsim.errors import UserError, did_you_mean

MAX_LINE = 64 * 2**20  # bytes or characters; a million-token prompt in 16-token ids takes 0.7 MB
_HEAD = 2**16
_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"

# First bytes of what people hand over by mistake -> what it is and what to do.
_NOT_TRACES = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file; run `git lfs pull`",
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
    b"PK\x03\x04": "is a zip archive or an .xlsx workbook; unzip it or export it as CSV",
    b"\xd0\xcf\x11\xe0": "is an .xls workbook; export it as CSV",
    _GZIP: "is gzip inside gzip; run gunzip on it once",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; decompress it with `zstd -d` first",
    b"\xfd7zXZ": "is compressed by xz; decompress it with `xz -d` first",
    b"BZh": "is compressed by bzip2; decompress it with `bzip2 -d` first",
    b"SQLite format 3": "is an SQLite database; export the table as CSV",
    b"%PDF": "is a PDF, not a trace; download the data file",
    b"<": "is HTML or XML, not a trace: probably the web page about it; download the raw file",
    b"[": "is one JSON array; write one object a line, such as with `jq -c '.[]'`",
}


class Source(NamedTuple):
    """A file that can be read again and again."""

    path: Path
    shown: str  # as the user wrote it; starts every message
    name: str
    gzipped: bool

    def open(self) -> BinaryIO:
        """The bytes after gunzip. Reading raises EOFError, zlib.error or BadGzipFile on damage."""
        return gzip.open(self.path) if self.gzipped else open(self.path, "rb")

    def text(self) -> io.TextIOWrapper:
        """The text, without byte-order mark and with line ends as they are; bytes that are no UTF-8 become
        lone surrogates, so that they matter only where they are used."""
        return io.TextIOWrapper(self.open(), encoding="utf-8-sig", errors="surrogateescape", newline="")

    def error(self, sentence: str, line: int | None = None) -> UserError:
        """`FILE: line N: sentence`, to raise."""
        return UserError(f"{self.shown}: " + (f"line {line}: " if line else "") + sentence)


def find(source: str | os.PathLike) -> Source:
    """A bundled trace by name, else a regular file. UserError for everything else, with the closest names.

    A bundled name wins over a file of that name, which `./NAME` still reaches.
    """
    shown = os.fspath(source)
    if shown in traces.names():
        path = traces.path(shown)
        return Source(path, shown, shown, _starts_with_gzip(path, shown))
    if shown == "-":
        raise UserError("-: reading a trace from standard input is not built yet; save it and name the file")
    if not shown:
        raise UserError(f"the trace's name is empty; name a file or one of {', '.join(traces.names())}")
    path = Path(shown)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(
            f"{shown}: no such file, nor a bundled trace ({', '.join(traces.names())})"
            f"{did_you_mean(path.name, [*traces.names(), *_neighbours(path)])}"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shown[:200]!r}: cannot be read ({reason}); check the path") from None
    if stat.S_ISDIR(mode):
        endings = (".csv", ".jsonl", ".parquet", ".gz")
        inside = [name for name in _neighbours(path / "any") if name.endswith(endings)][:3]
        such = f", such as {', '.join(inside)}" if inside else ""
        raise UserError(f"{shown}: is a directory; name one trace file in it{such}")
    if not stat.S_ISREG(mode):
        raise UserError(f"{shown}: is a pipe or device, which cannot be read twice; save it to a file")
    name = Path(path.name.removesuffix(".gz")).stem
    return Source(path, shown, name, _starts_with_gzip(path, shown))


def container(source: Source) -> str:
    """Told from the first bytes: "csv", "jsonl" or "parquet"; UserError says what it is if none of them."""
    with source.open() as file:
        head = file.read(_HEAD)
    if not head:
        raise source.error("is empty; download or export it again")
    if head.startswith(b"PAR1"):
        return "parquet"
    start = head.removeprefix(_BOM).lstrip()
    for magic, sentence in _NOT_TRACES.items():
        if head.startswith(magic) or start.startswith(magic):
            raise source.error(sentence)
    if b"\0" in head:
        half = head.count(0) > len(head) // 3
        raise source.error(
            "is UTF-16 text; save it as UTF-8"
            if half
            else "holds NUL bytes, so it is binary or damaged; give CSV, JSON lines or Parquet"
        )
    if not start and len(head) < _HEAD:
        raise source.error("holds nothing but blank lines; download or export it again")
    return "jsonl" if start.startswith(b"{") else "csv"


def numbered_lines(source: Source, file: BinaryIO | io.TextIOWrapper) -> Iterator[tuple[int, bytes | str]]:
    """(line number from 1, line with its end). UserError on a line that could only fill the memory."""
    for line in itertools.count(1):
        data = file.readline(MAX_LINE + 1)
        if not data:
            return
        if len(data) > MAX_LINE:
            raise source.error(f"is longer than {MAX_LINE // 2**20} MiB; is this a trace?", line)
        yield line, data


def _neighbours(path: Path) -> list[str]:
    """File names beside `path`, a bounded number of them; none when the folder cannot be listed."""
    try:
        with os.scandir(path.parent) as entries:
            return sorted(e.name for e in itertools.islice(entries, 1000) if e.is_file())
    except OSError:
        return []


def _starts_with_gzip(path: Path, shown: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(2) == _GZIP
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror}); check its permissions") from None
