"""README, CONTRIBUTING and the pages: their link targets exist."""
import json
import re
from pathlib import Path

import pytest
import stillmotion
from stillmotion.nodes import NODES, load_nodes

PACK = Path(stillmotion.__file__).parent
PAGES = sorted([PACK / "README.md", PACK / "CONTRIBUTING.md", *(PACK / "web" / "pages").glob("*.md")])


def anchors(path):
    """The anchors of a page's headings, as GitHub generates them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    for target, _, anchor in (link.partition("#") for link in links if not link.startswith("https://")):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_commands_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"\b(?:nodes|workflows|tests|web)/[\w/.-]+\.(?:py|json|md|webp|svg)\b", text)
    assert [path for path in named if "NAME" not in path and not (PACK / path).exists()] == []


def test_the_readme_shows_first_what_a_newcomer_needs():
    text = (PACK / "README.md").read_text(encoding="utf-8")
    assert "python tests/run.py" in "\n".join(text.splitlines()[:20])
    assert len(text.splitlines()) < 120
    assert (PACK / "web" / "pages" / "animate.webp").stat().st_size < 300_000


def test_where_to_change_names_functions_that_are_there():
    text = (PACK / "CONTRIBUTING.md").read_text(encoding="utf-8")
    pairs = re.findall(r"`(\w+)` in\s+`(nodes/[\w/.]+\.py)`", text)
    assert len(pairs) >= 4
    for name, path in pairs:
        text = (PACK / path).read_text(encoding="utf-8")
        assert re.search(rf"^(?:def |class )?{name}\b", text, re.MULTILINE), (name, path)


def test_every_node_is_in_the_table():
    text = (PACK / "web" / "pages" / "nodes.md").read_text(encoding="utf-8")
    names = [node.GET_SCHEMA().display_name for node in load_nodes(NODES)]
    assert [name for name in names if name not in text] == []


def test_every_template_is_in_the_table_in_order():
    text = (PACK / "web" / "pages" / "graphs.md").read_text(encoding="utf-8")
    rows = [f"| {e['title']} | {e['name']} | {e['description']} |"
            for e in json.loads((PACK / "web" / "templates.json").read_text())]
    assert "\n".join(rows) in text
