"""The one place that chooses how numba compiles, and where the machine code is kept.

`njit` here is numba's with `nogil=True` and a cache of our own. Plain `cache=True` looks only at the file of
the decorated function: edit a *called* file and it keeps running the old machine code. Ours lives in a
directory named by a digest of every source that is compiled and of the flags that change the code, so a stale
hit cannot happen; it is in the user's cache folder, so an installed package need not be writable.

`KVSIM_CACHE_DIR` moves the cache. Nothing here imports numba before the first `njit`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_KEPT_CACHES = 4  # digests kept on disk; older ones are removed when a new one is made
# Marker files: all of it is in this directory.
_PARTS = {"engine": "compiled", "router": "compiled-router", "kernels": "compiled-kernels"}
is_own_process = False  # True in the `kvsim` command, where no other code uses numba


def njit(function: Callable) -> Callable:
    """Compile `function` with kvsim's options; with NUMBA_DISABLE_JIT=1 it stays plain Python. It must use no negative
    index: compiled code does not count from the end of an array."""
    return _compile(function)


def inner_njit(function: Callable) -> Callable:
    """`njit` for what only compiled code calls: a part of the functions that `njit` makes."""
    # Said, because a function that is first called from an inline one would be inline too.
    return _compile(function, is_part=True, forceinline=False)


def inline_njit(function: Callable) -> Callable:
    """`inner_njit` for the verbs of a hot loop: LLVM inlines every call, so that a state of many arrays is not
    passed on the stack each time. For functions called from one or two places, or a few lines long."""
    return _compile(function, is_part=True, forceinline=True)


def conversion(takes: str, gives: str, build: Callable) -> Callable:
    """A function of one number for compiled code, from the numba type `takes` to `gives`, which is what
    `build(builder, value)` emits with llvmlite. For machine instructions that numba has no name for."""
    from numba.core import types
    from numba.extending import intrinsic

    signature = getattr(types, gives)(getattr(types, takes))

    def convert(typing_context, value):
        return signature, lambda context, builder, signature, arguments: build(builder, arguments[0])

    return intrinsic(convert)


def multiply_add(kind: str) -> Callable:
    """x * y + z of three numbers of a numba type, for compiled code, rounded once where there is an instruction for it
    and twice elsewhere: for products that need no rounding, or sums."""
    if is_disabled() or not has_instruction("fma"):
        return inline_njit(lambda x, y, z: x * y + z)
    from numba.core import types
    from numba.extending import intrinsic

    number = getattr(types, kind)

    def call(typing_context, x, y, z):
        return number(number, number, number), lambda context, builder, signature, xyz: builder.fma(*xyz)

    return intrinsic(call)


def has_instruction(feature: str) -> bool:
    """Whether compiled code may use an extension of x86, such as "f16c"."""
    from llvmlite import binding
    from numba.core import config

    if config.CPU_FEATURES is not None:
        return f"+{feature}" in config.CPU_FEATURES.split(",")
    return config.CPU_NAME != "generic" and bool(binding.get_host_cpu_features().get(feature, False))


def num_threads() -> int:
    """How many threads a kernel may use: what numba is told, without starting its pool, which no kernel uses."""
    if is_disabled():
        return 1
    from numba.core import config
    from numba.np.ufunc import parallel

    return parallel.get_num_threads() if parallel._is_initialized else config.NUMBA_NUM_THREADS


def as_writable(array):
    """The same memory as an array that may be written, for compiled code that only reads it: numba compiles anew for an
    array that is read-only, such as one of `np.load(mmap_mode="r")`, and a copy would take as much memory again."""
    if array.flags.writeable:
        return array
    import numpy as np

    return np.asarray(_AsWritable(array))


class _AsWritable:
    """What NumPy makes another array of, which keeps this and so the memory."""

    def __init__(self, array):
        self.array = array
        self.__array_interface__ = array.__array_interface__ | {"data": (array.ctypes.data, False)}


def import_numba() -> None:
    """Import all of numba that compiled code needs: in a process of our own without the linear algebra of SciPy, which
    takes 0.1 s to import and no kernel here uses, and without which numba has no `np.dot`."""
    blocked = "scipy.linalg"
    if not is_own_process or blocked in sys.modules or is_disabled():
        return
    sys.modules[blocked] = None  # an import of it fails, which numba is prepared for
    try:
        import numba.np.arraymath  # noqa: F401
    finally:
        del sys.modules[blocked]


def _compile(function: Callable, is_part: bool = False, **options) -> Callable:
    import numba

    if is_disabled():
        return function
    whole, part = _pipelines()
    compiled = numba.njit(
        nogil=True, error_model="numpy", _nrt=False, pipeline_class=part if is_part else whole,
        no_cpython_wrapper=is_part, no_cfunc_wrapper=is_part, **options,
    )(function)  # fmt: skip
    if not is_part:
        compiled._cache = _source_keyed_cache()(function)
    return compiled


@functools.cache
def _pipelines() -> tuple[type, type]:
    """How numba compiles what Python calls, and what only compiled code calls.

    By itself numba optimizes each function together with all that it calls, makes machine code of that, and does it all
    again for each of its callers: two thirds of the time, with functions as many and as nested as here. With these a
    part stays as it was lowered, and what Python calls is optimized once, together with all of its parts."""
    from numba._dynfunc import make_function
    from numba.core import ir, types
    from numba.core.codegen import JITCodeLibrary
    from numba.core.compiler import CompilerBase, DefaultPassBuilder
    from numba.core.compiler_machinery import PassManager, register_pass
    from numba.core.typed_passes import NativeLowering

    def counted_from_the_front(use, signature):
        """The signature of an array access, with an unsigned index; that of any other use as it is. A signed one would
        be asked at each access whether it counts from the end."""
        is_access = isinstance(use, ir.SetItem) or (isinstance(use, ir.Expr) and use.op == "getitem")
        if (
            not is_access
            or not isinstance(signature.args[0], types.Array)
            or signature.args[1] != types.int64
        ):
            return signature
        array, _, *value = signature.args
        return signature.return_type(array, types.uint64, *value)

    def callers_first(libraries):
        """LLVM links a function only if something that it has linked before calls it."""
        order, seen = [], set()

        def visit(library):
            if id(library) not in seen:
                seen.add(id(library))
                for other in reversed(library._linking_libraries):
                    visit(other)
                order.append(library)

        for library in reversed(libraries):
            visit(library)
        return order[::-1]

    class Whole(JITCodeLibrary):
        def finalize(self):
            self._linking_libraries = callers_first(self._linking_libraries)
            super().finalize()

        def add_linking_library(self, library):
            if library in self._linking_libraries:
                return
            super().add_linking_library(library)
            if isinstance(library, Part):
                for other in library._linking_libraries:
                    self.add_linking_library(other)

    class Part(Whole):
        def finalize(self):
            self._finalize_dynamic_globals()
            self._finalized = True

    @register_pass(mutates_CFG=True, analysis_only=False)
    class LowerWhole(NativeLowering):
        _name = "kvsim_lower_whole"
        library = Whole

        def run_pass(self, state):
            uses = state.calltypes.items()
            state.calltypes = {use: counted_from_the_front(use, signature) for use, signature in uses}
            state.library = self.library(state.targetctx.codegen(), state.func_id.func_qualname)
            state.library.enable_object_caching()
            return super().run_pass(state)

    @register_pass(mutates_CFG=True, analysis_only=False)
    class LowerPart(LowerWhole):
        _name = "kvsim_lower_part"
        library = Part

        def run_pass(self, state):
            state.flags.no_compile = True
            super().run_pass(state)
            fndesc, _, _, env = state["cr"]
            # What numba knows the function by: a Python function at address 0, which nobody calls.
            name = fndesc.qualname.rpartition(".")[2]
            callee = make_function(fndesc.lookup_module(), name, name, 0, env, (state.library,))
            state.targetctx.insert_user_function(callee, fndesc, [state.library])
            state["cr"] = state["cr"]._replace(cfunc=callee)
            return True

    class WholePipeline(CompilerBase):
        lowering = LowerWhole

        def define_pipelines(self):
            passes = PassManager("kvsim")
            for kind, what in DefaultPassBuilder.define_nopython_pipeline(self.state).passes:
                passes.add_pass(self.lowering if kind is NativeLowering else kind, what)
            passes.finalize()
            return [passes]

    class PartPipeline(WholePipeline):
        lowering = LowerPart

    return WholePipeline, PartPipeline


def is_disabled() -> bool:
    """True when numba is told to leave Python code alone (NUMBA_DISABLE_JIT)."""
    return os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")


@functools.cache
def cache_dir() -> Path:
    """Where this version of our sources keeps its machine code. Falls back to a temporary directory when the
    user's cache folder cannot be written."""
    base = os.environ.get("KVSIM_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "kvsim"
    )
    path = Path(base) / f"numba-{source_digest()[:16]}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError:
        user = os.getuid() if hasattr(os, "getuid") else "user"
        path = Path(tempfile.gettempdir()) / f"kvsim-{user}-{source_digest()[:16]}"
        path.mkdir(exist_ok=True)
    return path


