"""docs/published.md: what was reached here is what the models' pages say, and stands apart from what papers report."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
PUBLISHED, REACHED = (DOCS / "published.md").read_text().split("## Reached here")


def test_what_was_reached_is_on_the_pages():
    rows = re.findall(r"\| ([\d.]+(?: %)?) \| \[\w+\]\((models/\w+\.md)\) \|", REACHED)
    assert len(rows) == len(re.findall(r"^\| .*\.md\) \|$", REACHED, re.MULTILINE)) >= 7
    for number, page in rows:
        assert number in (DOCS / page).read_text(), (number, page)


def test_published_and_reached_are_not_mixed():
    assert "models/" not in PUBLISHED and "arxiv" not in REACHED
    for table in re.findall(r"(?:^\|.*\n)+", PUBLISHED, re.MULTILINE):  # each names its source, in itself or above
        before = PUBLISHED[: PUBLISHED.index(table)].rpartition("\n#")[2]
        assert "arxiv.org" in table or "arxiv.org" in before
