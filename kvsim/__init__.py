"""kvsim: replay request traces through a paged KV cache under a real engine's scheduling rules."""

from __future__ import annotations

import importlib
import os

# In a checkout kernels/ and traces/ lie beside this package; wheels have them inside it.
_CHECKOUT = os.path.dirname(__path__[0])
if not os.path.isdir(os.path.join(__path__[0], "kernels")) and os.path.isfile(
    f"{_CHECKOUT}/kernels/quant/quant.cu"
):
    __path__.append(_CHECKOUT)

__version__ = "0.1.0"

# Public name -> module that defines it. Nothing is imported before it is asked for.
_PUBLIC = {
    "deployment": "kvsim.specs",
    "load_model": "kvsim.specs",
    "load_gpu": "kvsim.specs",
    "Deployment": "kvsim.specs",
    "fit": "kvsim.memory",
    "load_trace": "kvsim.trace",
    "write_trace": "kvsim.trace",
    "Trace": "kvsim.trace",
    "make_trace": "kvsim.workload",
    "azure_like": "kvsim.workload",
    "make_mix": "kvsim.mix",
    "lognormal": "kvsim.workload",
    "geometric": "kvsim.workload",
    "uniform": "kvsim.workload",
    "constant": "kvsim.workload",
    "simulate": "kvsim.run",
    "simulate_many": "kvsim.sweeps",
    "sweep": "kvsim.sweeps",
    "compare": "kvsim.comparison",
    "with_attention": "kvsim.catalog.attention",
    "Result": "kvsim.result",
    "UserError": "kvsim.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'kvsim' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
