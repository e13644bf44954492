"""The commands of docs/catalogue.md run as they are written."""

import re
import shlex
from pathlib import Path

import pytest

from kvsim.cli import main

PAGE = Path(__file__).resolve().parents[1] / "docs" / "catalogue.md"
BLOCKS = re.findall(r"```console\n(.*?)```", PAGE.read_text(), re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, capsys):
    words = shlex.split(command, comments=True)
    assert words[0] == "kvsim" and main(words[1:]) == 0
    assert capsys.readouterr().out
