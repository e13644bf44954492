"""The figure: what it shows, as a page that needs nothing else, and as PNG and SVG."""

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from kvsim.errors import UserError
from kvsim.report import figure as fig
from kvsim.report.html import page
from kvsim.report.plot import save_plot
from kvsim.run import simulate
from tests.report.runs import MAKERS, STEP, llama, run, trace


class Page(HTMLParser):
    """Tags with attributes, and the text of scripts and of everything else."""

    def __init__(self, data: bytes):
        super().__init__()
        self.tags, self.scripts, self.text, self.open = [], [], "", None
        self.feed(data.decode())
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    def embedded(self):
        return json.loads(self.scripts[0])


@pytest.mark.parametrize("name", MAKERS)
def test_the_page_is_self_contained(name):
    result = run(name)
    got = Page(page(result))
    assert {tag for tag, _ in got.tags} <= {
        "html", "head", "meta", "title", "style", "body", "header", "p", "dl", "div", "dt", "dd", "pre",
        "section", "table", "thead", "tbody", "tr", "th", "td", "noscript", "footer", "ul", "li", "script",
    }  # fmt: skip
    for _, attrs in got.tags:
        assert not {"src", "href", "srcset", "action", "data"} & set(attrs)
        assert not [key for key in attrs if key.startswith("on")]
    policy = next(a["content"] for _, a in got.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "connect-src" not in policy and "http" not in policy
    style = page(result).partition(b"<style>")[2].partition(b"</style>")[0]
    assert b"url(" not in style and b"@import" not in style and b"prefers-color-scheme: dark" in style
    assert "plotly.js v" in got.scripts[2] and len(got.scripts) == 4
    shown = got.embedded()
    assert shown.pop("config")["modeBarButtons"] == [["toImage", "zoom2d", "pan2d", "resetScale2d"]]
    assert shown == json.loads(json.dumps(fig.figure(result)))
    assert result.summary()["model"] in got.text


def test_header_and_tables_of_the_page():
    text = Page(page(run("calm"))).text
    for part in ("STABLE", "300 of 300 requests completed", "llama-3.1-8b on 1 x a100-80gb", "kvsim run calm",
                 "ttft", "kvsim 0.", "finished", "vllm 0.33.0 rules"):  # fmt: skip
        assert part in text
    text = Page(page(run("ends"))).text
    assert "prompt_ge_max_model_len" in text
    text = Page(page(run("does not load"))).text
    assert "DOES NOT START" in text and "weights" in text and "131.45 GiB" in text


def test_hostile_names_are_text():
    nasty = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\u2028\x1b[31m"
    ids = np.array([nasty, nasty], object)
    made = trace([(0.0, 600, 5), (1.0, 20, 5)], name=nasty, source=nasty, request_id=ids, request_class=ids)
    result = simulate(made, llama(max_model_len=512), step_time=STEP, command=f"kvsim run {nasty}")
    result = type(result)(**{**result.__dict__, "notes": (nasty,)})
    data = page(result)
    got = Page(data)
    assert "img" not in [tag for tag, _ in got.tags] and len(got.scripts) == 4
    assert "<img src=x onerror=alert(2)>&" in got.text and "\x1b" not in got.text
    assert b"alert(1)" not in data.replace(b"&lt;script&gt;alert(1)", b"")
    got.embedded()


def test_the_embedded_json_cannot_end_its_script():
    from kvsim.report.html import _embedded

    data = {"a": "</script><!--<script>&\u2028"}
    text = _embedded(data)
    assert not set(b"<>&") & set(text) and json.loads(text) == data


def test_marks_tell_request_cause_blocks_and_tokens():
    result = run("pressed")
    events = [e for e in result.events.to_pylist() if e["kind"] == "preempt"]
    (marks,) = fig.panels(result).marks
    assert (marks.kind, marks.total, marks.by_bin) == ("preempt", len(events), False)
    assert marks.number.sum() == len(events)
    assert list(marks.time_ns) == sorted({e["time_ns"] for e in events})
    first = events[0]
    lines = marks.text[0].split("\n")
    assert lines[0] == f"request {first['request']} preempted at {first['time_ns'] / 1e9:,.3f} s"
    assert lines[1].startswith(f"{first['cause']}: ")
    given = first["blocks_free_after"] - first["blocks_free_before"]
    assert f"{given} given back, {first['tokens_lost']:,} tokens lost" in lines[2]


def test_many_marks_are_counted_by_bin_exactly():
    result = run("many marks")
    summary, p = result.summary(), fig.panels(result)
    by_kind = {marks.kind: marks for marks in p.marks}
    assert set(by_kind) == {"preempt", "reject", "time_out"}
    assert by_kind["preempt"].total == summary["num_preemptions"]
    for kind in ("reject", "time_out"):
        marks = by_kind[kind]
        assert marks.total == summary["outcomes"][fig.OUTCOME_OF[kind]]
        assert marks.number.sum() == marks.total
        assert marks.by_bin == (marks.total > fig.MAX_MARKS)
        assert len(marks.text) == len(marks.number) <= len(p.start_ns) if marks.by_bin else True
    assert by_kind["reject"].by_bin
    assert (
        "prompt_ge_max_model_len" in by_kind["reject"].text[0]
        and "the first: request" in by_kind["reject"].text[0]
    )
    titles = [a["text"] for a in fig.figure(result)["layout"]["annotations"]]
    assert any("a bar counts" in title for title in titles)


@pytest.mark.parametrize("name", ["no events", "summary"])
def test_without_events_marks_come_from_what_was_kept(name):
    result = run(name)
    summary = result.summary()
    totals = {marks.kind: marks.total for marks in fig.panels(result).marks}
    assert totals == {"preempt": summary["num_preemptions"], "reject": summary["outcomes"]["rejected"]}


def test_levels_are_those_of_the_bins():
    result = run("pressed")
    p, bins = fig.panels(result), result.bins
    assert p.capacity == 120 and p.used_max.max() == result.summary()["peak_blocks_used"]
    tokens = (p.prefill_per_s * np.diff(np.append(p.rate_start_ns, p.end_ns))).sum() / 1e9
    assert round(tokens) == bins["prefill_tokens"].to_numpy().sum()
    used = fig.figure(result)["data"][1]
    assert len(used["x"]) == len(used["y"]) == bins.num_rows + 1
    assert (
        used["customdata"][5] == round(used["y"][5] / 1.2, 2)
        or abs(used["customdata"][5] - used["y"][5] / 1.2) < 0.02
    )


def test_more_bins_than_columns_are_merged(monkeypatch):
    result = run("pressed")
    monkeypatch.setattr(fig, "MAX_BINS", 100)
    p = fig.panels(result)
    bins = result.bins
    assert len(p.start_ns) <= 100 and p.used_max.max() == bins["blocks_used_max"].to_numpy().max()
    ref = (bins["blocks_used_mean"].to_numpy() * bins["width_ns"].to_numpy()).sum()
    got = (p.used_mean * np.diff(np.append(p.start_ns, p.end_ns))).sum()
    assert got == pytest.approx(ref)


@pytest.mark.parametrize("name", MAKERS)
def test_plotly_takes_the_figure(name):
    figure = run(name).timeline().plot()
    from plotly.graph_objects import Figure

    assert isinstance(figure, Figure) and len(figure.data) >= 1


def test_a_page_does_not_import_plotly():
    code = (
        "import sys; from tests.report.runs import run; from kvsim.report.html import page; page(run('one'));"
        "assert 'plotly' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["pressed", "many marks", "calm", "one", "does not start", "nothing completed"]
)
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_png_and_svg_are_the_same_twice(name, kind, tmp_path):
    pytest.importorskip("matplotlib", reason="needs pip install 'kvsim[plot]'")
    first = save_plot(run(name), tmp_path / f"a.{kind}").read_bytes()
    second = save_plot(run(name), tmp_path / f"b.{kind}").read_bytes()
    assert first == second and len(first) > 5_000
    assert first.startswith(b"\x89PNG" if kind == "png" else b"<?xml")


def test_plots_that_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"x\.pdf: give a file name that ends in \.png, \.svg or \.html"):
        save_plot(run("one"), tmp_path / "x.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'kvsim\[plot\]'"):
        save_plot(run("one"), tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "what", "expected"),
    [
        ("pressed", "timeline", "KV blocks in use"),
        ("many marks", "timeline", "KV blocks in use"),
        ("does not load", "timeline", "load_oom (weights)"),
        ("first-fit", "timeline", "external (free, too small pieces)"),
        ("first-fit", "map", "Memory map of first-fit, GiB"),
    ],
)
def test_a_browser_draws_it(name, what, expected, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("needs the browser chromium (apt-get install chromium)")
    (tmp_path / "timeline.html").write_bytes(page(run(name), what))
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    )
    done = subprocess.run(
        [browser, *flags.split(), "--disable-component-update", "--virtual-time-budget=4000", "--dump-dom",
         "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path}/timeline.html"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    assert 'class="main-svg"' in done.stdout
    assert (
        expected in done.stdout.rpartition('class="main-svg"')[2]
        or expected in done.stdout.partition("<noscript")[0]
    )
