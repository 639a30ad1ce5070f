"""The example of docs/model-families.md: its family is registered, its test is this file's."""

import pytest
from pages import run_block

from losart.loaders.families import sdar as families

PAGE = "docs/model-families.md"
FAMILIES = dict(vars(families))
run_block(PAGE, 0, FAMILIES)
run_block(PAGE, 1, globals())


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES", FAMILIES["_FAMILIES"])


def test_the_page_keeps_the_families_that_there_are():
    assert set(FAMILIES["_FAMILIES"]) == {*families.SUPPORTED_MODEL_TYPES, "example"}
