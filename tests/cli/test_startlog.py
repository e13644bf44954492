"""`kvsim fit --from-log`: the lines of engines, read, and what they come to beside kvsim's numbers."""

import json
import shlex
import subprocess
import sys

import pytest

from kvsim.cli import main
from kvsim.memory.startlog import read_log
from kvsim.units import GIB
from tests.cli.test_fit import facts_of, mistake

# A start of vLLM 0.19 with debug lines; its numbers were published (llm-d-planner, Llama-3.1-8B with fp8 KV on H100).
V1 = """\
INFO 11-20 10:00:00 [api_server.py:1892] vLLM API server version 0.19.0
INFO 11-20 10:00:00 [utils.py:233] non-default args: {'model_tag': 'meta-llama/Llama-3.1-8B-Instruct', \
'max_model_len': 8192, 'gpu_memory_utilization': 0.95}
\x1b[0;36m(EngineCore_DP0 pid=71)\x1b[0;0m INFO 11-20 10:00:09 [core.py:77] Initializing a V1 LLM engine (v0.19.0) \
with config: model='meta-llama/Llama-3.1-8B-Instruct', speculative_config=None, tokenizer='other', \
dtype=torch.bfloat16, max_seq_len=8192, load_format=auto, tensor_parallel_size=1, pipeline_parallel_size=1, \
quantization=None, enforce_eager=False, kv_cache_dtype=fp8, device_config=cuda, served_model_name=mine
INFO 11-20 10:00:10 [scheduler.py:216] Chunked prefill is enabled with max_num_batched_tokens=8192.
DEBUG 11-20 10:00:12 [gpu_worker.py:250] Initial free memory: 78.68 GiB; Requested memory: 0.95 (util), 75.23 GiB
INFO 11-20 10:00:22 [gpu_model_runner.py:4113] Model loading took 14.99 GiB memory and 3.9 seconds
DEBUG 11-20 10:00:40 [gpu_worker.py:333] Memory profiling takes 18.10 seconds. Total non KV cache memory: 17.13GiB; \
torch peak memory increase: 1.89GiB; non-torch forward increase memory: 0.25GiB; weights memory: 14.99GiB.
INFO 11-20 10:00:40 [gpu_worker.py:355] Available KV cache memory: 58.11 GiB
INFO 11-20 10:00:41 [kv_cache_utils.py:1287] GPU KV cache size: 952,032 tokens
INFO 11-20 10:00:41 [kv_cache_utils.py:1292] Maximum concurrency for 8,192 tokens per request: 116.21x
INFO 11-20 10:00:49 [gpu_model_runner.py:5051] Graph capturing finished in 8 secs, took 0.91 GiB
INFO 11-20 10:01:49 [loggers.py:127] Engine 000: GPU KV cache usage: 0.0%
"""
# V0: vLLM issue 10517, an RTX 3090 at 20,000 tokens.
V0 = """\
INFO 11-20 10:00:00 llm_engine.py:249] Initializing an LLM engine (v0.6.4.post1) with config: \
model='/models/Llama-3.1-8B/', speculative_config=None, dtype=torch.bfloat16, max_seq_len=20000, \
tensor_parallel_size=1, quantization=None, enforce_eager=True, kv_cache_dtype=auto
INFO 11-20 10:00:10 model_runner.py:1071] Loading model weights took 14.9888 GB
INFO 11-20 10:00:12 worker.py:232] Memory profiling results: total_gpu_memory=23.58GiB initial_memory_usage=15.44GiB \
peak_torch_memory=17.06GiB memory_usage_post_profile=15.54GiB non_torch_memory=0.35GiB kv_cache_size=3.81GiB \
gpu_memory_utilization=0.90
INFO 11-20 10:00:12 gpu_executor.py:113] # GPU blocks: 1952, # CPU blocks: 2048
INFO 11-20 10:00:12 gpu_executor.py:117] Maximum concurrency for 20000 tokens per request: 1.56x
"""
V0_LATER = """\
INFO x [api_server.py] args: Namespace(host=None, model='meta-llama/Llama-3.1-8B', dtype='auto', max_model_len=None, \
max_num_seqs=64, gpu_memory_utilization=0.9, quantization=None, enforce_eager=False)
INFO x worker.py:267] the current vLLM instance can use total_gpu_memory (79.22GiB) x gpu_memory_utilization (0.90) = \
71.29GiB
INFO x worker.py:267] model weights take 14.96GiB; non_torch_memory takes 1.79GiB; PyTorch activation peak \
memory takes 1.26GiB; the rest of the memory reserved for KV Cache is 53.29GiB.
INFO x executor_base.py:112] # cuda blocks: 27284, # CPU blocks: 2048
"""
# A public run of vLLM 0.19 on an RTX 4090 (LLMServingSim): 2,588 blocks, nothing else of memory.
RUN = {
    "vllm_version": "0.19.0",
    "engine_kwargs": {
        "model": "meta-llama/Llama-3.1-8B", "max_num_seqs": 256, "max_num_batched_tokens": 2048,
        "max_model_len": 32768, "dtype": "bfloat16", "kv_cache_dtype": "auto", "enable_expert_parallel": False,
    },
    "kv_cache": {
        "num_gpu_blocks": 2588, "num_cpu_blocks": None, "block_size": 16, "gpu_memory_utilization": 0.9,
        "num_kv_tokens": 41408,
    },
    "hardware": {"device_name": "NVIDIA GeForce RTX 4090", "device_total_memory_bytes": 25250627584},
}  # fmt: skip
SGLANG = """\
[2026-01-01 00:00:00] server_args=ServerArgs(model_path='Qwen/Qwen3-0.6B', tokenizer_path='x', dtype='auto', \
kv_cache_dtype='auto', mem_fraction_static=0.85, tp_size=1, context_length=None)
[2026-01-01 00:00:05] Load weight end. type=Qwen3ForCausalLM, dtype=torch.bfloat16, avail mem=14.1 GB, \
mem usage=1.12 GB.
[2026-01-01 00:00:06] KV Cache is allocated. #tokens: 98304, K size: 5.25 GB, V size: 5.25 GB
[2026-01-01 00:00:09] max_total_num_tokens=98304, chunked_prefill_size=2048, context_len=40960
"""
LLAMA_CPP = """\
print_info: n_layer          = 32
print_info: n_embd_k_gqa     = 1024
print_info: n_embd_v_gqa     = 1024
print_info: general.name     = Llama 3.1 8B
llama_context: n_ctx         = 4096
llama_kv_cache: size =  272.00 MiB (  4096 cells,  32 layers,  1/1 seqs), K (q8_0):  136.00 MiB, V (q8_0):  136.00 MiB
"""


