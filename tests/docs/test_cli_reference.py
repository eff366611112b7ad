"""reference/cli.md is what `--help` prints."""

import runpy

from docs.pages import DOCS


def test_the_page_is_up_to_date():
    generator = runpy.run_path(str(DOCS / "cli_reference.py"))
    page = (DOCS / "reference/cli.md").read_text(encoding="utf-8")
    assert page == generator["render"](), "run: python docs/cli_reference.py"
