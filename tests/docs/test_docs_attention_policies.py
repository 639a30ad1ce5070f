"""The example of docs/design/attention-policies.md: its policy is registered, its tests are this file's."""

import pytest
from pages import run_block

from losart.attention import POLICIES

PAGE = "docs/design/attention-policies.md"
POLICY = {"__name__": "losart.attention.window"}
run_block(PAGE, 0, POLICY)
run_block(PAGE, 1, globals())


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(POLICIES, "window", POLICY["WindowPolicy"])


def test_the_page_has_its_tests():
    assert "test_a_window_reads_its_budget" in globals()
