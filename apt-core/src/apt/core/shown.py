"""Text that nobody has chosen, such as a model's, as a terminal may show it."""

from __future__ import annotations

import unicodedata


def harmless(text: str) -> str:
    """The text with its control characters, which a terminal would obey, escaped; it may have lines and tabs."""
    return "".join(
        repr(each)[1:-1] if unicodedata.category(each) == "Cc" and each not in "\n\t" else each for each in text
    )
