"""Request traces: files of many schemas in, the same columns out.

`load_trace` finds, detects and reads; `Trace` is the columns; `write_trace` is the way back.
To add a schema: one entry in `schemas.SCHEMAS`.
"""

from kvsim.trace.columns import Trace
from kvsim.trace.load import load_trace
from kvsim.trace.write import write_trace

__all__ = ["Trace", "load_trace", "write_trace"]
