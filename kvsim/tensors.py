"""Keys, values and queries from a user's file: `.npz` of NumPy, or `.safetensors`.

Arrays are mapped, not read: what is not looked at takes no memory. Only the arrays of a compressed `.npz` have to be
unpacked as a whole. Nothing in a file is executed, and every size that it claims is checked before it is believed.
"""

from __future__ import annotations

import lzma
import math
import mmap
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvsim.catalog.checkpoint import safetensors_layout
from kvsim.errors import UserError, did_you_mean
from kvsim.units import GIB, format_gib

# What the arrays are called, whatever the case.
NAMES = {
    "k": ("k", "key", "keys", "k_cache", "key_cache"),
    "v": ("v", "value", "values", "v_cache", "value_cache"),
    "q": ("q", "query", "queries"),
}
_AXES = {"b": "batch", "h": "heads", "t": "tokens", "d": "dim"}
_LETTERS = {name: letter for letter, name in _AXES.items()} | {"layers": "l"}
_SAFETENSORS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
MAX_UNPACKED_BYTES = 2 * GIB  # of one array of a compressed file
# What a damaged file makes zipfile raise; ValueError is of names that are no text, RuntimeError of a password.
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError, RuntimeError,
    ValueError,
)  # fmt: skip
_LOCAL_HEADER = struct.Struct(
    "<4s22xHH"
)  # of a zip member: signature, length of its name, of its extra field


class KvTensors(NamedTuple):
    """Read-only [batch, heads, tokens, dim], as views of the file; bfloat16 is uint16 with its bits, as `dtypes` says.
    `q` is None where the file has none; it may have other heads and tokens than `k` and `v`. `has_layers`: the first
    axis is one of layers."""

    k: np.ndarray
    v: np.ndarray
    q: np.ndarray | None
    dtypes: tuple[str, ...]  # of those three, without q of the two
    has_layers: bool = False

    def forget(self) -> None:
        """Let the pages of the file that were looked at leave memory; they are mapped again when they are needed."""
        for array in (self.k, self.v, self.q):
            while isinstance(array, np.ndarray) and getattr(array, "_mmap", None) is None:
                array = array.base
            if array is not None and hasattr(mmap, "MADV_DONTNEED") and isinstance(array, np.ndarray):
                array._mmap.madvise(mmap.MADV_DONTNEED)


def load_tensors(
    path: str | os.PathLike, layout: str = "htd", names: dict[str, str] | None = None
) -> KvTensors:
    """The arrays of a file, whose axes `layout` names in order: t tokens, d dim, h heads (one without), b batch or l
    layers; or in words, `"layers,heads,tokens,dim"`.

    `"thd"` is a cache of vLLM, `"bhtd"` of transformers. `names` has the arrays' names by "k", "v" and "q", where they
    are none of `NAMES`. Raises UserError for what is no such file."""
    path = Path(path)
    layout = check_layout(layout)
    axes, has_layers = layout.replace("l", "b"), "l" in layout
    readers = {".npz": _npz, ".safetensors": _safetensors}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: is no .npz or .safetensors file; save K and V as one of them")
    try:
        arrays = readers[path.suffix.lower()](path, names or {})
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    found = {
        side: (_in_order(path, name, array, axes), dtype) for side, (name, array, dtype) in arrays.items()
    }
    _check_fit(path, {side: array.shape for side, (array, _) in found.items()})
    q = found["q"][0] if "q" in found else None
    return KvTensors(found["k"][0], found["v"][0], q, tuple(dtype for _, dtype in found.values()), has_layers)


def check_layout(layout: str) -> str:
    """`layout` in letters, or UserError where it does not name tokens and dim, and perhaps heads and batch or layers,
    once each."""
    letters = (
        "".join(_LETTERS.get(word.strip(), "?") for word in layout.split(",")) if "," in layout else layout
    )
    axes = letters.replace("l", "b")
    if not {"t", "d"} <= set(axes) <= set(_AXES) or len(set(axes)) != len(axes):
        known = ", ".join(f"{letter} {name}" for name, letter in _LETTERS.items())
        raise UserError(
            f"layout {layout!r} is none; order the letters of {known}, such as thd or bhtd, or the words:"
            " tokens,heads,dim"
        )
    return letters


def _in_order(path: Path, name: str, array: np.ndarray, layout: str) -> np.ndarray:
    """[batch, heads, tokens, dim], those that `layout` lacks with length 1."""
    if array.ndim != len(layout):
        raise UserError(
            f"{path}: array {name!r} has the shape {array.shape}, which is no {layout}; give its layout, such as"
            f" {'bhtd' if array.ndim == 4 else 'thd'}"
        )
    if not array.size:
        raise UserError(
            f"{path}: array {name!r} has the shape {array.shape} and so no numbers; save a longer cache"
        )
    array = array.transpose([layout.index(axis) for axis in _AXES if axis in layout])
    missing = tuple(i for i, axis in enumerate(_AXES) if axis not in layout)
    return np.expand_dims(array, missing)


