"""`kvsim fit`: does it fit, and how many blocks are there?"""

from __future__ import annotations

import argparse

from kvsim.cli.ask import refuse
from kvsim.errors import UserError
from kvsim.units import GB, parse_bytes, parse_count

_EPILOG = """examples:
  kvsim fit llama-3.1-8b --gpu l4
  kvsim fit llama-3.1-70b --gpu h100 -tp 2 --max-model-len 32K --budget
  kvsim fit gpt-oss-120b --gpu h100 --context 8K,128K --json
  kvsim fit llama-3.1-8b --gpu l4 --max-model-len -1 --emit vllm
  kvsim fit llama-3-70b --gpu h100 -tp 4 --context 4096 --seqs 32       are 32 sequences of 4,096 tokens too many?
  kvsim fit llama-3.1-8b --gpu l40s --trace chat-small                  requests at once, by the lengths of a trace
  kvsim fit llama-3.1-8b --gpu l40s --trace chat-small --seqs 64 --monte-carlo 10k    how often do 64 not fit?
  kvsim fit --layers 32 --kv-heads 8 --head-dim 128 --tokens 8192       KV bytes of any shape
  kvsim fit --worksheet plan.toml                                       a capacity worksheet, step by step
  kvsim fit --gpu rtx-4090 --from-log vllm.log                          a logged start beside what kvsim reckons
  kvsim fit --params 8B,34B,72B --dtype fp16,int4 --gpu-gb 24,48,80     weights alone, by nominal size
  kvsim fit --params 70B --dtype fp16 --gpu h100 --kv-reserve 12GB
  kvsim fit deepseek-v3 --gpu h200 -dp 8 --enable-expert-parallel       each of 8 data parallel ranks
  kvsim fit llama-3.1-8b --gpu h100 --speculative-config '{"method": "eagle", "num_speculative_tokens": 3}'
  kvsim fit llama-3.1-405b --min-gpus                                   how many of each GPU, in which shape
  kvsim fit llama-3.1-70b --min-gpus --price h100=2.5,a100-80gb=1.3
  kvsim fit llama-3-70b --gpu h100 -q gptq-g32 --kv-cache-dtype turboquant_4bit_nc
  kvsim fit llama-3.1-8b --gpu rtx-4090 --engine llama.cpp -q q4_k_m --kv-cache-dtype q8_0 --max-model-len 32K
  kvsim fit qwen3-32b --gpu h100 --engine sglang --mem-fraction-static 0.85 --kv-cache-dtype fp8_e5m2
  kvsim fit llama-2-7b --gpu rtx-4090 --train lora --activations 6GB
  kvsim fit --gpu a100-80gb -- vllm serve Qwen/Qwen2.5-72B-Instruct --quantization fp8

The GPU's memory is what the CUDA runtime reports (`kvsim gpus NAME`). Capitals are binary (8K is 8,192 tokens), small
letters decimal. Exit codes: 0 it fits; 1 it does not; 2 a mistake in the call.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `kvsim fit`."""
    from kvsim.cli import ask, engines
    from kvsim.cli.models import counts
    from kvsim.specs import add_engine_arguments, argument_type

    parser.epilog = _EPILOG
    parser.usage = "kvsim fit MODEL --gpu G [options] [-- vllm serve M ...]"
    add_model_arguments(parser)
    parser.add_argument(
        "--context",
        type=counts,
        metavar="N,...",
        help="lengths of a request to give capacities for (default: 2K up)",
    )
    parser.add_argument(
        "--budget", action="store_true", default=None, help="draw the GPU's memory as a bar of its parts"
    )
    parser.add_argument(
        "--emit",
        choices=("vllm",),
        help="print the vllm serve and vllm bench serve commands of this deployment alone",
    )
    size = {"type": argument_type(parse_bytes), "metavar": "BYTES"}
    rough = add_rough_arguments(parser)
    rough.add_argument("--cuda-context", **size, help="on each GPU, such as 0.8GiB, instead of the 0.51 GiB that CUDA "
                       "takes; beside the engine's share")  # fmt: skip
    ask.add_arguments(parser)
    nominal = parser.add_argument_group("sizes without a name, weights alone")
    nominal.add_argument(
        "--params", metavar="N,...", help="nominal sizes, such as 7B,70B; --dtype takes a list then"
    )
    nominal.add_argument(
        "--gpu-gb", metavar="N,...", help="cards of so many GB (1e9 bytes), instead of --gpu"
    )
    nominal.add_argument("--kv-reserve", **size, help="memory to keep for the KV cache, such as 12GB")
    training = parser.add_argument_group("training instead of serving")
    training.add_argument("--train", choices=("full", "lora", "qlora"), help="what training keeps: of all parameters, "
                          "or of adapters beside frozen weights in 16 or in 4 bits")  # fmt: skip
    training.add_argument("--optimizer", choices=("adam-fp32", "adam-bf16"), help="moments in "
                          "float32, 16 bytes a parameter (default), or in bfloat16, 12")  # fmt: skip
    training.add_argument("--lora-rank", type=int, metavar="R", help="of the adapters (default: 16)")
    training.add_argument("--activations", **size, help="on top, such as 20GB; they follow batch and length, and are "
                          "not reckoned")  # fmt: skip
    fewest = parser.add_argument_group("how many GPUs")
    fewest.add_argument("--min-gpus", action="store_true", default=None, help="the fewest of each GPU, or of --gpu, on "
                        "which it starts, as tensor-parallel groups times pipeline stages")  # fmt: skip
    fewest.add_argument("--price", metavar="P | GPU=P,...", help="of a GPU for an hour: of --gpu, or of each GPU that "
                        "is to be compared; the cheapest comes first")  # fmt: skip
    fewest.add_argument("--gpus-per-node", type=argument_type(parse_count), metavar="N", help="that reach each other "
                        "without a network (default: 8)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_engine_arguments(parser)
    engines.add_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and --gpu, of `fit`, `fix` and `load`."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="catalogue name, config.json, checkpoint folder or GGUF file",
    )
    parser.add_argument("--gpu", help="catalogue name, or a file of nvidia-smi")


