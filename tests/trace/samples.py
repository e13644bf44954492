"""A small valid file of every schema, for tests of readers and as seeds of the fuzzer."""

from __future__ import annotations

import io
import json

import pyarrow as pa
from pyarrow import parquet


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def span(
    id: str, start: int, operation: str | None = "chat", parent: str = "", code: int = 0, **usage
) -> dict:
    attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.request.model": "m-1",
        "server.port": "80",
        **usage,
    }
    return {
        "traceId": "00" * 16,
        "spanId": id,
        "parentSpanId": parent,
        "startTimeUnixNano": str(start),
        "endTimeUnixNano": str(start + 10**9),
        "attributes": [
            {"key": k, "value": {"intValue": str(v)} if isinstance(v, int) else {"stringValue": v}}
            for k, v in attributes.items()
            if v is not None
        ],
        "status": {"code": code} if code else {},
    }


def otlp(*spans: dict) -> dict:
    return {"resourceSpans": [{"resource": {}, "scopeSpans": [{"scope": {}, "spans": list(spans)}]}]}


IN, OUT = "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"
T0 = 1_760_000_000_000_000_000
OTEL = otlp(
    span("a", T0, **{IN: 100, OUT: 7}),
    span("b", T0 + 5 * 10**8, **{IN: 30, OUT: 2}),
    span("c", T0 + 9 * 10**8, operation=None, **{"gen_ai.usage.prompt_tokens": 8}, code=2),
    span("d", T0, operation="invoke_agent", **{IN: 130, OUT: 9}),
    span("e", T0, operation="embeddings", **{IN: 5}),
)
BENCH = {
    "date": "20260101-000000",
    "model_id": "m",
    "request_throughput": 2.0,
    "total_input_tokens": 138,
    "input_lens": [100, 30, 8],
    "output_lens": [7, 2, 0],
    "ttfts": [0.1, 0.2, 0.0],
    "itls": [[0.01], [], []],
    "start_times": [5000.25, 5000.75, 0.0],
    "errors": ["", "", "Internal Server Error"],
}


def aiperf(start: int, prompt: int, output: int, phase: str = "profiling") -> dict:
    return {
        "metadata": {
            "x_request_id": f"r{start}",
            "turn_index": 0,
            "request_start_ns": T0 + start,
            "benchmark_phase": phase,
        },
        "metrics": {
            "input_sequence_length": {"value": prompt, "unit": "tokens"},
            "output_sequence_length": {"value": output, "unit": "tokens"},
            "request_latency": {"value": 3.5, "unit": "ms"},
        },
        "error": None,
    }  # fmt: skip


AIPERF = [
    aiperf(0, 1, 1, phase="warmup"),
    {
        "metadata": {"x_request_id": "bad", "request_start_ns": T0 + 3, "benchmark_phase": "profiling"},
        "metrics": {"error_isl": {"value": 550, "unit": "tokens"}},
        "error": {"code": 499, "type": "RequestCancellationError"},
    },
    aiperf(10, 100, 7),
    aiperf(500_000_010, 30, 2),
]
LITELLM_HEADER = "request_id,call_type,startTime,endTime,prompt_tokens,completion_tokens,model,team_id,status"


def parquet_of(metadata=None, **columns) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pa.table(columns).replace_schema_metadata(metadata or {}), out)
    return out.getvalue()


