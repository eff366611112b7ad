"""Code blocks marked `<!-- run -->` run, and print what the `text` block after them shows.

A page is one session in one folder that holds `examples/`. In what is shown, `...` stands for
anything, and times and sizes may differ. `<!-- run mgen -->` runs only the lines that start so;
`<!-- run, exit 1 -->` expects that exit code. With MGEN_DOCS_REWRITE=1 in the environment, what is
shown and no longer true is replaced by what is printed: read the diff.
"""

import os
import re
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from docs.pages import PAGES, ROOT, blocks, name

from mgen_core import BackboneCard, PluginError
from mgen_core.catalog import discover
from mgen_core.hub import locate

BACKBONE = re.compile(r"""--backbone (\w+)|backbone="(\w+)\"""")
MEASURED = re.compile(r"\d[\d.,]* (s|bytes|kB|MB|GB|tokens/s)\b")
SCRIPTS = Path(sys.executable).parent


def steps(page):
    """Each block to run, and what it should print (None: anything)."""
    found = blocks(page)
    for block, after in zip(found, [*found[1:], None]):
        if block.mark.startswith("run"):
            shown = after is not None and after.language == "text" and not after.mark
            yield block, after.text if shown else None


def skip_unless_ready(page):
    if not (SCRIPTS / "mgen").exists():
        pytest.skip("the mgen script is not installed beside this Python")
    need_none = "exit", "--plan-only"
    texts = [f"{block.mark} {block.text}" for block, _ in steps(page)]
    text = "".join(text for text in texts if not any(word in text for word in need_none))
    for backbone in {*filter(None, chain(*BACKBONE.findall(text)))}:
        try:
            card = discover().find(BackboneCard, backbone)
        except PluginError:
            pytest.skip(f"backbone {backbone} is not installed")
        if card.weights and locate(None, card, None, download=False) is None:
            pytest.skip(f"the weights of {backbone} are not on this machine")


def command(block):
    if block.language == "python":
        return [sys.executable, "-c", block.text]
    only = re.fullmatch(r"run (\w+)", block.mark)
    lines = block.text.splitlines()
    if only:
        lines = [line for line in lines if line.startswith(only[1])]
    return ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]


def pattern(shown):
    """What is shown, as a regular expression."""
    parts = [re.escape(MEASURED.sub(r"# \1", part)) for part in shown.strip().split("...")]
    return re.compile(".*?".join(parts), re.DOTALL)


def said(output):
    lines = [line.rstrip() for line in output.splitlines()]
    return MEASURED.sub(r"# \1", "\n".join(lines)).strip()


def rewrite(page, shown, printed):
    lines = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
    text = page.read_text(encoding="utf-8")
    page.write_text(
        text.replace(f"```text\n{shown}```", f"```text\n{lines}```", 1), encoding="utf-8"
    )


@pytest.mark.parametrize("page", [page for page in PAGES if any(steps(page))], ids=name)
def test_the_blocks_of_a_page(page, tmp_path):
    skip_unless_ready(page)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    for block, shown in steps(page):
        done = subprocess.run(
            command(block),
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        where = f"{name(page)}, line {block.line}"
        code = re.search(r"exit (\d+)", block.mark)
        assert done.returncode == (int(code[1]) if code else 0), f"{where}:\n{done.stdout}"
        if shown is not None:
            fits = pattern(shown).fullmatch(said(done.stdout))
            if not fits and os.environ.get("MGEN_DOCS_REWRITE"):
                rewrite(page, shown, done.stdout)
                continue
            assert fits, f"{where} prints:\n{done.stdout}\nbut the page shows:\n{shown}"
