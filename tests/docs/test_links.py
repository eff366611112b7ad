"""Links lead somewhere, and every page can be reached."""

import pytest
from docs.pages import DOCS, PAGES, anchors, links, name


def target(page, link):
    file, _, anchor = link.partition("#")
    return (page.parent / file).resolve() if file else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page):
    for link in links(page):
        if "://" in link:
            continue
        file, anchor = target(page, link)
        assert file.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(file), f"{link}: no such heading"


def test_every_page_is_reached_from_the_index():
    reached, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        waiting += [target(page, link)[0] for link in links(page) if "://" not in link]
    assert {name(page) for page in PAGES if DOCS in page.parents} <= {
        name(page) for page in reached
    }
