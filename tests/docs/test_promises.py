"""Every promise has tests that exist, and every guard of faults is named by a promise."""

import ast
import re

import pytest
from docs.pages import DOCS, ROOT

PAGE = (DOCS / "explanation/what-we-promise.md").read_text(encoding="utf-8")
GUARDS = sorted(set(re.findall(r"`([\w/-]+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize(("file", "name"), GUARDS)
def test_the_test_that_guards_a_promise_is_there(file, name):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_promise_has_a_guard():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith(("| when |", "| promise |", "| --- |"))]
    assert len(promises) > 20
    assert all("::test_" in row for row in promises)


def test_every_fault_that_is_tried_is_promised():
    named = {name for file, name in GUARDS if file.startswith("tests/faults/")}
    there = set()
    for file in ("test_injected.py", "test_power_loss.py"):
        tree = ast.parse((ROOT / "tests/faults" / file).read_text(encoding="utf-8"))
        there |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {name for name in there if name.startswith("test_")} <= named