@functools.cache
def source_digest() -> str:
    """Digest of every source that is compiled, of numba's version and of the flags that change the code."""
    import numba
    from numba.core import config

    digest = hashlib.sha256()
    for path in _compiled_sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    flags = (
        numba.__version__,
        sys.version_info[:2],
        config.BOUNDSCHECK,
        config.OPT,
        config.DEBUGINFO_DEFAULT,
    )
    digest.update(repr(flags).encode())
    return digest.hexdigest()


def _compiled_sources() -> list[Path]:
    kernels = importlib.util.find_spec("kvsim.kernels")
    folders = [Path(place) for place in kernels.submodule_search_locations] if kernels else []
    return [
        _PACKAGE / "_jit.py",
        _PACKAGE / "_ref.py",
        _PACKAGE / "units.py",
        *sorted((_PACKAGE / "engine").glob("*.py")),
        *(path for folder in folders for path in sorted(folder.rglob("*.py"))),
    ]


def is_warm(part: str = "engine") -> bool:
    """True when a run will find the machine code of the engine, of the router that looks at the replicas of a fleet, or
    of the quantization kernels on disk (or needs none)."""
    return is_disabled() or (cache_dir() / _PARTS[part]).exists()


def mark_warm(part: str = "engine") -> None:
    """Say that all of a part is compiled, and drop the caches of versions long gone."""
    if is_disabled():
        return
    here = cache_dir()
    (here / _PARTS[part]).touch()
    caches = sorted(here.parent.glob("numba-*"), key=lambda p: p.stat().st_mtime, reverse=True)
    for old in caches[_KEPT_CACHES:]:
        if old != here:
            shutil.rmtree(old, ignore_errors=True)


@functools.cache
def _source_keyed_cache() -> type:
    """numba's function cache with a locator that answers with our directory and our digest."""
    from numba.core import caching

    class Locator(caching._CacheLocator):
        def __init__(self, function):
            code = function.__code__
            self._name = f"{function.__module__}-{code.co_firstlineno}"

        def get_cache_path(self):
            return str(cache_dir())

        def get_source_stamp(self):
            return source_digest()

        def get_disambiguator(self):
            return self._name

        @classmethod
        def from_function(cls, function, file):
            return cls(function)

    class Impl(caching.CompileResultCacheImpl):
        _locator_classes = (Locator,)

    class SourceKeyedCache(caching.FunctionCache):
        _impl_class = Impl

    return SourceKeyedCache
