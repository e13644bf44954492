"""The command line: `kvsim VERB ...`. One file a verb, imported when called.

A verb's file has `add_arguments(parser)` and `main(args) -> int`. Exit codes: 0 answered; 1 the answer is no; 2
the user's mistake, told in one sentence on standard error; 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys

from kvsim import _jit
from kvsim.errors import UserError, did_you_mean

VERBS = {
    "run": "what happens to this traffic on this deployment?",
    "fit": "does it fit, and how many blocks are there?",
    "fix": "what would make it fit?",
    "load": "host memory to load it, and start-up step by step",
    "sweep": "the same, for many settings",
    "quant": "what does this KV format cost and save?",
    "compare": "attention kinds, allocators, block sizes, formats and models side by side",
    "why": "what happened to this request?",
    "show": "a finished run again, as text",
    "plot": "a finished run as a picture",
    "trace": "what is in this trace? make, describe, convert",
    "models": "what is known about a model?",
    "gpus": "what is known about a GPU?",
    "validate": "how right is the model on measured data?",
    "warm": "compile the engine now",
    "doctor": "what works here?",
}
_DESCRIPTION = "Replay LLM request traces through a paged KV cache under vLLM's scheduling rules."
_TAKES_A_PASTED_LINE = ("run", "fit", "fix", "load", "sweep", "compare")
_EXAMPLES = """examples:
  kvsim run                                    the bundled trace on the default deployment
  kvsim run chat-small --model llama-3.1-8b --gpu l4 -o out
  kvsim fit llama-3.1-70b --gpu h100 -tp 2     weights, reserve, KV blocks, requests at once
  kvsim fix llama-3-70b --gpu h100             what would make it fit
  kvsim sweep chat-small --max-num-seqs 32,64,128 --rate-scale 0.5:2:0.5 -o table.csv
  kvsim compare --model llama-3-70b --gpu h100 -tp 4 --attention mha,gqa,mqa,mla --plot kinds.png
  kvsim why out 417
  kvsim trace make --rate 20 --requests 50k --seed 1 -o trace.parquet
  kvsim models llama-3.1-8b                    parameters, weights, KV cache

Each verb has its own --help.
"""
_SECONDS_TO_UNWIND = 0.3
_interrupts: list[int] = []  # signals that came; only the `kvsim` command notes them


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints told as everybody else's: one sentence, exit 2."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _run_verb(argv)
    except UserError as error:
        print(f"kvsim: error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        what = f" ({error})" if str(error) else ""
        print(f"kvsim: error: there is not enough memory for this run{what}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:  # the reader of our output has gone, as in `kvsim show DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        print(f"kvsim: error: cannot write the output: {error.strerror}", file=sys.stderr)
        sys.stdout = _nowhere()
        return 2
    except Exception:
        if _interrupts:  # numba makes a compiler error of an interrupt while it compiles
            return _interrupted()
        raise


def _interrupted() -> int:
    print("kvsim: interrupted; what was already written is complete", file=sys.stderr)
    return 130


def entry() -> None:
    """The `kvsim` command. It ends the process at once: tearing down numba and Arrow would take longer than
    many a run, and a Ctrl-C in the middle of it would change the exit code of what is already done."""
    # A closed stream (`>&-`) is None; whoever prints to it means no harm.
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    _end_soon_after_interrupt()
    _jit.is_own_process = True
    code = 130
    try:
        code = main()
        sys.stdout.flush()
    except (BrokenPipeError, KeyboardInterrupt):
        pass  # the reader has gone; or an interrupt came when the verb had ended already
    except OSError as error:
        print(f"kvsim: error: cannot write to standard output: {error.strerror}", file=sys.stderr)
        code = 2
    sys.stderr.flush()
    os._exit(code)


def _nowhere():
    return open(os.devnull, "w")  # stands in for a standard stream


def _run_verb(argv: list[str]) -> int:
    top = Parser(prog="kvsim", description=_DESCRIPTION, epilog=_verb_list(), usage="kvsim VERB [...]")
    top.add_argument("--version", action="store_true", help="print the version and exit")
    if not argv or argv[0] in ("-h", "--help"):
        top.print_help()
        return 0
    verb, *rest = argv
    if verb == "--version":
        import kvsim

        print(f"kvsim {kvsim.__version__}")
        return 0
    if verb not in VERBS:
        kind = "flag" if verb.startswith("-") else "verb"
        raise UserError(f"there is no {kind} {verb!r}{did_you_mean(verb, VERBS)}; see kvsim --help")
    module = importlib.import_module(f"kvsim.cli.{verb}")
    parser = Parser(prog=f"kvsim {verb}", description=VERBS[verb][0].upper() + VERBS[verb][1:])
    module.add_arguments(parser)
    pasted = None
    if "--" in rest:  # a pasted command line follows
        at = rest.index("--")
        rest, pasted = rest[:at], rest[at + 1 :]
    args, unknown = parser.parse_known_args(rest)
    if unknown:
        raise UserError(_about_unknown(parser, unknown[0]))
    args.pasted = pasted
    if pasted is not None and verb not in _TAKES_A_PASTED_LINE:
        verbs = ", ".join(f"`kvsim {name}`" for name in _TAKES_A_PASTED_LINE)
        raise UserError(f"only {verbs} take a pasted command line after --, not `kvsim {verb}`")
    return module.main(args)


def _about_unknown(parser: argparse.ArgumentParser, word: str) -> str:
    if not word.startswith("-"):
        return f"{word!r} is one argument too many; see {parser.prog} --help"
    flag = word.partition("=")[0]
    known = [name for action in parser._actions for name in action.option_strings]
    return f"there is no flag {flag}{did_you_mean(flag, known)}; see {parser.prog} --help"


def _verb_list() -> str:
    width = max(map(len, VERBS)) + 2
    return (
        "verbs:\n" + "".join(f"  {name:{width}}{what}\n" for name, what in VERBS.items()) + "\n" + _EXAMPLES
    )


def _end_soon_after_interrupt() -> None:
    """After Ctrl-C the main thread has `_SECONDS_TO_UNWIND` to end by itself. It may be deep in a C call that
    does not look (LLVM compiling the engine), so a thread that waits outside the interpreter ends the process
    then, with nothing half-written left behind."""
    import signal
    import threading

    def note(number, frame):
        _interrupts.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch():
        import time

        while os.read(reader, 1) != bytes([signal.SIGINT]):
            pass
        time.sleep(_SECONDS_TO_UNWIND)
        if "kvsim.files" in sys.modules:
            sys.modules["kvsim.files"].remove_unfinished()
        os.write(2, b"kvsim: interrupted\n")
        os._exit(130)

    # C code that cannot pass an exception on prints it (`PyErr_Print`, as NumPy's C interface does when it is
    # imported) or calls it unraisable; an interrupt there is no fault to be shown.
    def show(kind, error, trace):
        if not issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)

    def unraisable(what):
        if not _interrupts:  # what an interrupt left half made may fail when it is taken down
            sys.__unraisablehook__(what)

    sys.excepthook = show
    sys.unraisablehook = unraisable
    threading.Thread(target=watch, daemon=True).start()
