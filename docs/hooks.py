"""What the site's builder needs to know of pages that are also read in the repository."""

import re

REPOSITORY = re.compile(r"\]\((?:\.\./)+((?:src|benchmarks|examples|tests)/[^)\s]*|[A-Z]+\.(?:md|cff))\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links from a page to a file of the repository outside docs/ become that file's name: the site holds the pages only."""
    return REPOSITORY.sub(r"](#){ title='\1, in the repository' }", markdown)
