"""`kvsim run`: what happens to this traffic on this deployment?"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time

from kvsim.errors import UserError

DEFAULT_TRACE = "azure-conv-like"
DEFAULT_MODEL = "llama-3.1-8b"
DEFAULT_GPU = "l40s"  # busy: the pool fills at the peaks of the default trace, and empties again

_EPILOG = """examples:
  kvsim run
  kvsim run azure.csv.gz --model llama-3.1-8b --gpu a100-80gb --max-num-seqs 128 -o out
  kvsim run mooncake.jsonl --gpu h100 -- vllm serve meta-llama/Llama-3.1-8B --max-model-len 32k
  kvsim run chat-small --deadline 30 --goodput ttft:500 tpot:50 --require 'goodput>=0.99'
  kvsim run chat-small --gpu l4 --max-model-len 8192 --allocator contiguous
  kvsim run chat-small --gpu l4 --max-model-len 8192 --record blocks -o paged    # then: kvsim plot paged --what map
  kvsim run azure-conv-like --replicas 4 --router random --rate-scale 4
  kvsim run --case c02.case.json.gz --step-log out.jsonl.gz

exit codes: 0 answered; 1 the answer is no (it does not start, or --require is missed); 2 a mistake in the call
or the input; 130 interrupted. An option may be left out: what GPU memory then decides is printed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `kvsim run`."""
    from kvsim.cli.traffic import add_reading_arguments, add_traffic_arguments, count
    from kvsim.specs import add_engine_arguments

    parser.epilog = _EPILOG
    parser.usage = "kvsim run [TRACE ...] [--model M] [--gpu G] [options] [-- vllm serve M ...]"
    parser.add_argument(
        "trace",
        nargs="*",
        metavar="TRACE",
        help=f"file, several in order, - or a bundled name (default: {DEFAULT_TRACE})",
    )
    parser.add_argument(
        "--model",
        help=f"catalogue name, config.json, checkpoint folder or GGUF file (default: {DEFAULT_MODEL})",
    )
    parser.add_argument("--gpu", help=f"catalogue name, or a file of nvidia-smi (default: {DEFAULT_GPU})")

    out = parser.add_argument_group("output")
    out.add_argument(
        "-o", "--out", metavar="DIR", help="write summary, requests, events, timeline and a picture here"
    )
    out.add_argument("--json", action="store_true", help="print the summary as JSON")
    out.add_argument("--quiet", action="store_true", help="print nothing but errors")
    out.add_argument(
        "--record",
        choices=("summary", "requests", "events", "blocks"),
        help="how much to keep of it; blocks: with paging, where each request's blocks were as well, for a map of the "
        "memory (slower)",
    )
    out.add_argument(
        "--bin", type=float, metavar="SECONDS", help="width of a timeline bin (default: about 1,000 bins)"
    )
    out.add_argument(
        "--check", action="store_true", help="check the invariants of the pool after every step and arrival"
    )
    out.add_argument(
        "--step-log", metavar="FILE", help="every schedule() call as a JSON line (.jsonl or .jsonl.gz)"
    )

    add_traffic_arguments(parser)
    parser.add_argument(
        "--max-concurrency", type=count, metavar="N", help="closed loop: N requests in flight at most"
    )
    fleet = add_fleet_arguments(parser)
    fleet.add_argument("--threads", type=count, metavar="N", help="replicas simulated at a time (default: all cores); "
                       "no result depends on it")  # fmt: skip
    add_reading_arguments(parser)

    clock = add_clock_arguments(parser)
    clock.add_argument(
        "--require", metavar="goodput>=X", help="exit 1 unless that share of requests meets --goodput"
    )
    clock.add_argument("--case", metavar="FILE", help="replay a reference case; implies --strict")
    add_engine_arguments(parser)


def add_fleet_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--replicas, --router and --router-delay."""
    from kvsim.cli.traffic import count
    from kvsim.routing import ROUTERS

    fleet = parser.add_argument_group("a fleet")
    fleet.add_argument(
        "--replicas",
        type=count,
        default=1,
        metavar="N",
        help="that many copies of the deployment, each with its own pool and queue (default: 1)",
    )
    fleet.add_argument(
        "--router",
        choices=ROUTERS,
        default="round-robin",
        help="who gets a request: round-robin (default), random (by --seed) or prefix-affinity (by a hash of the first "
        "prefix id that not all requests share; without prefix ids by conversation). A follow-up turn goes where "
        "its conversation began. These are stateless: they split the trace beforehand, and replicas use all cores. "
        "least-requests and least-kv (used blocks) look at the replicas and advance them to each arrival, on one core",
    )
    fleet.add_argument(
        "--router-delay",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="least-requests and least-kv look every so many seconds, not at every request (default: 0)",
    )
    return fleet


