"""kvsim.kernels: arrays in, arrays out; one folder a family, one file a backend.

Every family has `ref.py` (NumPy, the definition), `cpu.py` (numba) and, where a GPU pays, `cuda.py`; the same
function names in each, and equal bytes from each. They need nothing beyond numpy and numba (cupy for a device)
and know nothing of traces, models or engines.

Import this package as `kvsim.kernels`: a top-level package called `kernels` exists elsewhere.
"""
