"""The example of docs/design/model-families.md: its family is registered, its test is this file's."""

import re

import pytest
from pages import ROOT, run_block

from losart.loaders import families

PAGE = "docs/design/model-families.md"
FAMILIES = dict(vars(families))
run_block(PAGE, 0, FAMILIES)
entry = re.search(r"add `(.*)` to `FAMILIES`", (ROOT / PAGE).read_text("utf-8"))[1]
FAMILIES["FAMILIES"] = FAMILIES["FAMILIES"] | eval(f"{{{entry}}}", FAMILIES)
run_block(PAGE, 1, globals())


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", FAMILIES["FAMILIES"])


def test_the_page_keeps_the_families_that_there_are():
    assert set(FAMILIES["FAMILIES"]) == {*families.SUPPORTED_MODEL_TYPES, "example"}