# name -> (format that it is, content). All but three hold the requests (100, 7) at 0 s and (30, 2) at 0.5 s.
SAMPLES: dict[str, tuple[str, str | bytes]] = {
    "azure 2023": (
        "azure",
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,100,7\r\n"
        "2023-11-16 18:15:47.1805900,30,2",
    ),
    "azure 2024": (
        "azure",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-12 00:00:00.004400+00:00,100,7\n"
        "2024-05-12 00:00:00.504400+00:00,30,2\n",
    ),
    "azure 2025": (
        "azure",
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15T12:00:00.066Z,1,100,7\n"
        "2024-10-15T12:00:00.566Z,0,30,2\n",
    ),
    "nanoflow": ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,100,7\nXXX,30,2\n"),
    "vidur": ("vidur", "arrived_at,num_prefill_tokens,num_decode_tokens\n0.25,100,7\n0.75,30.0,2.0\n"),
    "vidur lengths": (
        "vidur",
        "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n100,7,107,14.3\n30,2,32,15.0\n",
    ),
    "burstgpt 1": (
        "burstgpt",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5.0,GPT-4,100,7,107,API log\n5.5,ChatGPT,30,2,32,Conversation log\n",
    ),
    "burstgpt 3": (
        "burstgpt",
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5.0,,1.2,GPT-4,100,7,107,API log\n5.5,77,0.9,ChatGPT,30,2,32,Conversation log\n",
    ),
    "splitwise": (
        "splitwise",
        "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"
        "0,2,0,1,1,100,7\n1,2,0,1.5,1,30,2\n",
    ),
    "mooncake": (
        "mooncake",
        lines(
            {"timestamp": 5, "input_length": 100, "output_length": 7, "hash_ids": [4]},
            {"timestamp": 505, "input_length": 30, "output_length": 2, "hash_ids": [9]},
        ),
    ),
    "mooncake of 16": (
        "mooncake",
        lines(
            {"timestamp": 5, "input_length": 100, "output_length": 7, "hash_ids": [1, 2, 3, 4, 5, 6, 7]},
            {"timestamp": 505, "input_length": 30, "output_length": 2, "hash_ids": [1, 8]},
        ),
    ),
    "mooncake sessions": (
        "mooncake",
        lines(
            {"session_id": "s", "timestamp": 5, "input_length": 100, "output_length": 7},
            {"session_id": "s", "delay": 500, "input_length": 30, "output_length": 2},
        ),
    ),
    "dynamo": (
        "mooncake",
        lines(
            {"created_time": 5, "input_tokens": 100, "output_tokens": 7, "session_id": "s"},
            {"created_time": 505, "input_tokens": 30, "output_tokens": 2, "session_id": "s", "delay_ms": 4},
        ),
    ),
    "bailian": (
        "bailian",
        lines(
            {"chat_id": 0, "parent_chat_id": -1, "timestamp": 5.0, "input_length": 100, "output_length": 7,
             "type": "text", "turn": 1, "hash_ids": [0, 1, 2, 3, 4, 5, 6]},
            {"chat_id": 1, "parent_chat_id": 0, "timestamp": 5.5, "input_length": 30, "output_length": 2,
             "type": "search", "turn": 2, "hash_ids": [0, 9]},
        ),
    ),
    "llmservingsim": (
        "llmservingsim",
        lines(
            {"input_toks": 100, "output_toks": 7, "arrival_time_ns": 101_537_000, "input_tok_ids": [1, 2]},
            {"input_toks": 30, "output_toks": 2, "arrival_time_ns": 601_537_000, "input_tok_ids": []},
        ),
    ),
    "aiperf": ("aiperf", lines(*AIPERF)),
    "litellm csv": (
        "litellm",
        f"{LITELLM_HEADER}\nr1,acompletion,2026-01-01 00:00:00.25,2026-01-01 00:00:03,100,7,gpt,red,success\n"
        "r2,acompletion,2026-01-01 00:00:00.75,2026-01-01 00:00:03,30,2,gpt,blue,success\n"
        "r3,aembedding,2026-01-01 00:00:00.80,2026-01-01 00:00:03,30,0,e,blue,success\n",
    ),
    "litellm jsonl": (
        "litellm",
        lines(
            {"request_id": "r1", "call_type": "acompletion", "startTime": "2026-01-01T00:00:00.250Z",
             "prompt_tokens": 100, "completion_tokens": 7, "team_id": "red", "status": "success",
             "metadata": {"a": {"b": 1}}},
            {"request_id": "r2", "call_type": "acompletion", "startTime": "2026-01-01T00:00:00.750Z",
             "prompt_tokens": 30, "completion_tokens": 2, "team_id": None, "status": "success"},
        ),
    ),
    "openai": (
        "openai",
        lines(
            {"id": "x1", "created": 1_760_000_000, "model": "m", "usage": {"prompt_tokens": 100,
             "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 64}}},
            {"id": "x2", "created": 1_760_000_000.5, "model": "m", "usage": {"prompt_tokens": 30,
             "completion_tokens": 2, "prompt_tokens_details": None}},
        ),
    ),
    "openai usage": (
        "openai",
        lines(
            {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
            {"prompt_tokens": 30, "completion_tokens": 2, "total_tokens": 32},
        ),
    ),
    "openai batch": (
        "openai",
        lines(
            {"custom_id": "c1", "response": {"status_code": 200, "body": {"created": 1_760_000_000, "usage":
             {"prompt_tokens": 100, "completion_tokens": 7}}}, "error": None},
            {"custom_id": "c2", "response": {"status_code": 200, "body": {"created": 1_760_000_000.5, "usage":
             {"prompt_tokens": 30, "completion_tokens": 2}}}, "error": None},
        ),
    ),
    "openai responses": (
        "openai",
        lines(
            {"id": "x1", "created_at": 1_760_000_000, "usage": {"input_tokens": 100, "output_tokens": 7}},
            {"id": "x2", "created_at": 1_760_000_000.5, "usage": {"input_tokens": 30, "output_tokens": 2}},
        ),
    ),
    "vllm bench": ("vllm_bench", json.dumps(BENCH)),
    "vllm bench indented": ("vllm_bench", json.dumps(BENCH, indent=2)),
    "otel": ("otel", json.dumps(OTEL)),
    "otel indented": ("otel", json.dumps(OTEL, indent=1)),
    "otel lines": (
        "otel",
        lines(otlp(*OTEL["resourceSpans"][0]["scopeSpans"][0]["spans"][:1]), {"resourceMetrics": []},
              otlp(*OTEL["resourceSpans"][0]["scopeSpans"][0]["spans"][1:])),
    ),
    "kvsim csv": ("kvsim", "arrival_ns,prompt_tokens,output_tokens\n7,100,7\n500000007,30,2\n"),
    "kvsim jsonl": (
        "kvsim",
        lines(
            {"arrival_ns": 7, "prompt_tokens": 100, "output_tokens": 7},
            {"arrival_ns": 500_000_007, "prompt_tokens": 30, "output_tokens": 2, "parent": 0},
        ),
    ),
    "kvsim parquet": (
        "kvsim",
        parquet_of(
            {"prefix_unit": "64"},
            arrival_ns=[7, 500_000_007],
            prompt_tokens=[100, 30],
            output_tokens=[7, 2],
            request_class=["a", None],
            parent=[-1, 0],
            delay_ns=[0, 3],
            prefix_ids=[[1, 2], [1]],
        ),
    ),
    "vidur parquet": (
        "vidur",
        parquet_of(arrived_at=[0.25, 0.75], num_prefill_tokens=[100.0, 30.0], num_decode_tokens=[7, 2]),
    ),
    "azure parquet": (
        "azure",
        parquet_of(
            TIMESTAMP=pa.array([T0 // 1000, T0 // 1000 + 500_000], pa.timestamp("us", tz="UTC")),
            ContextTokens=[100, 30],
            GeneratedTokens=[7, 2],
        ),
    ),
}  # fmt: skip
