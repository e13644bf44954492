"""What each reader makes of good files: small inline ones always, the public ones when they are here."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from kvsim.errors import UserError
from kvsim.trace import load_trace, tables
from kvsim.trace.schemas import match
from kvsim.trace.source import find

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224671,879,55"""
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,374,44\n4.314579,396,109\n4.5418771,879,55\n"
MOONCAKE = """{"timestamp": 5, "input_length": 1100, "output_length": 20, "hash_ids": [0, 1, 2]}
{"timestamp": 505, "input_length": 512, "output_length": 30, "hash_ids": [7]}
{"timestamp": 905.0000005, "input_length": 0, "output_length": 5, "hash_ids": []}
"""


def lists(trace):
    return trace.arrival_ns.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist()


def test_azure_keeps_ticks_of_100_ns(save):
    path = save(AZURE)
    trace = load_trace(path)
    trace.check_integrity()
    assert lists(trace) == ([0, 4314579000, 4541877100], [374, 396, 879], [44, 109, 55])
    assert (trace.format, trace.name, trace.source) == ("azure", "trace", str(path))
    assert trace.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert trace.notes == ()


@pytest.mark.parametrize(
    "stamps",
    [
        ["2024-05-10 00:00:00.009930+00:00", "2024-05-10 00:00:01.5+00:00"],
        ["2024-10-15T12:00:00.066Z", "2024-10-15T12:00:01.55607Z"],
        ["2024-10-15T12:00:00.066+02:00", "2024-10-15T06:30:01.55607-03:30"],
        ["2023-11-16 18:15:46.000000001", "2023-11-16 18:15:47.490070001"],
        ["2023-11-16 23:59:59.50993", "2023-11-17"],
    ],
)
def test_azure_stamps_of_later_years_and_other_exporters(save, stamps):
    trace = load_trace(
        save("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"{s},1,2\n" for s in stamps))
    )
    assert trace.arrival_ns[0] == 0
    assert trace.arrival_ns[1] == (490070000 if stamps[1] == "2023-11-17" else 1490070000)


def test_vidur_equals_azure_and_starts_at_zero(save, assert_same_rows):
    assert_same_rows(load_trace(save(VIDUR)), load_trace(save(AZURE, "azure.csv")))
    late = load_trace(save(VIDUR.replace("\n0.0,", "\n1.5,")))
    assert late.arrival_ns.tolist() == [0, 2814579000, 3041877100]


@pytest.mark.parametrize(
    ("texts", "ns"),
    [
        (["0", "0.30000000000000004"], 300000000),
        (["0", "1e-05"], 10000),
        (["0", "0.0000000005"], 0),  # a tie goes to the even nanosecond
        (["0", "0.0000000015"], 2),
        (["0", "0.00000000050000000000000001"], 1),
        (["1700068546.680590123", "1700068546.680590124"], 1),  # doubles here are 238 ns apart
        (["0", "9223372036.854775807"], 2**63 - 1),
    ],
)
def test_seconds_are_rounded_as_decimals(save, texts, ns):
    rows = "".join(f"{t},1,2\n" for t in texts)
    assert load_trace(save("arrived_at,num_prefill_tokens,num_decode_tokens\n" + rows)).arrival_ns[1] == ns


def test_vidur_lengths_have_no_arrivals(save):
    text = (
        "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n74,918,992,0.08\n290,905,1195,0.3\n"
    )
    trace = load_trace(save(text))
    assert not trace.has_arrivals and lists(trace) == ([0, 0], [74, 290], [918, 905])
    assert "no arrived_at" in trace.notes[0]
    with pytest.raises(UserError, match="no arrival times"):
        trace.scale_rate(2)


def test_mooncake(save):
    trace = load_trace(save(MOONCAKE, "m.jsonl"))
    trace.check_integrity()
    assert lists(trace) == ([0, 500_000_000, 900_000_000], [1100, 512, 0], [20, 30, 5])  # a tie to even
    assert (trace.prefix_unit, trace.prefix_offsets.tolist(), trace.prefix_ids.tolist()) == (
        512,
        [0, 3, 4, 4],
        [0, 1, 2, 7],
    )
    assert "line 3: input_length is 0, in 1 of 3" in trace.notes[0] and "empty_prompt" in trace.notes[0]


def test_mooncake_overrides(save):
    rows = (
        '{"timestamp": 1.5, "input_length": 40, "output_length": 2, "hash_ids": [4, 5, 6], "x": {"y": []}}\n'
    )
    trace = load_trace(save(rows + rows.replace("1.5", "2.75")), prefix_unit=16, time_unit="s")
    assert trace.prefix_unit == 16 and trace.arrival_ns.tolist() == [0, 1_250_000_000]
    bare = load_trace(save('{"timestamp": 0, "input_length": 40, "output_length": 2}\n'))
    assert bare.prefix_unit == 0 and bare.prefix_ids is None


def test_own_columns_as_csv_and_jsonl(save, assert_same_rows):
    as_csv = load_trace(
        save(
            "request_class,output_tokens,prompt_tokens,arrival_ns,priority,request_id\n"
            "chat,5,32,7,-1,a\n,6,0,9,2,b\n"
        )
    )
    as_jsonl = load_trace(
        save(
            '{"arrival_ns": 7, "prompt_tokens": 32, "output_tokens": 5, "priority": -1, '
            '"request_class": "chat", "request_id": "a"}\n'
            '{"arrival_ns": 9, "prompt_tokens": 0, "output_tokens": 6, "priority": 2, "request_class": null, '
            '"request_id": "b"}\n'
        )
    )
    assert_same_rows(as_csv, as_jsonl)
    assert as_csv.request_class.tolist() == ["chat", None] and as_csv.priority.tolist() == [-1, 2]
    ids = load_trace(
        save('{"prompt_tokens": 32, "output_tokens": 5, "prefix_ids": [3, 9]}\n'), prefix_unit=16
    )
    assert ids.prefix_ids.tolist() == [3, 9] and not ids.has_arrivals


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t + "\n",
        lambda t: t.replace("\n", "\r\n"),
        lambda t: t.replace("\n", "\r"),
        lambda t: "\ufeff" + t,
        lambda t: t.replace("\n", "\n\n"),
        lambda t: "\n" + t,
        lambda t: t + "\n\n  \n",
        lambda t: t.replace("374,44", '"374","44"'),
        lambda t: t.replace("374,44", "374.0,4.4e1"),
        lambda t: t.replace("374,44", " 374 ,+44"),
        lambda t: t.replace("374,44", "0x176,044"),
        lambda t: t.replace("TIMESTAMP,ContextTokens", '"TIMESTAMP", contexttokens'),
        lambda t: "\n".join(f'"a,b\nc{i}",{line}' for i, line in enumerate(t.split("\n"))),
        lambda t: "\n".join(f"{line},{'x' * 200_000}" for line in t.split("\n")),
        lambda t: "\n".join(f"{line},caf\xe9" for line in t.split("\n")).encode("latin-1"),
        lambda t: gzip.compress(t.encode()),
        lambda t: gzip.compress(t[:60].encode()) + gzip.compress(t[60:].encode()),
    ],
)
def test_same_rows_whatever_the_exporter_did(save, assert_same_rows, change):
    ref = load_trace(save(AZURE, "ref.csv"))
    got = load_trace(save(change(AZURE), "name.that.says.nothing.parquet"))
    assert_same_rows(got, ref)
    assert got.notes == ()


