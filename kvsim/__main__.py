"""`python -m kvsim` is `kvsim`."""

from kvsim.cli import entry

entry()