def add_rough_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--total and --overhead, of `fit` and `fix`; the group that they are in."""
    from kvsim.specs import argument_type

    rough = parser.add_argument_group("rougher, as worksheets have it")
    rough.add_argument("--total", choices=("cuda", "smi", "sold"), help="whose word for the GPU's "
                       "memory: the CUDA runtime's (default), nvidia-smi's or the seller's")  # fmt: skip
    rough.add_argument("--overhead", type=argument_type(parse_bytes), metavar="BYTES", help="on each GPU, such as "
                       "2GiB, instead of what is reckoned for activations, outside torch and CUDA graphs")  # fmt: skip
    return rough


def main(args: argparse.Namespace) -> int:
    """Print; the exit code."""
    from kvsim import memory
    from kvsim.cli import ask, draft, engines
    from kvsim.cli.run import deployment_of
    from kvsim.report import fit as report

    engines.rename(args)
    ask.paged_only(args)
    if ask.question(args) is not None:
        return ask.main(args)
    if args.min_gpus:
        from kvsim.cli import fewest

        refuse(args, (*_BESIDE_MIN_GPUS, *_OF_TRAINING), "does not go with --min-gpus; leave one of them out")
        return fewest.main(args)
    refuse(args, _OF_MIN_GPUS, "goes with --min-gpus; see --help")
    if args.train is not None:
        return _training(args)
    if args.params is not None:
        return _nominal(args)
    refuse(args, ("gpu_gb", "kv_reserve"), "goes with --params; see --help")
    refuse(args, _OF_TRAINING, "goes with --train; see --help")
    if args.emit:
        refuse(args, ("seqs", "trace"), "changes nothing beside --emit; leave it out")
    if args.trace is None:
        refuse(args, ("columns", "monte_carlo"), "goes with --trace; see --help")
    if args.monte_carlo is None:
        refuse(args, ("seed", "backend"), "goes with --monte-carlo; see --help")
    draft.take(args)
    deployment = with_total(deployment_of(args, None, None), args.total)
    budget = memory.fit(deployment, args.overhead, args.cuda_context)
    deployment = memory.with_fitted_length(deployment, budget)
    facts = report.fit_facts(deployment, budget, args.context)
    if args.emit and deployment.settings.engine != "vllm":
        raise UserError(
            f"--emit vllm prints vLLM's commands, and the engine is {deployment.settings.engine}; leave it out"
        )
    facts = ask.with_concurrency(facts, deployment, budget, args)
    if args.emit:
        import shlex

        for command in (report.serve_command(deployment), report.bench_command(deployment, budget)):
            print(shlex.join(command))
    elif args.json:
        import json

        print(json.dumps(facts, indent=1))
    else:
        print(report.fit_text(facts))
        if args.budget:
            print("", *report.bar_lines(facts), sep="\n")
    return 1 if facts["verdict"] == "does_not_fit" else 0


# Flags of one question only, None where they are not given.
_OF_SERVING = (
    "model", "context", "budget", "emit", "overhead", "cuda_context", "total", "seqs", "trace", "columns",
    "monte_carlo", "seed", "backend",
)  # fmt: skip
_OF_TRAINING = ("optimizer", "lora_rank", "activations")
_OF_MIN_GPUS = ("price", "gpus_per_node")
_BESIDE_MIN_GPUS = (
    "context", "budget", "emit", "params", "gpu_gb", "kv_reserve", "train", "cuda_context", "seqs", "trace", "columns",
    "monte_carlo", "seed", "backend",
)  # fmt: skip


def _training(args: argparse.Namespace) -> int:
    from kvsim.cli.models import sizes
    from kvsim.memory import training
    from kvsim.report import fit as report
    from kvsim.specs import load_gpu, load_model, settings_from_args

    of_serving = (*_OF_SERVING[1:], "gpu_gb", "kv_reserve", *settings_from_args(args))
    refuse(args, of_serving, "is for serving; leave it out beside --train")
    if (args.model is None) == (args.params is None):
        raise UserError("--train needs MODEL or --params N, one of them")
    if args.gpu is None:
        raise UserError("--gpu is missing; `kvsim gpus` lists what there is")
    optimizer, rank = args.optimizer or "adam-fp32", 16 if args.lora_rank is None else args.lora_rank
    if not 1 <= rank <= 4096:
        raise UserError(f"--lora-rank is {rank}; give a whole number from 1 to 4,096")
    if args.model is not None:
        model = load_model(args.model)
        name, terms = model.name, training.training_bytes(model, args.train, optimizer, rank)
    elif args.train == "full" and "," not in args.params:
        ((name, params),) = sizes(args.params).items()
        terms = training.training_terms(params, optimizer)
    else:
        raise UserError("--params is one size, and goes with --train full; adapters need a model's shape")
    if args.activations:
        terms["activations, as given"] = args.activations
    facts = report.training_facts(name, load_gpu(args.gpu), args.train, optimizer, terms)
    if args.json:
        import json

        print(json.dumps(facts, indent=1))
    else:
        print(report.training_text(facts))
    return 0 if facts["fits"] else 1


def with_total(deployment, total: str | None):
    """The deployment on its GPU with the memory that nvidia-smi or the seller tells."""
    import msgspec

    return msgspec.structs.replace(deployment, gpu=gpu_with_total(deployment.gpu, total))


def gpu_with_total(gpu, total: str | None):
    """A GPU with the memory of `--total`."""
    import msgspec

    sizes = {
        "cuda": gpu.total_bytes,
        "smi": gpu.memory_total_bytes,
        "sold": round(gpu.memory_marketed_gb * GB),
    }
    if not sizes[total or "cuda"]:
        raise UserError(f"--total {total}: the catalogue does not know it of {gpu.name}; leave it out")
    return msgspec.structs.replace(gpu, total_bytes=sizes[total or "cuda"])


def _nominal(args: argparse.Namespace) -> int:
    from kvsim.cli.models import formats, sizes
    from kvsim.report import fit as report
    from kvsim.specs import load_gpu, settings_from_args

    settings = settings_from_args(args)
    dtype = settings.pop("dtype", None)
    refuse(
        args,
        (*_OF_SERVING, *settings),
        "goes with a model, and --params is a size without one; leave one of them out",
    )
    refuse(args, _OF_TRAINING, "goes with --train; see --help")
    if (args.gpu is None) == (args.gpu_gb is None):
        raise UserError("--params needs --gpu NAME or --gpu-gb N,..., one of them")
    if args.gpu is not None:
        cards = report.cards_of(load_gpu(args.gpu))
    else:
        cards = [(f"{text.strip()} GB", _gigabytes(text)) for text in args.gpu_gb.split(",")]
    facts = report.nominal_facts(sizes(args.params), formats(dtype), cards, args.kv_reserve or 0)
    if args.json:
        import json

        print(json.dumps(facts, indent=1))
    else:
        print(report.nominal_fit_text(facts))
    return 0 if all(card["fits"] for row in facts for card in row["cards"][-1:]) else 1


def _gigabytes(text: str) -> int:
    try:
        size = parse_bytes(f"{text.strip()}GB")
    except UserError:
        size = 0
    if not 0 < size <= 10**6 * GB:
        raise UserError(f"--gpu-gb {text!r} is no number of GB from 0 to 1,000,000; write 24,48,80")
    return size