def test_empty_cells_below_the_table_are_counted(save, assert_same_rows):
    got = load_trace(save(AZURE + "\n,,\n , ,\n"))
    assert_same_rows(got, load_trace(save(AZURE, "ref.csv")))
    assert "line 5: the first of 2 rows of empty cells, all skipped" in got.notes[0]


@pytest.mark.parametrize(
    "text",
    [
        AZURE,
        AZURE.replace("690,", "690Z,").replace("900,", "900Z,").replace("671,", "671Z,"),
        VIDUR,
        "prompt_tokens,output_tokens,request_class\n1,2,a\n3,4,\n",
    ],
)
def test_fast_and_slow_csv_readers_agree(save, text):
    source = find(save(text))
    names, _ = tables.header(source)
    schema = match(source, "csv", names)
    fast, slow = tables.read_fast(source, schema, names), tables.read_slow(source, schema, names)
    for name in ("arrival", "prompt", "output", "request_class"):
        np.testing.assert_array_equal(getattr(fast, name), getattr(slow, name))
    assert fast.where(1) == slow.where(1) == "line 3"


def test_unsorted_rows_are_sorted_stably_with_their_ids(save):
    rows = [(50, 600, 1, [1, 2]), (10, 20, 2, [3]), (50, 30, 3, [4]), (10, 513, 4, [5, 6])]
    text = "".join(
        json.dumps({"timestamp": t, "input_length": p, "output_length": o, "hash_ids": ids}) + "\n"
        for t, p, o, ids in rows
    )
    trace = load_trace(save(text))
    trace.check_integrity()
    assert lists(trace) == ([0, 0, 40_000_000, 40_000_000], [20, 513, 600, 30], [2, 4, 1, 3])
    assert trace.prefix_ids.tolist() == [3, 5, 6, 1, 2, 4]
    assert "line 2: timestamp is earlier than in the row before, in 2 of 4" in trace.notes[0]


