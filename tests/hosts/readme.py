"""The scripts of the README, so that what is tested is what is printed there."""

from __future__ import annotations

import re

from .openood_tree import REPOSITORY


def script(section: str) -> str:
    """The one Python block of a section, by the section's title."""
    _, text = (REPOSITORY / "README.md").read_text().split(f"\n## {section}\n")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text.split("\n## ")[0], re.DOTALL | re.MULTILINE)
    return code
