"""What the explanation says about the source is so."""

import ast
import re

from docs.pages import DOCS, ROOT, section

PAGE = DOCS / "explanation/how-a-run-walks.md"
CORE = ROOT / "mgen_core"


def test_the_walk_is_in_the_order_of_the_source():
    table = PAGE.read_text(encoding="utf-8").split("\n## ")[0]
    told = [
        name
        for line in re.findall(r"^\| \d+ \| (.*?) \|", table, re.M)
        for name in line.split(", ")
    ]
    (walk,) = [
        node
        for node in ast.parse((CORE / "run.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "run"
    ]
    calls = [node for node in ast.walk(walk) if isinstance(node, ast.Call)]
    calls.sort(key=lambda call: (call.lineno, call.col_offset))
    called = [call.func.id for call in calls if isinstance(call.func, ast.Name)]
    names = [name.strip("`") for name in told]
    assert [name for name in called if name in names] == names


def test_every_file_that_is_named_is_there():
    for name in re.findall(r"`([\w/]+\.py)`", PAGE.read_text(encoding="utf-8")):
        places = [CORE / name, *ROOT.glob(f"plugins/*/*/{name}"), CORE.parent / name]
        assert any(place.exists() for place in places), name


def test_the_files_that_import_torch():
    told = re.findall(r"`([\w/]+\.py)`", section(PAGE, "Which files may import torch?"))
    found = [str(path.relative_to(CORE)) for path in CORE.rglob("*.py") if imports_torch(path)]
    assert sorted(told) == sorted(found)


def imports_torch(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):  # what only a type checker reads is no import
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    names = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return any(name.split(".")[0] == "torch" for name in names)
