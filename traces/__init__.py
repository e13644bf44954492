"""Sample traces that come with kvsim: small, generated, found by name. Where they come from: README.md
here."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def names() -> tuple[str, ...]:
    """Names that `load_trace` and `kvsim run` take, sorted."""
    return tuple(sorted(p.stem for p in _HERE.glob("*.parquet")))


def path(name: str) -> Path:
    """The Parquet file of the bundled trace `name`. KeyError when there is none."""
    if name not in names():
        raise KeyError(name)
    return _HERE / f"{name}.parquet"