def test_format_can_be_named_instead_of_detected(save):
    both = (
        "TIMESTAMP,ContextTokens,GeneratedTokens,arrived_at,num_prefill_tokens,num_decode_tokens\n"
        "2023-11-16 18:15:46,1,2,0.5,3,4\n"
    )
    assert load_trace(save(both), format="vidur").prompt_tokens.tolist() == [3]
    assert load_trace(save(both), format="azure").prompt_tokens.tolist() == [1]


# Public files.


def test_public_azure_and_vidur_hold_the_same_requests(shared_trace, assert_same_rows):
    azure = load_trace(shared_trace("azure_llm_2023_conv.csv.gz"))
    vidur = load_trace(shared_trace("vidur_splitwise_conv.csv.gz"))
    assert len(azure) == 19_366 and azure.arrival_ns[-1] == 3_501_721_937_000
    assert_same_rows(azure, vidur)


@pytest.mark.parametrize(
    ("name", "format", "rows"),
    [
        ("azure_llm_2023_code.csv.gz", "azure", 8_819),
        ("vidur_sharegpt_8k_lengths.csv.gz", "vidur", 30_731),
        ("mooncake_conversation.jsonl.gz", "mooncake", 12_031),
        ("mooncake_arxiv_first1000.jsonl.gz", "mooncake", 1_000),
        ("servegen_m_small_derived.csv.gz", "vidur", 18_122),
        ("aiperf_example_trace.jsonl.gz", "mooncake", 3),
        ("format_samples/SYNTHETIC_azure_2024_header.csv.gz", "azure", 500),
        ("format_samples/SYNTHETIC_mooncake_toolagent_like.jsonl.gz", "mooncake", 4_000),
    ],
)
def test_public_files_have_the_rows_and_lengths_their_manifest_gives(shared_trace, name, format, rows):
    trace = load_trace(shared_trace(name))
    trace.check_integrity()
    assert (trace.format, len(trace), trace.notes if trace.has_arrivals else ()) == (format, rows, ())
    stats = {e["file"]: e.get("stats") for e in json.loads(shared_trace("manifest.json").read_text())}.get(
        name
    )
    if stats:
        about = trace.describe()
        for part in ("prompt", "output"):
            assert about[part] == {
                key: pytest.approx(stats[part][key], rel=1e-12) for key in ("mean", "p50", "p99")
            }
        if trace.has_arrivals:
            assert about["span_s"] == pytest.approx(stats["span"], abs=1e-6)


def test_importing_kvsim_trace_does_not_import_pyarrow():
    code = "import sys, kvsim.trace, kvsim.workload; sys.exit(bool({'pyarrow', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