def _check_fit(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """UserError where keys, values and queries cannot belong to one attention."""
    k, v, q = shapes["k"], shapes["v"], shapes.get("q")
    if k[:3] != v[:3]:
        raise UserError(f"{path}: K is {_said(k)} and V {_said(v)}; save those of the same tokens and heads")
    if q is not None and (q[0] != k[0] or q[3] != k[3] or q[1] % k[1]):
        raise UserError(
            f"{path}: Q is {_said(q)} and K {_said(k)}; batch and dim must be equal and the heads of Q a multiple"
        )


def _said(shape: tuple[int, ...]) -> str:
    return ", ".join(f"{size} {name}" for size, name in zip(shape, _AXES.values(), strict=True))


def _pick(path: Path, names: list[str], asked: dict[str, str]) -> dict[str, str]:
    """Which of a file's arrays are "k", "v" and "q"."""
    picked = {}
    for side, known in NAMES.items():
        if side in asked:
            if asked[side] not in names:
                hint = did_you_mean(asked[side], names)
                raise UserError(f"{path}: has no array {asked[side]!r}, which is to be {side.upper()}{hint}")
            picked[side] = asked[side]
            continue
        hits = [name for name in names if name.lower() in known]
        if len(hits) > 1:
            raise UserError(
                f"{path}: {' and '.join(map(repr, hits))} could both be {side.upper()}; leave one of them"
            )
        if hits:
            picked[side] = hits[0]
        elif side != "q":
            example = next(
                (name for name in names if name.isprintable() and name not in picked.values()), "NAME"
            )
            has = ", ".join(repr(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")
            raise UserError(
                f"{path}: has no {side.upper()}, only {has or 'nothing'}; name it"
                f" {' or '.join(known[:2])}, or say which it is by --{side} {example}"
            )
    return picked


# ---------------------------------------------------------------- safetensors


def _safetensors(path: Path, names: dict[str, str]) -> dict[str, tuple[str, np.ndarray, str]]:
    start, described = safetensors_layout(path)
    out = {}
    for side, name in _pick(path, list(described), names).items():
        tensor = described[name]
        if tensor.dtype not in _SAFETENSORS:
            raise UserError(
                f"{path}: array {name!r} has {tensor.dtype} numbers; save {', '.join(_SAFETENSORS)}"
            )
        dtype = _SAFETENSORS[tensor.dtype]
        stored = np.dtype("<u2" if dtype == "bfloat16" else dtype).newbyteorder("<")
        out[side] = (
            name,
            _mapped(path, start + tensor.data_offsets[0], stored, tuple(tensor.shape), "C"),
            dtype,
        )
    return out


def _mapped(path: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    if 0 in shape:  # nothing to map, which mmap refuses
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape, order)


# ---------------------------------------------------------------- npz


def _npz(path: Path, names: dict[str, str]) -> dict[str, tuple[str, np.ndarray, str]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            return {
                side: (name, *_npz_array(path, archive, members[name], name))
                for side, name in _pick(path, list(members), names).items()
            }
    except _ZIP_ERRORS as error:
        reason = str(error) or "it ends early"
        raise UserError(
            f"{path}: is no .npz file or damaged ({reason}); save it again with numpy.savez"
        ) from None


def _npz_array(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str
) -> tuple[np.ndarray, str]:
    """The array and the name of its type: mapped where it is stored as it is, unpacked where it is compressed."""
    with archive.open(info) as file:
        shape, is_fortran, dtype = _npy_header(path, file, name)
        header_bytes = file.tell()
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise UserError(
            f"{path}: array {name!r} has numbers of type {dtype}; save float16, float32 or float64 (NumPy has no"
            " bfloat16: use safetensors)"
        )
    num_bytes = math.prod(shape) * dtype.itemsize
    if header_bytes + num_bytes != info.file_size:
        raise UserError(
            f"{path}: array {name!r} of shape {shape} should have {num_bytes:,} bytes and has"
            f" {info.file_size - header_bytes:,}; save it again"
        )
    order = "F" if is_fortran else "C"
    if info.compress_type == zipfile.ZIP_STORED:
        array = _mapped(path, _member_start(path, info) + header_bytes, dtype, shape, order)
    elif num_bytes > MAX_UNPACKED_BYTES:
        raise UserError(
            f"{path}: array {name!r} is compressed and has {format_gib(num_bytes)}; save it with numpy.savez, so that"
            " it need not be unpacked in memory"
        )
    else:
        array = np.frombuffer(archive.read(info), dtype, offset=header_bytes).reshape(shape, order=order)
    return array, dtype.name


def _npy_header(path: Path, file, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, is_fortran, dtype = read(file)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path}: array {name!r} is no NumPy array ({reason}); save it with numpy.savez"
        ) from None
    if any(size < 0 for size in shape):
        raise UserError(f"{path}: array {name!r} has the shape {shape}; save it with numpy.savez")
    return shape, is_fortran, dtype


def _member_start(path: Path, info: zipfile.ZipInfo) -> int:
    """The first byte of a member that is stored as it is: behind its local header, whose lengths are its own."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER.size)
        size = file.seek(0, os.SEEK_END)
    if len(header) == _LOCAL_HEADER.size:
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        start = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if signature == b"PK\x03\x04" and start + info.file_size <= size:
            return start
    raise zipfile.BadZipFile("a member is cut off")
