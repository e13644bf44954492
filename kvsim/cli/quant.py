"""`kvsim quant`: what does this KV format cost and save?"""

from __future__ import annotations

import argparse
import os
import re
import sys
from fractions import Fraction
from pathlib import Path

from kvsim import _jit
from kvsim.cli.ask import refuse
from kvsim.errors import UserError, did_you_mean

_EPILOG = """examples:
  kvsim quant                                          formats on generated keys and values
  kvsim quant --profile qwen --formats fp8,q4_0,q4_0-rot,kivi-2 --seed 0,1,2
  kvsim quant cache.safetensors --layout layers,heads,tokens,dim --metrics kl,output,k_sqnr_db
  kvsim quant cache.npz --k K0 --v V0 --q Q0 --layout thd --json
  kvsim quant --model llama-3-70b --gpu h100 -tp 4 --skip-layers 0,1,79      and the tokens that fit
  kvsim quant --model llama-3.1-8b --gpu l40s --trace chat-small --plot out.svg
  kvsim quant 0.0234375 --range -1,1 --bits 8          one number by hand

Formats are those of docs/formats.md, keys and values apart where a / is between them (q8_0/q4_0), and integers for
research: int8|4|3|2-token|channel, then -gN for groups of N, -sym or -zp (integer zero point) instead of a float
minimum, and -rot for a Hadamard rotation: int2-channel-g32/int2-token-g32. docs/quant.md has all of it.
"""
DEFAULT_FORMATS = (
    "bfloat16", "fp8_e4m3", "int8_per_token_head", "q8_0", "turboquant_k8v4", "kivi-4", "nvfp4", "q4_0",
    "int4_per_token_head", "turboquant_4bit_nc", "turboquant_3bit_nc", "kivi-2",
)  # fmt: skip
DEFAULT_TOKENS, DEFAULT_HEADS, DEFAULT_DIM = 2048, 4, 128
TABLES = (".json", ".csv")
_OF_NUMBER = ("range", "bits")
_OF_FILE = ("layout", "k", "v", "q", "see_all")
_GENERATED = ("profile", "tokens", "heads", "head_dim")
_OF_TRACE = ("columns", "rate_scale", "limit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `kvsim quant`."""
    from kvsim.cli.traffic import count
    from kvsim.specs import add_engine_arguments

    parser.epilog = _EPILOG
    parser.usage = "kvsim quant [TENSORS | NUMBER] [options]"
    # `--range -1,1`: argparse takes what begins like a negative number for a value, if no flag looks like one.
    parser._negative_number_matcher = re.compile(r"-[\d.]")
    parser.add_argument(
        "what",
        nargs="?",
        metavar="TENSORS",
        help="a .safetensors or .npz file with K and V, and Q for errors of attention (default: generated ones); or a"
        " number, with --range and --bits",
    )
    parser.add_argument(
        "--formats", metavar="F,...", help="which (default: those of the engine, or a selection)"
    )
    parser.add_argument("--rotate", action="store_true", default=None, help="a Hadamard rotation of heads before each "
                        "format that has none")  # fmt: skip
    parser.add_argument("--skip-layers", metavar="N,...", help="layers that stay at 16 bits, such as 0,1,79; with "
                        "--model, or tensors with an axis of layers")  # fmt: skip
    parser.add_argument("--queries", type=count, metavar="N", help="sampled of a head (default: 256)")
    parser.add_argument("--seed", type=seeds, metavar="N,...", help="of generated heads, some for each; of a file's "
                        "sampled queries (default: 0)")  # fmt: skip
    parser.add_argument("--threads", type=count, metavar="N", help="formats at a time (default: all cores); no result "
                        "depends on it")  # fmt: skip
    made = parser.add_argument_group("generated keys and values")
    made.add_argument("--profile", choices=("none", "llama", "qwen"), help="how far the outlier channels of keys are "
                      "from 0 (default: llama)")  # fmt: skip
    made.add_argument("--tokens", type=count, metavar="N", help=f"of a head (default: {DEFAULT_TOKENS:,})")
    made.add_argument("--heads", type=count, metavar="N", help=f"KV heads (default: {DEFAULT_HEADS})")
    made.add_argument("--head-dim", type=count, metavar="N", help="numbers in a head (default: the model's, "
                      f"or {DEFAULT_DIM})")  # fmt: skip
    own = parser.add_argument_group("your tensors")
    own.add_argument("--layout", metavar="AXES", help="of the arrays, in order: heads,tokens,dim (default), or with "
                     "layers or batch; or in letters, such as thd")  # fmt: skip
    for side in ("k", "v", "q"):
        own.add_argument(
            f"--{side}", metavar="NAME", help=f"which array is {side.upper()} (default: by its name)"
        )
    own.add_argument("--see-all", action="store_true", default=None, help="each query sees all tokens (default: those "
                     "before it, the last query being of the last token)")  # fmt: skip
    served = parser.add_argument_group("capacity and traffic")
    served.add_argument("--model", help="catalogue name, config.json, checkpoint folder or GGUF file")
    served.add_argument("--gpu", help="catalogue name, or a file of nvidia-smi: the tokens that fit")
    served.add_argument("--trace", metavar="FILE", help="a trace, or a bundled one: preemptions and p99 TTFT of that "
                        "deployment with each format")  # fmt: skip
    served.add_argument(
        "--columns", metavar="ROLE=COLUMN,...", help="of --trace, where they are no known ones"
    )
    served.add_argument("--rate-scale", type=float, metavar="X", help="its arrivals X times as fast")
    served.add_argument("--limit", type=count, metavar="N", help="its first N requests")
    number = parser.add_argument_group("one number by hand")
    number.add_argument("--range", metavar="LOW,HIGH", help="what the codes reach over")
    number.add_argument("--bits", type=count, metavar="N", help="of a code, 2 to 16")
    out = parser.add_argument_group("output")
    out.add_argument("--metrics", metavar="NAME,...", help="errors to print: kl, top1, output_k, output_v, output, and "
                     "of keys or values (k_, v_) mse, sqnr_db, max_error, cosine")  # fmt: skip
    out.add_argument("--json", action="store_true", help="print everything as JSON")
    out.add_argument("-o", "--out", metavar="FILE", help="write the table, as .json or .csv")
    out.add_argument("--plot", metavar="FILE", help="bits, or tokens, against error: .png, .svg or .html")
    add_engine_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Print; the exit code."""
    if _is_number(args):
        return _number(args)
    if _jit.is_own_process:
        # Formats share the cores out. Beside them NumPy's own threads, which are started when it is imported and spin
        # while they wait, took three times the processor time.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from kvsim.cli import capacity
    from kvsim.cli.progress import ProgressBar
    from kvsim.cli.warm import say_if_kernels_are_cold
    from kvsim.report import quant as report

    if args.what in ("nan", "inf", "-inf") and (args.range or args.bits):
        raise UserError(f"{args.what} is no finite number; give one that --range has room for")
    refuse(args, _OF_NUMBER, "goes with a number; see --help")
    metrics = _metrics(args.metrics)
    _check_outputs(args)
    deployment = _deployment(args)
    heads = _heads(args, deployment)
    num_layers, asked = _skipped_layers(args, deployment, heads)
    formats, notes = _formats(args, deployment, heads)
    capacities, of_engine = capacity.capacities_of(deployment, formats, asked, args)
    _check_dim(heads, deployment)
    skipped = [
        asked if one is None else set(one.kv_skipped_layers) for one in (of_engine or [None] * len(formats))
    ]

    from kvsim import quality
    from kvsim.run import num_cores

    say_if_kernels_are_cold()
    with ProgressBar("windows", hidden=args.json) as bar:
        found = quality.measure(
            heads, formats, skipped_layers=skipped, threads=args.threads or num_cores(), progress=bar
        )
    rows = []
    for kv, one, layers in zip(formats, found, skipped, strict=True):
        share = len(layers) / num_layers if num_layers and kv.bits < 16 else 0.0
        weighted = 1.0 if heads.layer_of is not None else 1 - share
        rows.append(report.row(kv, one, heads.num_tokens, heads.dim, share, weighted))
    if capacities:
        capacity.add_to(rows, capacities, notes)
        notes += capacity.notes_of_layers(formats, of_engine, asked)
    report.mark_pareto(rows)
    notes += report.notes_of_overflow(rows)
    facts = _facts(args, heads, deployment, rows, notes)
    if not heads.query_heads:
        metrics = metrics or report.WITHOUT_QUERIES
    _print(args, facts, metrics or report.MAIN_METRICS)
    return 1 if capacities and not any(row["tokens"] for row in rows) else 0


# ---------------------------------------------------------------- what is asked


def seeds(text: str) -> tuple[int, ...]:
    """`"0,1,2"`, for a parser."""
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no seed, nor seeds such as 0,1,2")
    return tuple(dict.fromkeys(map(int, text.split(","))))


def _is_number(args: argparse.Namespace) -> bool:
    return (
        args.what is not None
        and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?", args.what) is not None
    )


def _number(args: argparse.Namespace) -> int:
    from kvsim.report import quant as report
    from kvsim.report.table import width_of

    for name, value in vars(args).items():
        if name not in (*_OF_NUMBER, "what", "json") and value not in (None, False):
            raise UserError(f"--{name.replace('_', '-')} is of formats; leave it out beside a number")
    if args.range is None or args.bits is None:
        raise UserError(
            f"{args.what} is a number, which needs --range LOW,HIGH and --bits N; name a file for formats"
        )
    try:
        low, high = map(Fraction, args.range.split(","))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--range {args.range!r} is not two numbers such as -1,1") from None
    x = Fraction(args.what)
    if not low < high:
        raise UserError(f"--range {args.range}: the second number has to be larger than the first")
    if not low <= x <= high:
        nearest = low if x < low else high
        raise UserError(
            f"{args.what} is outside --range {args.range}, so its code would be that of {float(nearest):g}; give a"
            " wider range"
        )
    if not 2 <= args.bits <= 16:
        raise UserError(f"--bits is {args.bits}; give 2 to 16")
    if low > 0 or high < 0:
        raise UserError(f"--range {args.range} has no 0 in it, which needs a code of its own; widen it to 0")
    facts = report.number_facts(x, low, high, args.bits)
    if args.json:
        import json

        print(json.dumps(facts, indent=1))
    else:
        print(report.number_text(facts, width_of(sys.stdout)))
    return 0


def _metrics(text: str | None) -> tuple[str, ...]:
    from kvsim.report.quant import METRICS

    if text is None:
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in METRICS:
            raise UserError(f"--metrics: there is no {name!r}; there are {', '.join(METRICS)}")
    return names


def _check_outputs(args: argparse.Namespace) -> None:
    from kvsim.files import check_file
    from kvsim.report.plot import check_picture_file

    if args.out is not None:
        check_file(args.out, TABLES, "-o")
    if args.plot is not None:
        check_picture_file(args.plot, "--plot")


def _deployment(args: argparse.Namespace):
    """The deployment whose capacity is asked for, None without."""
    from kvsim.cli.run import deployment_of
    from kvsim.specs import check_simulated, settings_from_args, warnings_from_args

    settings = settings_from_args(args)
    if "kv_cache_dtype" in settings:
        raise UserError("--kv-cache-dtype is one of the table's formats; name them by --formats")
    if args.trace is None:
        refuse(args, _OF_TRACE, "goes with --trace; see --help")
    flag = "--trace" if args.trace is not None else None
    if flag is None and (settings or warnings_from_args(args)):
        flag = "--" + next(iter(settings), "engine settings").replace("_", "-")
    given = {"--model": args.model, "--gpu": args.gpu}
    if not any(given.values()) and flag is None:
        return None
    for name, value in given.items():
        if value is None:
            raise UserError(
                f"{name} is missing: {flag or next(n for n, v in given.items() if v)} is of a deployment, which has"
                " --model and --gpu"
            )
    deployment = deployment_of(args, None, None)
    if any(group.kind == "mla" for group in deployment.model.layer_groups):
        raise UserError(
            f"{deployment.model.name} keeps latent vectors instead of keys and values, which are not measured here;"
            " `kvsim fit --kv-cache-dtype` has their sizes"
        )
    if args.trace is not None:
        check_simulated(deployment)
    return deployment


def _heads(args: argparse.Namespace, deployment):
    """Where keys and values come from."""
    from kvsim import quality

    num_queries, own_seeds = args.queries or quality.NUM_QUERIES, args.seed or (0,)
    if args.what is not None:
        from kvsim.tensors import load_tensors

        refuse(args, _GENERATED, "is of generated keys and values; leave it out beside a file")
        if len(own_seeds) > 1:
            raise UserError("--seed takes one number beside a file: it samples queries")
        names = {side: getattr(args, side) for side in "kvq" if getattr(args, side) is not None}
        tensors = load_tensors(args.what, args.layout or "htd", names)
        if tensors.q is None:
            refuse(
                args,
                ("queries", "see_all", "seed"),
                f"is of queries, and {args.what} has none; name them by --q",
            )
        return quality.of_file(Path(args.what).name, tensors, num_queries, own_seeds[0], not args.see_all)
    refuse(args, _OF_FILE, "goes with a file of tensors; see --help")
    dim = args.head_dim or _head_dim(deployment) or DEFAULT_DIM
    tokens = args.tokens or DEFAULT_TOKENS
    if dim % 32:
        whose = f"--head-dim is {dim}" if args.head_dim else f"{deployment.model.name} has heads of {dim}"
        raise UserError(
            f"{whose}, and keys are generated in heads of 32, 64, 96, ... numbers; give a file of tensors"
        )
    if tokens < 2:
        raise UserError(f"--tokens is {tokens}; give two or more")
    _check_memory(tokens, dim)
    return quality.generated(
        tokens, args.heads or DEFAULT_HEADS, dim, args.profile or "llama", own_seeds, num_queries
    )


def _check_memory(tokens: int, dim: int) -> None:
    """UserError where one generated head has no room in this machine's memory."""
    from kvsim.quality import GENERATED_BYTES
    from kvsim.units import format_gib

    free, need = _free_bytes(), GENERATED_BYTES * tokens * dim
    if free is not None and need > free:
        most = free // (GENERATED_BYTES * dim)
        raise UserError(
            f"--tokens {tokens:,}: a generated head of so many tokens x {dim} takes {format_gib(need)} of memory, and"
            f" {format_gib(free)} are free; lower --tokens, to about {most:,}"
        )


def _free_bytes() -> int | None:
    """Memory that can be had without swapping, None where the system does not say."""
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None


def _head_dim(deployment) -> int | None:
    if deployment is None:
        return None
    return next((group.head_dim for group in deployment.model.layer_groups if group.head_dim), None)


def _check_dim(heads, deployment) -> None:
    dim = _head_dim(deployment)
    if dim is not None and dim != heads.dim:
        raise UserError(
            f"the heads of {heads.name} have {heads.dim} numbers and those of {deployment.model.name} {dim}; give"
            " tensors of that model"
        )


def _skipped_layers(args: argparse.Namespace, deployment, heads) -> tuple[int, set[int]]:
    """How many layers there are, 0 if that is not known, and those that stay at 16 bits."""
    from kvsim.specs import check_skipped_layers

    num_layers = 0 if heads.layer_of is None else heads.layer_of[-1] + 1
    if deployment is not None:
        of_model = deployment.model.num_hidden_layers
        if num_layers not in (0, of_model):
            raise UserError(
                f"{heads.name} has {num_layers} layers and {deployment.model.name} {of_model}; give all of them, or"
                " those of one layer"
            )
        num_layers = of_model
    if args.skip_layers is None:
        return num_layers, set()
    if not num_layers:
        raise UserError("--skip-layers needs --model and --gpu, or tensors whose --layout has layers")
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", args.skip_layers):
        raise UserError(
            f"--skip-layers {args.skip_layers!r} is no list of layers such as 0,1,{num_layers - 1}"
        )
    layers = set(map(int, args.skip_layers.split(",")))
    if max(layers) >= num_layers:
        raise UserError(f"--skip-layers has {max(layers)}, and the layers are 0 to {num_layers - 1}")
    if deployment is not None:
        check_skipped_layers(deployment.model, deployment.settings.engine, tuple(layers))
    return num_layers, layers


def _formats(args: argparse.Namespace, deployment, heads) -> tuple[list, list[str]]:
    """The formats of the table, and what is to be said of those left out."""
    from kvsim.cli import capacity
    from kvsim.formats import KV_FORMATS, rotated
    from kvsim.specs import Impossible

    engine = deployment.settings.engine if deployment else "vllm"
    if args.formats is not None:
        formats = [_format(name.strip(), engine, deployment) for name in args.formats.split(",")]
    elif deployment is None:
        formats = [KV_FORMATS[name] for name in DEFAULT_FORMATS]
    else:
        formats = [
            kv for kv in KV_FORMATS.values()
            if engine in kv.engines and (kv.bits < 16 or kv == deployment.replace(kv_cache_dtype="auto").kv_format)
            and not isinstance(capacity.with_format(deployment, kv, set()), Impossible)
        ]  # fmt: skip
    if args.rotate:
        formats = [kv if kv.k.codes == "float" else rotated(kv) for kv in formats]
    formats = list({kv.name: kv for kv in formats}.values())
    why = {kv.name: _why_not(kv, heads.dim) for kv in formats}
    left_out = {name: reason for name, reason in why.items() if reason}
    if left_out and args.formats is not None:
        name, reason = next(iter(left_out.items()))
        raise UserError(f"--formats: {name} is not executed: {reason}; leave it out")
    kept = [kv for kv in formats if not why[kv.name]]
    if not kept:
        raise UserError(
            f"heads of {heads.dim} numbers are quantized by no format of engine {engine}; give --formats"
        )
    return kept, [f"{name} is left out: {reason}" for name, reason in left_out.items()]


def _format(name: str, engine: str, deployment):
    from kvsim.formats import KV_FORMATS, kv_format

    if name == "auto":
        name = deployment.dtype if deployment else "bfloat16"
    for whose in (engine, None):  # None: another engine's, or of research
        try:
            return kv_format(name, whose)
        except UserError as error:
            reason = str(error)
    if "not modelled" in reason:
        hint = did_you_mean(name, (*KV_FORMATS, "fp8")) or "; kvsim quant --help says what they are called"
        reason = f"there is no format {name!r}{hint}"
    raise UserError(f"--formats: {reason}")


def _why_not(kv, dim: int) -> str | None:
    """Why a format cannot quantize heads of so many numbers."""
    from kvsim.kernels.quant.of_format import refusal

    if reason := refusal(kv):
        return reason
    for side in (kv.k, kv.v):
        if side.axis == "token" and side.group and dim % side.group:
            return f"it groups {side.group} numbers of a head, and heads of {dim} are no multiple of that"
    if any(side.rotation for side in (kv.k, kv.v)) and dim & (dim - 1):
        return f"it rotates heads of a power of two, and these have {dim} numbers"
    if kv.name.startswith("turboquant") and dim & (dim - 1):
        return f"it has kernels for heads of a power of two, and these have {dim} numbers"
    return None


# ---------------------------------------------------------------- output


def _facts(args: argparse.Namespace, heads, deployment, rows: list[dict], notes: list[str]) -> dict:
    from kvsim.report.fit import gpus_text
    from kvsim.report.words import count

    kv_heads, query_heads = count(heads.num_heads, "KV head"), count(heads.query_heads, "query head")
    queries_each = f"{heads.num_queries:,} {'query' if heads.num_queries == 1 else 'queries'}"
    queries = f", {query_heads} with {queries_each} each" if heads.query_heads else ""
    where = None
    if deployment is not None:
        gpus = gpus_text(deployment.num_gpus, deployment.gpu.name)
        where = f"{deployment.model.name} on {gpus}, engine {deployment.settings.engine}"
        where += f", trace {args.trace}" if args.trace is not None else ""
    if not heads.query_heads:
        notes = [*notes, "without queries there are no errors of attention; give Q (--q)"]
    if args.trace is None:
        for row in rows:
            for name in ("verdict", "num_preemptions", "p99_ttft_ms"):
                row.pop(name, None)
    return {
        "measured": f"{heads.name}: {kv_heads} of {count(heads.num_tokens, 'token')} x {heads.dim}{queries}",
        "deployment": where,
        "tokens": heads.num_tokens,
        "kv_heads": heads.num_heads,
        "query_heads": heads.query_heads,
        "queries": heads.num_queries,
        "head_dim": heads.dim,
        "formats": rows,
        "notes": notes,
    }


def _print(args: argparse.Namespace, facts: dict, metrics: tuple[str, ...]) -> None:
    from kvsim.report import quant as report

    written = []
    if args.out is not None:
        _write(facts, Path(args.out))
        written.append(args.out)
    if args.plot is not None:
        from kvsim.report.quant_plot import save_plot

        save_plot(facts, args.plot)
        written.append(args.plot)
    if args.json:
        import json

        print(json.dumps(report.plain(facts), indent=1))
    else:
        from kvsim.report.table import print_text, width_of

        print_text(report.text(facts, metrics, width_of(sys.stdout)))
        for path in written:
            print(f"wrote {path}")


def _write(facts: dict, path: Path) -> None:
    import csv
    import json

    from kvsim.files import atomic
    from kvsim.report import quant as report

    with atomic(path) as temporary:
        if path.suffix.lower() == ".json":
            temporary.write_text(json.dumps(report.plain(facts), indent=1) + "\n")
            return
        simple = [name for name, value in facts["formats"][0].items() if not isinstance(value, dict)]
        names = [name for name in simple if name != "attention"]
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*names, *report.METRICS])
            for row in facts["formats"]:
                writer.writerow(
                    [*(row[name] for name in names), *(report.value_of(row, m) for m in report.METRICS)]
                )
