"""What the site's builder must know of pages that are also read in the repository."""

import re

OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+((?:src|benchmarks|examples|tests|README|ARCHITECTURE|CHANGELOG|CONTRIBUTING)[^)\s]*)\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """A link to a file of the repository outside docs/ becomes that file's name: the site holds the pages only."""
    return OUTSIDE.sub(lambda link: link[1] if link[1].strip("`") in link[2] else f"{link[1]} (`{link[2]}`)", markdown)