def add_clock_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--step-time, --deadline, --until, --strict and --goodput."""
    clock = parser.add_argument_group("clock and outcomes")
    clock.add_argument("--step-time", metavar="A0,A1,A2", help="a step of n tokens over ctx context tokens takes "
                       "A0 + A1*n + A2*ctx seconds (default: a roofline of the model on the GPU)")  # fmt: skip
    clock.add_argument(
        "--deadline", type=float, metavar="SECONDS", help="a request is given up that long after arrival"
    )
    clock.add_argument("--until", type=float, metavar="SECONDS", help="end the run then")
    clock.add_argument("--strict", action="store_true", help="block or livelock as the engine would, instead of "
                       "dropping what can never fit; ends with a stall report")  # fmt: skip
    clock.add_argument("--goodput", nargs="+", metavar="NAME:MS", help="objectives: ttft:MS tpot:MS e2el:MS")
    return clock


def main(args: argparse.Namespace) -> int:
    """Replay, print, write; the exit code."""
    if args.case:
        from kvsim.cli.case import main as run_case

        _refuse_beside_case(args)
        return run_case(args)
    from kvsim.specs import check_simulated

    required = _requirement(args)  # before anything slow
    goodput = goodput_of(args.goodput)
    step_time = step_time_of(args.step_time)
    _check_out(args.out)
    deployment = deployment_of(args, DEFAULT_MODEL, DEFAULT_GPU)
    check_simulated(deployment)  # before the trace is read
    load_started = time.perf_counter()
    trace = _trace(args)
    load_s = time.perf_counter() - load_started
    warn_of_equal_priorities(trace, deployment)

    from kvsim import memory
    from kvsim.cli.progress import ProgressBar
    from kvsim.cli.warm import say_if_cold
    from kvsim.routing import STATEFUL
    from kvsim.run import simulate

    if memory.fit(deployment).failure is None:
        say_if_cold(looks=args.replicas > 1 and args.router in STATEFUL)
    with (
        _StepLogFile(args.step_log) as on_step,
        ProgressBar("requests", hidden=args.quiet or args.json) as bar,
    ):
        result = simulate(
            trace,
            deployment,
            step_time=step_time,
            record=args.record,
            bin_s=args.bin,
            deadline_s=args.deadline,
            until_s=args.until,
            max_concurrency=args.max_concurrency,
            strict=args.strict,
            check=args.check,
            goodput=goodput,
            replicas=args.replicas,
            router=args.router,
            router_delay_s=args.router_delay,
            threads=args.threads,
            seed=args.seed,
            command=shlex.join(["kvsim", *sys.argv[1:]]),
            load_s=load_s,
            progress=bar and (lambda progress: bar(progress.num_ended, progress.num_requests)),
            on_step=on_step,
        )
    paths = result.save(args.out) if args.out else []
    summary = result.summary()
    if args.json:
        import json

        print(json.dumps(summary, indent=1))
    elif not args.quiet:
        from kvsim.report.table import print_result

        print_result(result, folder=args.out)
        for path in paths:
            print(f"wrote {path}")
    return _exit_code(args, summary, required)


# What a case says itself, or has none of.
_NOT_BESIDE_CASE = (
    "trace", "model", "gpu", "pasted", "out", "record", "bin", "check", "max_concurrency", "step_time",
    "deadline", "until", "goodput", "require", "rate", "rate_scale", "limit", "threads",
)  # fmt: skip


def _refuse_beside_case(args: argparse.Namespace) -> None:
    from kvsim import specs

    given = [name for name in _NOT_BESIDE_CASE if getattr(args, name) not in (None, False, [])]
    given += ["replicas"] if args.replicas > 1 else []
    for name in (*given, *specs.settings_from_args(args)):
        word = {"trace": "TRACE", "pasted": "the pasted command line"}.get(
            name, "--" + name.replace("_", "-")
        )
        raise UserError(f"--case brings its own traffic, settings and clock; leave {word} out")


def warn_of_equal_priorities(trace, deployment) -> None:
    is_by_priority = deployment.settings.scheduling_policy == "priority"
    if (
        is_by_priority
        and len(trace)
        and (trace.priority is None or (trace.priority == trace.priority[0]).all())
    ):
        print(
            "kvsim: warning: the requests have no different priorities, so scheduling_policy priority ranks"
            " them by arrival",
            file=sys.stderr,
        )


def _check_out(out: str | None) -> None:
    if out == "":
        raise UserError("--out is empty; give a folder")
    if out is not None and os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"--out {out} is a file; give a folder")


def _exit_code(args, summary: dict, required: float | None) -> int:
    if summary["verdict"] == "does_not_start":
        if args.quiet or args.json:
            print(f"kvsim: {summary['failure']['sentence']}", file=sys.stderr)
        return 1
    if required is not None and summary["goodput"]["fraction"] < required:
        print(
            f"kvsim: goodput {summary['goodput']['fraction']:.4f} is below the required {required:g}",
            file=sys.stderr,
        )
        return 1
    return 0


def deployment_of(args: argparse.Namespace, default_model: str | None, default_gpu: str | None):
    """The deployment that the flags and a pasted command line ask for, its warnings printed. The defaults are what it
    is without --model and --gpu; None: that is a mistake."""
    from kvsim import specs

    model, settings = asked_of(args)
    if args.pasted is not None and args.gpu is None:
        raise UserError("a pasted command line does not say which GPU; give --gpu NAME before the --")
    for flag, value in (("MODEL", model or default_model), ("--gpu", args.gpu or default_gpu)):
        if value is None:
            raise UserError(f"{flag} is missing; `kvsim {flag.strip('-').lower()}s` lists what there is")
    return specs.deployment(model or default_model, gpu=args.gpu or default_gpu, **settings)


def asked_of(args: argparse.Namespace) -> tuple[str | None, dict[str, object]]:
    """Model (None: not named) and engine settings of the flags and a pasted command line, its warnings printed."""
    from kvsim import specs

    model, settings, warnings = args.model, specs.settings_from_args(args), specs.warnings_from_args(args)
    if args.pasted is not None:
        pasted_model, pasted_settings, pasted_warnings = specs.parse_vllm_serve(args.pasted)
        model = model or pasted_model
        settings = {**pasted_settings, **settings}
        warnings += pasted_warnings
        if model is None:
            raise UserError(
                "the pasted command line names no model; write it after `vllm serve` or give --model"
            )
    for warning in warnings:
        print(f"kvsim: warning: {warning}", file=sys.stderr)
    if getattr(args, "speculative_config", None) is not None:
        settings["speculative_config"] = args.speculative_config
    return model, settings


def _trace(args):
    from kvsim.cli.traffic import load

    if "" in args.trace:
        raise UserError(f"TRACE is empty; name a file, or leave it out for {DEFAULT_TRACE}")
    return load(args.trace or DEFAULT_TRACE, args)


def step_time_of(text: str | None) -> tuple[float, float, float] | None:
    if text is None:
        return None
    try:
        a0, a1, a2 = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--step-time {text!r} is not three numbers of seconds such as 0.0065,3e-5,3e-8"
        ) from None
    if not all(0 <= a < 1e6 for a in (a0, a1, a2)):
        raise UserError(f"--step-time {text!r} has a number that is negative or not finite; give seconds")
    return a0, a1, a2


def goodput_of(words: list[str] | None) -> dict[str, float] | None:
    from kvsim.metrics import OBJECTIVES

    if words is None:
        return None
    objectives = {}
    for word in words:
        name, _, limit = word.partition(":")
        try:
            objectives[name] = float(limit)
        except ValueError:
            raise UserError(f"--goodput {word!r} is not NAME:MS, such as ttft:500") from None
        if name not in OBJECTIVES or not objectives[name] > 0:
            raise UserError(
                f"--goodput {word!r}: the name is one of {', '.join(OBJECTIVES)} and the ms are above 0"
            )
    return objectives


def _requirement(args) -> float | None:
    if args.require is None:
        return None
    match = re.fullmatch(r"\s*goodput\s*>=\s*([0-9.]+)\s*", args.require)
    if match is None or not 0 <= float(match[1]) <= 1:
        raise UserError(f"--require {args.require!r} is not of the form goodput>=0.99")
    if not args.goodput:
        raise UserError("--require needs the objectives that --goodput gives, such as --goodput ttft:500")
    return float(match[1])


class _StepLogFile:
    """Where `--step-log` goes; the file appears only when the run is over."""

    def __init__(self, path: str | None):
        self.path = path

    def __enter__(self):
        if self.path is None:
            return None
        from kvsim.steplog import LogFile, StepLog

        self.file = LogFile(self.path)
        return StepLog(self.file.__enter__().write)

    def __exit__(self, *error):
        if self.path is not None:
            self.file.__exit__(*error)
