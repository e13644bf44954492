"""What nvidia-smi prints: which accelerator of the catalogue it is, and how much memory each has.

    nvidia-smi --query-gpu=name,memory.total,memory.used --format=csv

With or without header and units, with more columns in any order under a header, as UTF-8 or as Windows
PowerShell writes it (UTF-16).
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import NamedTuple

from kvsim import catalog
from kvsim.errors import UserError
from kvsim.units import GIB, MIB

COMMAND = "nvidia-smi --query-gpu=name,memory.total,memory.used --format=csv"
_MOST_BYTES = 1_000_000

# The driver's names, without NVIDIA, Tesla and GeForce, where they are not the catalogue's own.
_NAMES = {
    "a100 sxm4 80gb": "a100-80gb-sxm",
    "a100 80gb pcie": "a100-80gb-pcie",
    "a100 pcie 80gb": "a100-80gb-pcie",
    "a100 sxm4 40gb": "a100-40gb-sxm",
    "a100 pcie 40gb": "a100-40gb-pcie",
    "h100 80gb hbm3": "h100-80gb-sxm",
    "h100 pcie": "h100-80gb-pcie",
    "h100 nvl": "h100-nvl",
    "h200": "h200",
    "h200 nvl": "h200-nvl",
    "h20": "h20",
    "gh200 480gb": "gh200-96gb",
    "b200": "b200",
    "b300 sxm6 ac": "b300",
    "v100 sxm2 32gb": "v100-sxm2-32gb",
    "v100 pcie 16gb": "v100-pcie-16gb",
    "rtx a6000": "a6000",
    "rtx pro 6000 blackwell server edition": "rtx-pro-6000",
}


class Listed(NamedTuple):
    """A file's GPUs, all of one kind: the catalogue's entry, and bytes in total and in use, a GPU each."""

    entry: dict
    total_bytes: list[int]
    used_bytes: list[int]


def read(path: Path) -> Listed:
    """The GPUs that an nvidia-smi CSV lists. Raises UserError naming file, line and column."""
    columns, total, used, names = None, [], [], {}
    try:
        rows = list(csv.reader(_text(path).splitlines(), skipinitialspace=True))
    except csv.Error as error:
        raise UserError(f"{path}: is no list of GPUs ({error}); make the file with {COMMAND}") from None
    for number, row in enumerate(rows, start=1):
        row = [cell.strip() for cell in row]
        if not any(row):
            continue
        if columns is None:
            columns = _columns(path, row)
            if columns.pop("header"):
                continue
        if len(row) <= max(columns.values()):
            raise UserError(f"{path}, line {number}: has {len(row)} columns; make the file with {COMMAND}")
        name = row[columns["name"]]
        names.setdefault(name, number)
        total.append(_mib(path, number, "memory.total", row[columns["total"]]))
        in_use = columns.get("used")
        used.append(0 if in_use is None else _mib(path, number, "memory.used", row[in_use]))
        if total[-1] < GIB:
            raise UserError(
                f"{path}, line {number}: memory.total {total[-1] // MIB} MiB is too little for a GPU"
            )
        if used[-1] > total[-1]:
            raise UserError(
                f"{path}, line {number}: memory.used {used[-1] // MIB:,} MiB is more than memory.total"
                f" {total[-1] // MIB:,} MiB"
            )
    if not total:
        raise UserError(f"{path}: lists no GPU; make the file with {COMMAND}")
    if len(names) > 1:
        first, second = list(names)[:2]
        raise UserError(
            f"{path}: lists {first} (line {names[first]}) and {second} (line {names[second]}); an engine's"
            " GPUs must be of one kind, so keep the lines of one (nvidia-smi -i 0,1,...)"
        )
    return Listed(_entry(path, next(iter(names))), total, used)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > _MOST_BYTES:
        raise UserError(f"{path}: is too large for a list of GPUs; make the file with {COMMAND}")
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding).replace("\0", "\ufffd")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no text; make the file with {COMMAND}") from None


def _columns(path: Path, row: list[str]) -> dict[str, int]:
    """Where name, total and used are, by the first line: its header, or the order of COMMAND."""
    heads = [re.sub(r"\s*\[.*\]$", "", cell.lower()) for cell in row]
    if "memory.total" in heads:
        if "name" not in heads and "gpu_name" not in heads:
            raise UserError(f"{path}, line 1: there is no column 'name'; make the file with {COMMAND}")
        name = heads.index("name") if "name" in heads else heads.index("gpu_name")
        found = {"header": True, "name": name, "total": heads.index("memory.total")}
        return found | ({"used": heads.index("memory.used")} if "memory.used" in heads else {})
    if "name" in heads:
        raise UserError(f"{path}, line 1: there is no column 'memory.total'; make the file with {COMMAND}")
    if len(row) in (2, 3) and re.match(r"\d+(\s*MiB)?$|\[", row[1]):
        return {"header": False, "name": 0, "total": 1} | ({"used": 2} if len(row) == 3 else {})
    raise UserError(f"{path}: is no list of GPUs; make the file with {COMMAND}")


def _mib(path: Path, line: int, column: str, cell: str) -> int:
    match = re.fullmatch(r"(\d{1,9})\s*(MiB)?", cell)
    if match is None:
        raise UserError(f"{path}, line {line}: {column} is {cell!r}; it must be a number of MiB")
    return int(match[1]) * MIB


def _entry(path: Path, name: str) -> dict:
    if re.search(r"\bMIG\b", name):
        raise UserError(f"{path}: {name} is a slice of a GPU (MIG), which is not in the catalogue")
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).split()
    short = " ".join(word for word in words if word not in ("nvidia", "tesla", "geforce"))
    try:
        return catalog.find("gpus", _NAMES.get(short, short))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