def written(folder, text, name="start.log"):
    path = folder / name
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def rows_of(facts):
    return {row["quantity"]: row for row in facts["rows"]}


def test_every_line_of_a_v1_start_is_read(tmp_path):
    log = read_log(written(tmp_path, V1))
    record = log.record
    wanted = {
        "version": "0.19.0", "model": "meta-llama/Llama-3.1-8B-Instruct", "util": 0.95, "max_model_len": 8192,
        "dtype": "bfloat16", "tp": 1, "pp": 1, "kv_dtype": "fp8", "enforce_eager": "False",
        "max_num_batched_tokens": 8192, "free_at_start_gib": 78.68, "weights_gib": 14.99,
        "activation_peak_gib": 1.89, "non_torch_gib": 0.25, "kv_avail_gib": 58.11, "kv_tokens": 952032,
        "max_concurrency": 116.21, "cuda_graph_gib": 0.91,
    }  # fmt: skip
    assert {name: record[name] for name in wanted} == wanted
    assert record["weight_quant"] == "" and record["max_num_seqs"] is None and log.notes == ()
    assert (log.lines["max_model_len"], log.lines["kv_dtype"], log.lines["kv_tokens"]) == (2, 3, 9)


def test_a_start_that_agrees(tmp_path, capsys):
    facts = facts_of(capsys, "--from-log", written(tmp_path, V1), "--gpu", "h100")
    rows = rows_of(facts)
    assert rows["kv_avail_gib"]["logged"] == 58.11 and abs(rows["kv_avail_gib"]["error_percent"]) < 0.1
    assert (
        abs(rows["kv_tokens"]["error_percent"]) < 0.1
        and abs(rows["activation_peak_gib"]["error_percent"]) < 0.5
    )
    assert facts["gap"]["untold"] == [] and facts["reasons"] == []
    terms = {term["term"]: term["more_bytes"] for term in facts["gap"]["terms"]}
    assert set(terms) == {"weights", "activation peak", "outside torch"}  # graphs are budgeted from 0.21 on
    assert facts["gap"]["more_bytes"] == sum(terms.values()) + facts["gap"]["rest_bytes"]
    assert main(["fit", "--from-log", str(tmp_path / "start.log"), "--gpu", "h100"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("AGREES: meta-llama/Llama-3.1-8B-Instruct under vllm 0.19.0, KV cache within 1 %")
    command = next(line for line in page.splitlines() if line.startswith("the whole budget: kvsim "))
    words = shlex.split(command.removeprefix("the whole budget: kvsim "))
    assert main([*words, "--json"]) == 0
    budget = json.loads(capsys.readouterr().out)
    assert budget["kv_cache"]["bytes"] / GIB == rows["kv_avail_gib"]["predicted"]


def test_the_lines_that_kvsim_says_vllm_will_say_are_read_back(tmp_path, capsys):
    words = ["llama-3.1-8b", "--gpu", "h100", "-tp", 2, "--max-model-len", "16K"]
    budget = facts_of(capsys, *words)
    lines = "\n".join(f"INFO {line}" for line in budget["log_lines"])
    facts = facts_of(capsys, *words[:-2], "--from-log", written(tmp_path, lines))
    rows = rows_of(facts)
    assert facts["settings"]["max_model_len"] == 16384
    assert (
        rows["kv_tokens"]["predicted"] == rows["kv_tokens"]["logged"] == budget["kv_cache"]["kv_cache_tokens"]
    )
    assert abs(facts["gap"]["more_bytes"]) < 0.005 * GIB


def test_a_start_that_failed(tmp_path, capsys):
    """The sentence of vLLM, with the numbers of its rules: 2 MiB a block, one null block."""
    words = ["llama-3.1-8b", "--gpu", "l4", "--engine-version", "0.19.0"]
    budget = facts_of(capsys, *words, code=1)
    available = budget["kv_cache"]["bytes"] / GIB
    longest = (budget["kv_cache"]["num_gpu_blocks"] - 1) * 16
    text = (
        "INFO vLLM API server version 0.19.0\nValueError: To serve at least one request with the models's max seq len"
        f" (131072), (16.00 GiB KV cache is needed, which is larger than the available KV cache memory ({available:.2f}"
        f" GiB). Based on the available memory, the estimated maximum model length is {longest}.\n"
    )
    facts = facts_of(
        capsys, *words[:3], "--from-log", written(tmp_path, text), "--gpu-memory-utilization", 0.92
    )
    rows = rows_of(facts)
    assert facts["settings"]["max_model_len"] == 131072
    assert (
        rows["kv_needed_for_one_max_len_gib"]["predicted"]
        == rows["kv_needed_for_one_max_len_gib"]["logged"]
        == 16.0
    )
    assert rows["longest_len"]["predicted"] == rows["longest_len"]["logged"] == longest
    assert abs(rows["kv_avail_gib"]["error_percent"]) < 0.2
    assert main(["fit", *words[:3], "--from-log", str(tmp_path / "start.log")]) == 0


def test_a_term_that_a_log_tells_is_named_with_its_share(tmp_path, capsys):
    """2 GiB more outside torch than is reckoned: the gap is that term's, to the rounding."""
    text = V1.replace("increase memory: 0.25GiB", "increase memory: 2.25GiB").replace(
        "memory: 58.11", "memory: 56.11"
    )
    facts = facts_of(capsys, "--from-log", written(tmp_path, text), "--gpu", "h100")
    terms = {term["term"]: term["more_bytes"] / GIB for term in facts["gap"]["terms"]}
    assert terms["outside torch"] == pytest.approx(2.0, abs=0.01) and abs(terms["weights"]) < 0.01
    assert facts["gap"]["more_bytes"] / GIB == pytest.approx(2.0, abs=0.02)
    assert abs(facts["gap"]["rest_bytes"]) / GIB < 0.02


def test_the_run_on_an_rtx_4090(tmp_path, capsys):
    path = written(tmp_path, RUN, "run.json")
    facts = facts_of(capsys, "--from-log", path)
    rows, gap = rows_of(facts), facts["gap"]
    assert rows["num_blocks"]["logged"] == 2588 and rows["kv_tokens"]["logged"] == 41408
    assert rows["num_blocks"]["predicted"] == pytest.approx(2791, abs=3)
    assert gap["more_bytes"] == (rows["num_blocks"]["predicted"] - 2588) * 2 * 2**20 == gap["rest_bytes"]
    assert [term["term"] for term in gap["untold"]] == ["outside torch", "weights", "activation peak"]
    assert main(["fit", "--from-log", str(path)]) == 0
    page = capsys.readouterr().out
    assert "outside torch, weights and activation peak: not told by the log" in page
    assert "outside torch varies most of them; 0.09 GiB of the gap are beyond" in page
    command = next(line for line in page.splitlines() if line.startswith("the whole budget: kvsim "))
    assert main([*shlex.split(command)[4:], "--json"]) == 0
    blocks = json.loads(capsys.readouterr().out)["kv_cache"]["num_gpu_blocks"]
    assert blocks == pytest.approx(
        rows["num_blocks"]["predicted"], rel=0.01
    )  # the catalogue's 4090 has 20 MiB more


def test_a_v0_start(tmp_path, capsys):
    path = written(tmp_path, V0)
    record = read_log(path).record
    wanted = {"version": "0.6.4.post1", "gpu_total_gib": 23.58, "util": 0.9, "weights_gib": 14.9888}
    wanted |= {"non_torch_gib": 0.35, "kv_avail_gib": 3.81, "num_blocks": 1952, "max_model_len": 20000}
    assert {name: record[name] for name in wanted} == wanted
    assert record["activation_peak_gib"] == pytest.approx(17.06 - 14.9888)
    facts = facts_of(capsys, "--from-log", path)
    assert abs(rows_of(facts)["weights_gib"]["error_percent"]) < 0.2 and facts["gap"] is None
    assert any("--max-num-seqs and --max-num-batched-tokens" in note for note in facts["notes"])
    more = ["--max-num-seqs", 256, "--max-num-batched-tokens", 20000]
    assert {"num_blocks", "kv_avail_gib"} <= rows_of(facts_of(capsys, "--from-log", path, *more)).keys()


def test_a_later_v0_start_and_its_namespace(tmp_path):
    record = read_log(written(tmp_path, V0_LATER)).record
    wanted = {"model": "meta-llama/Llama-3.1-8B", "max_num_seqs": 64, "gpu_total_gib": 79.22, "util": 0.9}
    wanted |= {
        "weights_gib": 14.96,
        "non_torch_gib": 1.79,
        "activation_peak_gib": 1.26,
        "kv_avail_gib": 53.29,
    }
    assert {name: record[name] for name in wanted} == wanted
    assert record["num_blocks"] == 27284 and record["max_model_len"] is None


def test_sglang_and_llama_cpp(tmp_path, capsys):
    facts = facts_of(capsys, "--from-log", written(tmp_path, SGLANG))
    (row,) = facts["rows"]  # 28 layers x 2 x 8 heads x 128 x 2 bytes a token
    assert facts["engine"] == "sglang" and row["logged"] == 98304
    assert row["predicted"] == int(10.5 * GIB) // (28 * 2 * 8 * 128 * 2)
    assert "changes nothing for a log of sglang" in mistake(
        capsys, "--from-log", tmp_path / "start.log", "--gpu", "l4"
    )
    facts = facts_of(capsys, "--from-log", written(tmp_path, LLAMA_CPP))
    assert {name: row["predicted"] for name, row in rows_of(facts).items()} == {
        "k_mib": 136.0,
        "v_mib": 136.0,
    }
    assert facts["model"] == "Llama 3.1 8B"
    assert main(["fit", "--from-log", str(tmp_path / "start.log")]) == 0
    assert capsys.readouterr().out.startswith("AGREES: Llama 3.1 8B under llama.cpp, K within 1 % of the log")


def test_what_the_user_gives_wins_over_the_log(tmp_path, capsys):
    path = written(tmp_path, V1.replace("Llama-3.1-8B-Instruct", "our-finetune"))
    told = mistake(capsys, "--from-log", path, "--gpu", "h100")
    assert "the model of the log is not known" in told and "give MODEL" in told
    words = ["llama-3.1-8b", "--from-log", path, "--gpu", "h100"]
    assert abs(rows_of(facts_of(capsys, *words))["kv_avail_gib"]["error_percent"]) < 0.1
    facts = facts_of(capsys, *words, "--gpu-memory-utilization", "0.9", "--enforce-eager")
    assert rows_of(facts)["kv_avail_gib"]["predicted"] == pytest.approx(58.11 - 0.05 * 79.19, abs=0.02)
    assert facts["asked"]["gpu_memory_utilization"] == 0.9 and facts["asked"]["enforce_eager"] is True


def test_a_folder_of_the_hugging_face_cache_names_its_model(tmp_path, capsys):
    cache = "/root/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B-Instruct/snapshots/0e9e39f"
    text = V1.replace("meta-llama/Llama-3.1-8B-Instruct", cache)
    assert facts_of(capsys, "--from-log", written(tmp_path, text), "--gpu", "h100")["gap"] is not None


def test_the_last_of_several_starts_and_what_is_not_compared(tmp_path, capsys):
    first = V1.replace("58.11 GiB", "1.11 GiB")
    second = V1.replace("speculative_config=None", "speculative_config={'method': 'eagle', 'model': 'x'}")
    facts = facts_of(capsys, "--from-log", written(tmp_path, first + second), "--gpu", "h100")
    assert rows_of(facts)["kv_avail_gib"]["logged"] == 58.11 and facts["lines"]["kv_avail_gib"] == 20
    assert "the file has 2 starts; the last, from line 13, is read" in facts["notes"]
    assert any("speculative decoding" in note for note in facts["notes"])


def test_a_log_without_a_version_takes_the_default_and_says_so(tmp_path, capsys):
    text = "Available KV cache memory: 58.11 GiB\nengine EngineArgs(model='meta-llama/Llama-3.1-8B', max_num_seqs=64)\n"
    facts = facts_of(capsys, "--from-log", written(tmp_path, text), "--gpu", "h100")
    assert facts["version"] == "0.33.0" and any(
        "--engine-version says another" in note for note in facts["notes"]
    )


@pytest.mark.parametrize(
    ("text", "words", "told"),
    [
        ("", [], "has no line of a start of vLLM, SGLang or llama.cpp"),
        ("hello\nSTEP 1 took 3 GiB\n\x00\xff", [], "has no line of a start"),
        (V1, [], "the log does not say which GPU it is; give --gpu NAME"),
        (V1, ["--gpu", "h1000"], "did you mean"),
        (V1, ["nomodel", "--gpu", "h100"], "'nomodel' is not in the catalogue"),
        ("Available KV cache memory: 5 GiB", ["--gpu", "h100"], "does not name the model; give MODEL"),
        (
            V1.replace("0.19.0", "dev"),
            ["--gpu", "h100"],
            "version 'dev' names no release; give --engine-version",
        ),
        (V1, ["--gpu", "h100", "-tp", "3"], "cannot be compared: tensor_parallel_size 3 does not divide"),
        (
            V1.replace("quantization=None", "quantization='exl9'"),
            ["--gpu", "h100"],
            "weight_quant 'exl9' names no",
        ),
        ('{"engine_kwargs": 7}', [], "is no JSON record of a run"),
        ('{"engine_kwargs": {', [], "is no JSON record of a run"),
        (V1, ["--gpu", "h100", "--watermark", "0.1"], "--watermark changes nothing beside --from-log"),
        (V1, ["--gpu", "h100", "--seqs", "4"], "--seqs changes nothing beside --from-log"),
        (LLAMA_CPP, ["llama-3.1-8b"], "MODEL changes nothing for a log of llama.cpp"),
        (LLAMA_CPP, ["-tp", "2"], "--tensor-parallel-size changes nothing for a log of llama.cpp"),
    ],
)
def test_a_mistake_is_one_sentence(text, words, told, tmp_path, capsys):
    assert told in mistake(capsys, "--from-log", written(tmp_path, text), *words)


def test_what_is_no_file_is_one_sentence(tmp_path, capsys):
    assert "there is no such file" in mistake(capsys, "--from-log", tmp_path / "none.log")
    assert "cannot be read (Is a directory)" in mistake(capsys, "--from-log", tmp_path)


def test_numbers_that_are_none_are_left_out(tmp_path, capsys):
    text = V1.replace("58.11 GiB", "-.-. GiB").replace("952,032", ",").replace("116.21x", "1.2.3x")
    facts = facts_of(capsys, "--from-log", written(tmp_path, text), "--gpu", "h100")
    assert not {"kv_avail_gib", "kv_tokens", "max_concurrency"} & rows_of(facts).keys()


def test_it_loads_neither_numba_nor_arrow(tmp_path):
    path = str(written(tmp_path, V1))
    program = (
        f"import sys; from kvsim.cli import main; main(['fit', '--gpu', 'h100', '--from-log', {path!r}]);"
        "sys.exit(bool({'numba', 'pyarrow', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0
