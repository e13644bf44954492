"""The compiled engine against the real scheduler's answers to small random cases: every row, the final state."""

import pytest

from tests.conformance import golden
from tests.conformance.compare import difference

GOLDEN = {row["case"]["name"]: row for row in golden.load()}


@pytest.mark.parametrize("name", GOLDEN)
def test_equals_the_real_scheduler(name):
    assert difference(GOLDEN[name]["case"], GOLDEN[name]["answer"]) is None
