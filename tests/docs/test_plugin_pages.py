"""The plugins that the pages spell out work as they stand there."""

import importlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from docs.pages import DOCS, ROOT, blocks

import mgen_core
from mgen_core.catalog import Catalog, discover
from mgen_core.config import make_config
from mgen_core.merge import Selection, merge
from mgen_core.run import run
from mgen_core.screen import Screen
from mgen_core.testing import check_backbone

MINE = ("mgen_tinydna", "mgen_spread", "mgen_lines", "mgen_profiles")


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Writes the files of a page and gives the catalog that its plugin makes."""

    def extracted(page, package):
        for block in blocks(DOCS / "plugins" / page):
            if block.file:
                path = tmp_path / block.file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
        (tmp_path / package / "__init__.py").touch()
        shutil.copytree(ROOT / "examples", tmp_path / "examples")
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        module = importlib.import_module(f"{package}.plugin")
        mine = Catalog.of(module)
        assert not mine.plugins[0].problem
        return Catalog((*discover().plugins, *mine.plugins))

    yield extracted
    for name in [name for name in sys.modules if name.startswith(MINE)]:
        del sys.modules[name]


def test_the_backbone_keeps_the_contract(plugin):
    check_backbone("tinydna", catalog=plugin("your-first-backbone.md", "mgen_tinydna"))


def test_the_backbone_embeds(plugin):
    catalog = plugin("your-first-backbone.md", "mgen_tinydna")
    rows = {"id": ["a", "b", "c"], "sequence": ["ACGT", "ACXT", "gg"]}
    table = mgen_core.embed(rows, backbone="tinydna", catalog=catalog)
    assert table["id"].to_pylist() == ["a", "b", "c"]
    assert [vector is None for vector in table["embedding"].to_pylist()] == [False, True, False]
    assert table["error"].to_pylist()[1] == "illegal character 'X' at position 3"


def test_the_project_file_names_the_module_of_the_cards(plugin, tmp_path):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    plugin("your-first-backbone.md", "mgen_tinydna")
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    (module,) = project["entry-points"]["mgen"].values()
    assert hasattr(importlib.import_module(module), "mgen_backbones")
    assert f"mgen>={mgen_core.__version__.rpartition('.')[0]}" in project["dependencies"][0]


def test_the_tests_that_the_pages_show(plugin, tmp_path):
    plugin("your-first-backbone.md", "mgen_tinydna")
    pages = [DOCS / "plugins/your-first-backbone.md", DOCS / "plugins/testing.md"]
    shown = {}
    for block in (block for page in pages for block in blocks(page)):
        if "def test_" in block.text:
            exec(block.text, shown)
    shown["test_embeds"]()
    installed = tmp_path / "mgen_tinydna-0.1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Name: mgen-tinydna\nVersion: 0.1.0\n")
    (installed / "entry_points.txt").write_text("[mgen]\ntinydna = mgen_tinydna.plugin\n")
    importlib.invalidate_caches()
    shown["test_installed"]()
    shown["test_contract"]()


def test_the_task_runs(plugin, monkeypatch):
    catalog = plugin("your-first-task.md", "mgen_spread")
    monkeypatch.setattr("mgen_core.notebook.discover", lambda: catalog)
    (shown,) = [
        block
        for block in blocks(DOCS / "plugins/your-first-task.md")
        if block.language == "python" and not block.file
    ]
    names = {}
    exec(shown.text, names)
    table = names["table"]
    assert table.column_names == ["row", "id", "spread"] and table.num_rows == 17
    assert all(value >= 0 for value in table["spread"][0].as_py())


def test_the_reader_and_the_writer(plugin):
    catalog = plugin("reader-and-writer.md", "mgen_lines")
    Path("lines.txt").write_text("ACGT\nGG\nTTT\n")
    values = {"task": "embed", "backbone": "dna_onehot", "data": "lines.txt", "writer": "arrow"}
    run(make_config({**values, "output": Path("out")}), catalog, Screen())
    merged = merge(Path("out"), Path("out.arrow"), catalog, Selection())
    table = pa.ipc.open_file("out.arrow").read_all()
    assert merged.rows == table.num_rows == 3
    assert table.equals(mgen_core.read("out", catalog=catalog))


def test_rows_that_are_no_sequences(plugin):
    catalog = plugin("other-inputs.md", "mgen_profiles")
    matrix = np.array([[1, 2, 3], [4, np.nan, 6], [1, 2, 3]], dtype=np.float64)
    np.save("samples.npy", matrix)
    same = {"backbone": "profiles", "catalog": catalog, "pool": "tokens"}
    found = mgen_core.embed("samples.npy", **same)
    assert found["error"].to_pylist() == [None, "no number at weight", None]
    assert found.schema.field("embedding").type == pa.list_(pa.list_(pa.float32(), 8), 3)
    assert found.schema.metadata[b"mgen.tokens"] == b'["height", "weight", "age"]'
    again = mgen_core.embed(matrix, **same)
    assert again["embedding"].equals(found["embedding"])
    wide = mgen_core.embed(np.ones((1, 3)), **{**same, "pool": "mean"})
    assert len(wide["embedding"][0]) == 8
