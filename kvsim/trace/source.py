"""Where a trace comes from: bundled names, files, standard input; gzip, zstd or plain; and what is not a trace."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from kvsim import traces
from kvsim.errors import UserError, did_you_mean

MAX_LINE = 64 * 2**20  # bytes or characters; a million-token prompt in 16-token ids takes 0.7 MB
_HEAD = 2**16
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_MOST_PIPED = 16 * 2**30
_BOM = b"\xef\xbb\xbf"

_PICKLE = "is a Python pickle, which can run code when read; write the table as CSV or Parquet"
# A JSON document that is one benchmark result or holds spans, told by the first keys that are its own.
_DOCUMENT = re.compile(rb'"(?:resourceSpans|resource_spans|resourceLogs|resourceMetrics|input_lens)"\s*:')

# First bytes of what people hand over by mistake -> what it is and what to do.
_NOT_TRACES = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file; run `git lfs pull`",
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
    b"PK\x03\x04": "is a zip archive or an .xlsx workbook; unzip it or export it as CSV",
    b"\xd0\xcf\x11\xe0": "is an .xls workbook; export it as CSV",
    _GZIP: "is gzip inside gzip; run gunzip on it once",
    _ZSTD: "is zstd inside gzip or zstd; run `zstd -d` on it once",
    b"\xfd7zXZ": "is compressed by xz; decompress it with `xz -d` first",
    b"BZh": "is compressed by bzip2; decompress it with `bzip2 -d` first",
    b"SQLite format 3": "is an SQLite database; export the table as CSV",
    b"\x80\x02": _PICKLE,
    b"\x80\x03": _PICKLE,
    b"\x80\x04": _PICKLE,
    b"\x80\x05": _PICKLE,
    b"\x93NUMPY": "is a NumPy array; write its columns as CSV or Parquet",
    b"\x89HDF": "is an HDF5 file; write the table as CSV or Parquet",
    b"ARROW1": "is an Arrow (Feather) file; write it as Parquet",
    b"Obj\x01": "is an Avro file; write it as Parquet or JSON lines",
    b"ORC": "is an ORC file; write it as Parquet",
    b"\x04\x22\x4d\x18": "is compressed by lz4; decompress it with `lz4 -d` first",
    b"7z\xbc\xaf": "is a 7-Zip archive; unpack it and name the file in it",
    b"Rar!": "is a RAR archive; unpack it and name the file in it",
    b"{\\rtf": "is rich text; save it as plain text",
    b"sep=": "starts with a spreadsheet's sep= line; remove it, so that the first line names the columns",
    b"/annex/objects/": "is a git-annex pointer, not the file; run `git annex get`",
    b"%PDF": "is a PDF, not a trace; download the data file",
    b"\x7fELF": "is a program, not a trace",
    b"<": "is HTML or XML, not a trace: probably the web page about it; download the raw file",
    b"[": "is one JSON array; write one object a line, such as with `jq -c '.[]'`",
    b"//": "starts with a comment; remove it, so that the first line is a header or an object",
    b"#": "starts with a comment; remove it, so that the first line is a header or an object",
}


class Source(NamedTuple):
    """A file that can be read again and again."""

    path: Path
    shown: str  # as the user wrote it; starts every message
    name: str
    packed: str  # "gzip", "zstd" or "" for plain, from the first bytes
    is_temporary: bool = False  # a copy of standard input, which the reader removes when done

    def open(self) -> BinaryIO:
        """The bytes after decompression. Reading raises EOFError, zlib.error, BadGzipFile or, for zstd, an
        OSError without errno on damage."""
        if self.packed == "gzip":
            return gzip.open(self.path)
        if self.packed == "zstd":
            import pyarrow as pa

            return io.BufferedReader(pa.input_stream(str(self.path), compression="zstd"), 2**16)
        return open(self.path, "rb")

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
        return Source(path, shown, shown, _packed(path, shown))
    if shown == "-":
        return _standard_input()
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
    name = Path(path.name.removesuffix(".gz").removesuffix(".zst")).stem
    return Source(path, shown, name, _packed(path, shown))


def _standard_input() -> Source:
    """A copy of standard input, because a trace is read more than once."""
    shown = "standard input"
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise UserError("-: nothing is piped into standard input; name a file, or pipe one in")
    with tempfile.NamedTemporaryFile(prefix="kvsim-", delete=False) as copy:
        path = Path(copy.name)
        try:
            size = 0
            while block := sys.stdin.buffer.read(2**20):
                size += copy.write(block)
                if size > _MOST_PIPED:
                    raise UserError(
                        f"{shown}: more than {_MOST_PIPED // 2**30} GiB; save it and name the file"
                    )
        except BaseException as error:
            path.unlink()
            if isinstance(error, OSError):
                raise UserError(f"{shown}: cannot be read ({error.strerror or error})") from None
            raise
    return Source(path, shown, "stdin", _packed(path, shown), is_temporary=True)


def container(source: Source) -> str:
    """Told from the first bytes: "csv", "jsonl", "json" (one document of a known form) or "parquet"; UserError
    says what it is if none of them."""
    with source.open() as file:
        head = file.read(_HEAD)
    if not head:
        raise source.error("is empty; download or export it again")
    if head.startswith(b"PAR1"):
        return "parquet"
    start = head.removeprefix(_BOM).lstrip()
    if start.startswith((b"{", b"[")) and re.match(rb'[\s\[{]*(?:"id"[^,]*,\s*)?"conversations"\s*:', start):
        raise source.error(
            "holds the texts of conversations (ShareGPT), not token counts; count them with the model's tokenizer "
            "and write a row of prompt and output tokens for each request"
        )
    if re.match(rb"(?:HTTP/[0-9.]+ )?[45][0-9][0-9][: ][A-Za-z :]{3,80}\s*$", start[:120]):
        raise source.error(
            "is the text of an HTTP error, not a trace; download it again and look at the address"
        )
    for magic, sentence in _NOT_TRACES.items():
        if head.startswith(magic) or start.startswith(magic):
            raise source.error(sentence)
    if head[257:262] == b"ustar":
        raise source.error("is a tar archive; unpack it and name the file in it")
    if b"\0" in head:
        if head.endswith(b"PAR1"):
            raise source.error("is the end of a Parquet file without its start; download it again")
        half = head.count(0) > len(head) // 3
        raise source.error(
            "is UTF-16 text; save it as UTF-8"
            if half
            else "holds NUL bytes, so it is binary or damaged; give CSV, JSON lines or Parquet"
        )
    if not start and len(head) < _HEAD:
        raise source.error("holds nothing but blank lines; download or export it again")
    if start.startswith(b"{"):
        bare_result = b'"total_input_tokens"' in head and b'"request_throughput"' in head
        return "json" if bare_result or _DOCUMENT.search(head) else "jsonl"
    return "csv"


def numbered_lines(
    source: Source, file: BinaryIO | io.TextIOWrapper, longest: int | None = None
) -> Iterator[tuple[int, bytes | str]]:
    """(line number from 1, line with its end). UserError on a line that could only fill the memory."""
    longest = longest or MAX_LINE
    for line in itertools.count(1):
        data = file.readline(longest + 1)
        if not data:
            return
        if len(data) > longest:
            raise source.error(f"is longer than {longest // 2**20} MiB; is this a trace?", line)
        yield line, data


def _neighbours(path: Path) -> list[str]:
    """File names beside `path`, a bounded number of them; none when the folder cannot be listed."""
    try:
        with os.scandir(path.parent) as entries:
            return sorted(e.name for e in itertools.islice(entries, 1000) if e.is_file())
    except OSError:
        return []


def _packed(path: Path, shown: str) -> str:
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            return "gzip" if start[:2] == _GZIP else "zstd" if start == _ZSTD else ""
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror}); check its permissions") from None
