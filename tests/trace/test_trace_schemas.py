"""Every schema: detected by content, read right; units, clocks, policies, columns by name, several files."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kvsim.errors import UserError
from kvsim.trace import load_trace
from kvsim.trace.schemas import NAMES
from tests.trace import samples
from tests.trace.samples import IN, OUT, SAMPLES, T0, lines, otlp, span


def data_of(name: str) -> bytes:
    content = SAMPLES[name][1]
    return content if isinstance(content, bytes) else content.encode()


def requests(trace) -> list[tuple[int, int, int]]:
    return list(
        zip(
            trace.arrival_ns.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True
        )
    )


TWO = [(0, 100, 7), (500_000_000, 30, 2)]
WITH_A_FAILED_ONE = {
    "aiperf": [(0, 0, 0), (7, 100, 7), (500_000_007, 30, 2)],
    "otel": [*TWO, (900_000_000, 8, 0)],
    "otel indented": [*TWO, (900_000_000, 8, 0)],
    "otel lines": [*TWO, (900_000_000, 8, 0)],
}


def test_there_is_a_sample_of_every_schema():
    assert {format for format, _ in SAMPLES.values()} | {"timed_trace"} == set(NAMES)


def test_the_documentation_lists_every_schema():
    text = (Path(__file__).resolve().parents[2] / "docs" / "trace-formats.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in text] == []


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("pack", ["plain", "gzip", "zstd"])
def test_every_schema_is_detected_and_read(save, name, pack):
    data = data_of(name)
    packed = {
        "plain": data,
        "gzip": gzip.compress(data),
        "zstd": bytes(pa.compress(data, codec="zstd", asbytes=True)),
    }
    trace = load_trace(save(packed[pack], "name.that.says.nothing"))
    trace.check_integrity()
    assert trace.format == SAMPLES[name][0]
    ref = WITH_A_FAILED_ONE.get(name, TWO)
    if not trace.has_arrivals:
        ref = [(0, prompt, output) for _, prompt, output in ref]
    assert requests(trace) == ref
    assert trace.has_arrivals == (name not in ("nanoflow", "vidur lengths", "openai usage"))


@pytest.mark.parametrize("name", SAMPLES)
def test_format_can_be_named(save, name):
    assert load_trace(save(data_of(name)), format=SAMPLES[name][0]).format == SAMPLES[name][0]


def test_what_else_the_schemas_hold(save):
    trace = {name: load_trace(save(data_of(name))) for name in SAMPLES}
    assert trace["burstgpt 3"].request_class.tolist() == ["GPT-4", "ChatGPT"]
    assert trace["splitwise"].request_id.tolist() == ["0", "1"]
    assert trace["bailian"].request_class.tolist() == ["text", "search"]
    assert (trace["bailian"].prefix_unit, trace["bailian"].prefix_ids.tolist()[-2:]) == (16, [0, 9])
    assert trace["litellm csv"].request_class.tolist() == ["red", "blue"]
    assert trace["litellm jsonl"].request_class.tolist() == ["red", None]
    assert trace["otel"].request_id.tolist() == ["a", "b", "c"]
    assert trace["otel"].request_class.tolist() == ["m-1"] * 3
    assert trace["aiperf"].request_id.tolist() == ["bad", "r10", "r500000010"]
    assert "1 of 2 requests carry images" in trace["azure 2025"].notes[0]
    assert "every TIMESTAMP is XXX" in trace["nanoflow"].notes[0]
    assert "1 of 3 rows are left out, since call_type" in trace["litellm csv"].notes[0]
    assert "1 of 4 rows are left out, since metadata.benchmark_phase" in trace["aiperf"].notes[0]
    assert "2 of 5 spans are no inference" in trace["otel"].notes[0]
    assert "1 requests failed before they were sent" in trace["vllm bench"].notes[0]
    assert "stand for 16 tokens each" in trace["mooncake of 16"].notes[0]
    assert trace["mooncake of 16"].prefix_unit == 16


# Units that a file does not tell.


def mooncake_rows(times, **extra) -> str:
    return lines(*({"timestamp": t, "input_length": 5, "output_length": 2, **extra} for t in times))


def test_seconds_in_mooncakes_keys_are_told_by_the_rate(save):
    seconds = [i * 0.25 for i in range(40)]
    trace = load_trace(save(mooncake_rows(seconds)))
    assert trace.format == "timed_trace" and trace.arrival_ns[1] == 250_000_000
    assert "timestamp is read as s" in trace.notes[0] and "--time-unit ms insists" in trace.notes[0]
    assert load_trace(save(mooncake_rows(seconds)), time_unit="ms").arrival_ns[1] == 250_000
    assert load_trace(save(mooncake_rows(seconds)), format="mooncake").arrival_ns[1] == 250_000
    assert load_trace(save(mooncake_rows(seconds)), format="timed_trace").arrival_ns[1] == 250_000_000
    # Whole numbers, few rows, or rates that milliseconds explain: milliseconds.
    for times in (range(40), seconds[:5], [i * 250.0 for i in range(40)]):
        trace = load_trace(save(mooncake_rows(times)))
        assert trace.format == "mooncake" and not trace.notes


def test_milliseconds_in_bailians_keys_are_told_by_the_rate(save):
    rows = mooncake_rows(range(0, 400_000, 5_000), chat_id=1, parent_chat_id=-1)
    trace = load_trace(save(rows))
    assert trace.arrival_ns[1] == 5 * 10**9 and "read as ms" in trace.notes[0]
    assert load_trace(save(rows), time_unit="s").arrival_ns[1] == 5_000 * 10**9


def test_timed_trace_has_16_token_blocks(save):
    rows = lines({"timestamp": 1.5, "input_length": 40, "output_length": 2, "hash_ids": [4, 5, 6]})
    assert load_trace(save(rows), format="timed_trace").prefix_unit == 16


# Policies.


def test_failed_requests_are_kept_and_counted_or_skipped(save):
    text = SAMPLES["burstgpt 1"][1] + "6,GPT-4,50,0,50,API log\n7,GPT-4,0,0,0,API log\n"
    trace = load_trace(save(text))
    assert len(trace) == 4 and "line 4: Response tokens 0 marks a failed request, in 2 of 4" in trace.notes[0]
    skipped = load_trace(save(text), failed="skip")
    assert requests(skipped) == TWO and "left out" in skipped.notes[0]
    assert requests(load_trace(save(text), zero_output="skip")) == TWO
    assert len(load_trace(save(text), zero_prompt="skip")) == 3
    for name in ("aiperf", "otel", "otel lines"):
        assert requests(load_trace(save(data_of(name)), failed="skip")) == TWO
    with pytest.raises(UserError, match="no request is left"):
        load_trace(save(text.replace(",7,", ",0,").replace(",2,", ",0,")), zero_output="skip")


def test_skipped_rows_take_their_prefix_ids_and_turns_along(save):
    rows = [json.loads(line) for line in SAMPLES["bailian"][1].splitlines()]
    rows.insert(1, rows[0] | {"chat_id": 5, "output_length": 0, "hash_ids": list(range(20, 27))})
    rows.append(rows[0] | {"chat_id": 6, "parent_chat_id": 5, "timestamp": 7.5})
    trace = load_trace(save(lines(*rows)), zero_output="skip")
    trace.check_integrity()
    assert trace.parent.tolist() == [-1, 0, -1] and trace.prefix_ids[7:9].tolist() == [0, 9]
    assert any("1 follow-up turns name a parent that is not among" in note for note in trace.notes)


def test_litellm_failures_and_log_rows_without_counts(save):
    text = SAMPLES["litellm csv"][1] + "r4,acompletion,2026-01-01 00:00:02,,,,gpt,red,failure\n"
    trace = load_trace(save(text))
    assert len(trace) == 3 and requests(trace)[2][1:] == (0, 0)
    assert requests(load_trace(save(text), failed="skip")) == TWO
    half = SAMPLES["litellm csv"][1] + "r4,acompletion,2026-01-01 00:00:02,,,5,gpt,red,success\n"
    with pytest.raises(UserError, match="line 5: prompt_tokens is missing"):
        load_trace(save(half))
    usage = lines({"created": 5, "usage": None}) + SAMPLES["openai"][1]
    assert len(load_trace(save(usage))) == 3 and requests(load_trace(save(usage), failed="skip")) == TWO


def test_backward_time_can_be_an_error(save):
    text = "arrived_at,num_prefill_tokens,num_decode_tokens\n1,1,1\n3,2,2\n2,3,3\n"
    assert "all were sorted" in load_trace(save(text)).notes[0]
    with pytest.raises(UserError, match=r"line 4: arrived_at is earlier.*sort the file"):
        load_trace(save(text), backward="error")


def test_policies_that_are_not(save):
    with pytest.raises(UserError, match=r"failed is 'skp'.*did you mean 'skip'"):
        load_trace(save(SAMPLES["vidur"][1]), failed="skp")


# OpenTelemetry and benchmark results.


def test_spans_around_spans_are_counted_once(save):
    gateway = span("g", T0 - 5, **{IN: 100, OUT: 7})
    inner = span("a", T0, parent="g", **{IN: 100, OUT: 7})
    trace = load_trace(save(json.dumps(otlp(gateway, inner, span("b", T0 + 1, **{IN: 1, OUT: 1})))))
    assert trace.request_id.tolist() == ["a", "b"]
    assert "1 inference spans hold another one" in trace.notes[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({IN: -4, OUT: 1}, ["span 1", "gen_ai.usage.input_tokens is '-4'", "negative"]),
        ({IN: "many", OUT: 1}, ["span 1", "'many'"]),
        ({IN: 2**40, OUT: 1}, ["span 1", "above 2,147,483,647"]),
        ({OUT: 1}, ["span 1", "gen_ai.usage.input_tokens is missing"]),
    ],
)
def test_bad_spans(save, change, words):
    with pytest.raises(UserError) as error:
        load_trace(save(json.dumps(otlp(span("a", T0, **change), span("b", T0, **{IN: 1, OUT: 1})))))
    assert all(word in str(error.value) for word in words), error.value


def test_bad_documents(save):
    bench = samples.BENCH
    for change, words in (
        ({"output_lens": [1]}, "output_lens has 1 values and input_lens 3"),
        ({"input_lens": [1, -2, 3]}, r"input_lens\[1\] is -2, which is negative"),
        ({"start_times": [1, "x", 3]}, r"start_times\[1\] is 'x'"),
        ({"input_lens": 3}, "line 1: is no JSON object that holds a request"),
        ({"input_lens": []}, "output_lens has 3 values|no requests"),
    ):
        with pytest.raises(UserError, match=words):
            load_trace(save(json.dumps(bench | change)))
    bare = {k: v for k, v in bench.items() if not k.endswith("lens")}
    with pytest.raises(UserError, match="--save-detailed"):
        load_trace(save(json.dumps(bare)))
    with pytest.raises(UserError, match="several benchmark results"):
        load_trace(save(lines(bench, bench)))
    with pytest.raises(UserError, match=r"line 17: is no JSON object.*truncated"):
        load_trace(save("\n".join(json.dumps(bench, indent=2).splitlines()[:17])))


# --columns.


ROWS = "ts;x,ts,in_tok,out_tok,team\n9,1000,100,7,red\n9,1500,30,2,\n"


def test_columns_by_name(save, assert_same_rows):
    text = "arrival=ts,prompt=in_tok,output=out_tok,class=team"
    trace = load_trace(save(ROWS), columns=text, time_unit="ms")
    assert requests(trace) == TWO and trace.request_class.tolist() == ["red", None]
    assert trace.format == "columns"
    as_dict = {"arrival": "ts", "prompt": "in_tok", "output": "out_tok", "class": "team"}
    assert_same_rows(load_trace(save(ROWS), columns=as_dict, time_unit="ms"), trace)
    rows = lines(
        {"when": {"ts": 1000}, "usage": {"in": 100, "out": 7}, "team": "red"},
        {"when": {"ts": 1500}, "usage": {"in": 30, "out": 2}, "team": None},
    )
    nested = "arrival=when.ts,prompt=usage.in,output=usage.out,class=team"
    assert_same_rows(load_trace(save(rows), columns=nested, time_unit="ms"), trace)
    table = samples.parquet_of(ts=[1000, 1500], in_tok=[100, 30], out_tok=[7, 2], team=["red", None])
    assert_same_rows(load_trace(save(table), columns=text, time_unit="ms"), trace)
    floats = samples.parquet_of(ts=[1.0, 1.5], in_tok=[100, 30], out_tok=[7, 2], team=["red", None])
    assert_same_rows(load_trace(save(floats), columns=text, time_unit="s"), trace)
    lengths = load_trace(save(ROWS), columns="prompt=in_tok,output=out_tok")
    assert not lengths.has_arrivals and lengths.prompt_tokens.tolist() == [100, 30]


def test_every_role_in_every_container(save, assert_same_rows):
    rows = [
        {"t": 0, "i": 20, "o": 1, "c": "a", "k": "r1", "p": 3, "h": [1, 2], "s": "x", "d": None},
        {"t": 5, "i": 40, "o": 2, "c": None, "k": "r2", "p": -1, "h": [1, 2, 3], "s": "x", "d": 1.5},
    ]
    text = "arrival=t,prompt=i,output=o,class=c,id=k,priority=p,session=s,delay=d"
    ref = load_trace(save(lines(*rows)), columns=text + ",prefix=h", time_unit="ms", prefix_unit=16)
    ref.check_integrity()
    assert ref.parent.tolist() == [-1, 0] and ref.delay_ns.tolist() == [0, 1_500_000]
    assert ref.prefix_ids.tolist() == [1, 2, 1, 2, 3] and ref.priority.tolist() == [3, -1]
    table = samples.parquet_of(**{key: [row[key] for row in rows] for key in rows[0]})
    options = {"columns": text + ",prefix=h", "time_unit": "ms", "prefix_unit": 16}
    assert_same_rows(load_trace(save(table), **options), ref)
    bare = load_trace(save(lines(*rows)), columns=text, time_unit="ms")
    csv = "t,i,o,c,k,p,s,d\n0,20,1,a,r1,3,x,\n5,40,2,,r2,-1,x,1.5\n"
    assert_same_rows(load_trace(save(csv), columns=text, time_unit="ms"), bare)
    with pytest.raises(UserError, match="no lists of prefix ids"):
        load_trace(save(csv), **options)
    with pytest.raises(UserError, match="how many tokens one of its h stands for"):
        load_trace(save(lines(*rows)), columns=text + ",prefix=h", time_unit="ms")
    with pytest.raises(UserError, match="JSON document of a known form"):
        load_trace(save(SAMPLES["otel"][1]), columns="class=model")


def test_columns_with_dates_need_no_unit(save):
    text = "at,i,o\n2026-01-01T00:00:00Z,100,7\n2026-01-01T00:00:00.5Z,30,2\n"
    assert requests(load_trace(save(text), columns="arrival=at,prompt=i,output=o")) == TWO


def test_columns_can_replace_one_of_a_known_schema(save):
    trace = load_trace(save(SAMPLES["litellm csv"][1]), columns="class=model")
    assert trace.format == "litellm" and trace.request_class.tolist() == ["gpt", "gpt"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("arrival=ts,prompt=in_tok,output=out_tok", "unknown unit.*--time-unit"),
        ("prompt=in_tk,output=out_tok", "no column in_tk.*prompt.*did you mean 'in_tok'"),
        ("promt=in_tok,output=out_tok", "'promt' is no role.*did you mean 'prompt'"),
        ("prompt=in_tok,prompt=out_tok", "'prompt' is there twice"),
        ("prompt,output=out_tok", "names no column"),
        ("prompt=,output=out_tok", "names no column"),
        ("", "names no column"),
        ("class=team", "no columns of a known trace"),
        (5, "columns is 5"),
        ({"prompt": 5}, "names no column"),
    ],
)
def test_columns_that_are_wrong(save, columns, words):
    with pytest.raises(UserError, match=words):
        load_trace(save(ROWS), columns=columns)


# Several files, standard input.


def test_files_with_calendar_times_are_merged(save):
    a = save(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-12 00:00:01,1,1\n2024-05-12 00:00:03,3,3\n", "a"
    )
    b = save(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-12 00:00:00,9,9\n2024-05-12 00:00:02,2,2\n", "b"
    )
    trace = load_trace([a, b])
    trace.check_integrity()
    assert requests(trace) == [(0, 9, 9), (10**9, 1, 1), (2 * 10**9, 2, 2), (3 * 10**9, 3, 3)]
    assert trace.name == "a+1" and trace.sha256 != load_trace(a).sha256


def test_a_clock_that_goes_on_is_kept_and_one_that_starts_again_follows(save, assert_same_rows):
    rows = [json.loads(line) for line in SAMPLES["mooncake"][1].splitlines()]
    rows += [row | {"timestamp": row["timestamp"] + 1000} for row in rows]
    whole = load_trace(save(lines(*rows)))
    parts = [save(lines(*rows[:2]), "1"), save(lines(*rows[2:]), "2")]
    assert_same_rows(load_trace(parts), whole)
    again = load_trace([parts[0], parts[0]])
    again.check_integrity()
    assert again.arrival_ns.tolist() == [0, 500_000_000, 500_000_000, 1_000_000_000]
    assert again.prefix_ids.tolist() == [4, 9, 10, 11] and "clock starts again" in again.notes[0]


def test_turns_and_classes_of_several_files(save):
    a, b = save(SAMPLES["bailian"][1], "a"), save(SAMPLES["kvsim csv"][1], "b")
    with pytest.raises(UserError, match="a prefix id stands for no and 16 tokens"):
        load_trace([a, b])
    trace = load_trace([a, a])
    trace.check_integrity()
    assert trace.parent.tolist() == [-1, 0, -1, 2]
    lengths = save(SAMPLES["vidur lengths"][1], "c")
    with pytest.raises(UserError, match="no arrivals, the other times from its start"):
        load_trace([b, lengths])
    assert len(load_trace([lengths, lengths])) == 4
    with pytest.raises(UserError, match="at least one file"):
        load_trace([])


def test_standard_input(monkeypatch, save, assert_same_rows):
    class Stdin:
        closed = False

        def __init__(self, data: bytes, tty: bool = False):
            self.buffer, self.isatty = io.BytesIO(data), lambda: tty

    for name in ("mooncake", "kvsim parquet", "vllm bench"):
        monkeypatch.setattr(sys, "stdin", Stdin(gzip.compress(data_of(name))))
        trace = load_trace("-")
        assert_same_rows(trace, load_trace(save(data_of(name))))
        assert (trace.name, trace.source) == ("stdin", "standard input")
    monkeypatch.setattr(sys, "stdin", Stdin(b"a,b\n1,2\n"))
    with pytest.raises(UserError, match="standard input: line 1: these are no columns"):
        load_trace("-")
    monkeypatch.setattr(sys, "stdin", Stdin(b"", tty=True))
    with pytest.raises(UserError, match="nothing is piped"):
        load_trace("-")


# Follow-up turns.


def test_sessions_of_mooncake(save):
    rows = [
        {"session_id": "s", "timestamp": 5, "input_length": 1, "output_length": 1},
        {"session_id": "t", "timestamp": 6, "input_length": 2, "output_length": 1},
        {"session_id": "s", "delay": 500, "input_length": 3, "output_length": 1},
        {"session_id": "s", "delay": 2.5, "input_length": 4, "output_length": 1},
        {"session_id": "t", "timestamp": 7, "delay": 3, "input_length": 5, "output_length": 1},
        {"timestamp": 7, "input_length": 6, "output_length": 1},
    ]
    trace = load_trace(save(lines(*rows)))
    trace.check_integrity()
    assert trace.prompt_tokens.tolist() == [1, 2, 5, 6, 3, 4]
    assert trace.parent.tolist() == [-1, -1, 1, -1, 0, 4]
    assert trace.delay_ns.tolist() == [0, 0, 3_000_000, 0, 500_000_000, 2_500_000]
    assert trace.arrival_ns.tolist()[-2:] == [500_000_000, 502_500_000]
    notes = " ".join(trace.notes)
    assert "line 3: timestamp is missing, in 2 of 6" in notes
    assert (
        "3 of 6 requests are follow-up turns; in a run each waits until the turn before it has ended" in notes
    )
    # A turn that is skipped still says when the next one comes.
    first_gone = load_trace(save(lines(rows[0] | {"output_length": 0}, *rows[1:])), zero_output="skip")
    assert first_gone.prompt_tokens.tolist() == [2, 5, 6, 3, 4] and first_gone.arrival_ns[3] == 499_000_000
    with pytest.raises(UserError, match="line 1: timestamp is missing and so is an earlier turn"):
        load_trace(save(lines(rows[0] | {"timestamp": None}, *rows[1:])))


def test_parents_of_bailian_follow_sorting(save):
    rows = [json.loads(line) for line in SAMPLES["bailian"][1].splitlines()]
    trace = load_trace(save(lines(*rows[::-1])))
    trace.check_integrity()
    assert trace.parent.tolist() == [-1, 0] and trace.delay_ns.tolist() == [0, 0]
    late = load_trace(save(lines(rows[0] | {"timestamp": 9}, rows[1])))
    assert late.parent is None and "1 follow-up turns name a parent that is not among" in late.notes[1]


def test_parents_that_are_rows(save):
    text = (
        "arrival_ns,prompt_tokens,output_tokens,parent,delay_ns\n5,1,1,-1,\n3,2,1,,\n9,3,1,0,4\n9,4,1,3,4\n"
    )
    trace = load_trace(save(text))
    trace.check_integrity()
    assert trace.parent.tolist() == [-1, -1, 1, -1] and trace.delay_ns.tolist() == [0, 0, 4, 0]


@pytest.mark.parametrize("name", [n for n, (f, c) in SAMPLES.items() if isinstance(c, str)])
def test_small_files_cut_anywhere_are_read_or_refused(save, name):
    data = data_of(name)
    for end in range(0, len(data), 7):
        try:
            trace = load_trace(save(data[:end]))
        except UserError as error:
            assert "\n" not in str(error)
        else:
            trace.check_integrity()
            assert np.all(trace.prompt_tokens <= 1000)


# Parquet of other schemas.


def test_parquet_tables_of_other_schemas(save):
    lengths = {"num_prefill_tokens": [100, 30], "num_decode_tokens": [7, 2]}
    for arrived in (
        pa.array([1, 2], pa.int32()),
        pa.array([1.0, 2.0], pa.float32()),
        pa.array(["1.0", "2.0"]).cast(pa.decimal128(9, 3)),
    ):
        trace = load_trace(save(samples.parquet_of(arrived_at=arrived, **lengths)))
        assert requests(trace) == [(0, 100, 7), (10**9, 30, 2)]
    tokens = {"ContextTokens": [100, 30], "GeneratedTokens": [7, 2]}
    texts = ["2024-05-12 00:00:00.25", "2024-05-12 00:00:00.75"]
    assert requests(load_trace(save(samples.parquet_of(TIMESTAMP=texts, **tokens)))) == TWO
    assert not load_trace(save(samples.parquet_of(TIMESTAMP=["XXX", "XXX"], **tokens))).has_arrivals
    naive = pa.array([250, 750], pa.timestamp("ms"))
    assert requests(load_trace(save(samples.parquet_of(TIMESTAMP=naive, **tokens)))) == TWO
    log = samples.parquet_of(
        startTime=pa.array([250, 750, 900], pa.timestamp("ms", tz="UTC")),
        prompt_tokens=[100, 30, None],
        completion_tokens=[7, 2, None],
        team_id=pa.array(["red", None, "red"]).dictionary_encode(),
        status=["success", "success", "failure"],
        request_id=[1, 2, 3],
    )
    trace = load_trace(save(log), failed="skip")
    assert requests(trace) == TWO and trace.request_class.tolist() == ["red", None]
    assert trace.request_id.tolist() == ["1", "2"] and len(load_trace(save(log))) == 3


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"arrived_at": [0.0, float("nan")]}, "row 2: arrived_at is nan, not a time in s"),
        ({"arrived_at": [0.0, -1.0]}, "row 2: arrived_at is -1.0"),
        ({"arrived_at": [0, 2**40]}, "row 2: arrived_at is 1099511627776"),
        ({"arrived_at": [0.0, None]}, "row 2: arrived_at is empty"),
        ({"arrived_at": [True, False]}, "arrived_at is bool"),
    ],
)
def test_bad_times_in_parquet(save, columns, words):
    table = samples.parquet_of(**columns, num_prefill_tokens=[1, 2], num_decode_tokens=[1, 2])
    with pytest.raises(UserError, match=words):
        load_trace(save(table))


def test_bad_dates_in_parquet(save):
    tokens = {"ContextTokens": [100, 30], "GeneratedTokens": [7, 2]}
    for times, words in (
        (["2024-05-12 00:00:00", "soon"], "row 2: TIMESTAMP is 'soon'"),
        (["2024-05-12 00:00:00", None], "row 2: TIMESTAMP is empty"),
        ([1, 2], "TIMESTAMP is int64; write it as a date"),
        (pa.array([0, 2**62], pa.timestamp("ms")), "outside the years"),
    ):
        with pytest.raises(UserError, match=words):
            load_trace(save(samples.parquet_of(TIMESTAMP=times, **tokens)))
