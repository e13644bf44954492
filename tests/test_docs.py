"""The documentation does what it says: a page's Python and `kvsim` lines run, in order, in an empty folder.

HTML comments before a block change what is expected: `<!-- exit 2 -->` of every command in it, `<!-- not run:
reason -->` skips it, `<!-- output -->` says that each line of a text block was printed by the block before.
"""

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from kvsim import _jit
from kvsim.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]
FENCE = re.compile(
    r"(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
RULE = re.compile(r"(?<![\d.,])([1-6]\.\d{1,2})(?:\s*(?:-|to)\s*([1-6]\.\d{1,2}))?(?![\d.]*\d)")


class Block(NamedTuple):
    mark: str
    language: str
    body: str
    line: int


def blocks(path):
    text = path.read_text()
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("body")) + 1
        yield Block(match["mark"] or "", match["language"], match["body"], line)


@pytest.mark.skipif(_jit.is_disabled(), reason="whole traces take minutes in plain Python")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_page(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, printed = {"__name__": "__page__"}, ""
    for block in blocks(path):
        where = f"{path.name}:{block.line}"
        if block.mark.startswith("not run: "):
            continue
        if block.language == "python":
            printed = run_python(block, path, names)
        elif block.language in ("console", "sh"):
            printed = run_commands(block, where)
        elif block.mark == "output":
            missing = [line for line in block.body.splitlines() if line not in printed]
            assert not missing, f"{where}: not printed by the block before: {missing}\n{printed}"


def run_python(block, path, names):
    code = compile("\n" * (block.line - 1) + block.body, str(path), "exec")
    with captured() as out:
        exec(code, names)
    return out.getvalue()


def run_commands(block, where):
    wanted = int(block.mark.removeprefix("exit ")) if block.mark.startswith("exit ") else 0
    lines = [line.removeprefix("$ ") for line in block.body.replace("\\\n", " ").splitlines()]
    with captured() as out:
        for line in lines:
            if line.startswith("kvsim "):
                words = shlex.split(line, comments=True)[1:]
                code = main(words)
                assert code == wanted, f"{where}: exit {code} of: {line}\n{out.getvalue()}"
    return out.getvalue()


@contextlib.contextmanager
def captured():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        yield out


def rules_in(text):
    """The rules that `text` names, ranges such as 3.3-3.9 filled in."""
    for first, last in RULE.findall(text):
        part, _, start = first.partition(".")
        for number in range(int(start), int((last or first).partition(".")[2]) + 1):
            yield f"{part}.{number}"


def test_every_rule_that_the_code_cites_is_explained():
    explained = set()
    for page in ("scheduler.md", "deployment.md"):
        for bold in re.findall(r"\*\*([\d., ]+(?:to [\d.]+)?)\*\*", (ROOT / "docs" / page).read_text()):
            explained |= set(rules_in(bold))
    cited = set()
    for path in sorted((ROOT / "kvsim").glob("*/*.py")):
        if path.parent.name in ("engine", "memory"):
            comments = "\n".join(re.findall(r'#.*|"""(?:.|\n)*?"""', path.read_text()))
            parts = "123" if path.parent.name == "engine" else "5"  # other numbers there are GiB
            cited |= {rule for rule in rules_in(comments) if rule[0] in parts}
    assert len(cited) > 20
    assert cited <= explained, sorted(cited - explained)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", text):
        if target and "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}, which is not there"


def test_every_claim_on_the_page_has_a_test():
    """docs/claims.md says that each of its rows is a test by its id."""
    rows = re.findall(
        r"^\| ((?:[A-E]\d\d(?:, )?)+) \|", (ROOT / "docs" / "claims.md").read_text(), re.MULTILINE
    )
    ids = {name for row in rows for name in row.split(", ")}
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    tested = {
        name
        for names in re.findall(r"def test_(?:claims?_)?((?:[A-E]\d\d_)+)", tests)
        for name in names.split("_")
    }
    assert len(ids) > 20 and ids <= tested
