"""Writes reference.md: every provider of the project, its options and its scheduled values, from the providers themselves.

``python docs/make_reference.py``; a test fails where the page is out of date.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from apt.cli.inspecting import describe_options
from apt.core.registry import registry

PAGE = Path(__file__).parent / "reference.md"
OURS = ("apt-core", "apt-attention-tva", "apt-moe", "apt-align", "apt-rag")
HEAD = """\
# Reference of providers

Made by `docs/make_reference.py` from the providers themselves; `apt-core providers show KIND.NAME` prints the same for
any package.
"""


def write() -> str:
    """The page."""
    lines = [HEAD]
    for distribution in OURS:
        lines += [f"## {distribution}", ""]
        for record in registry.records():
            if record.distribution == distribution and record.kind != "command":
                lines += section(record.kind, record.name)
    return "\n".join(lines).rstrip() + "\n"


def section(kind: str, name: str) -> list[str]:
    """One provider."""
    provider = registry.load(kind, name)
    lines = [f"### `{kind}.{name}`", "", inspect.cleandoc(provider.__doc__ or ""), ""]
    if provider.model_fields:
        lines += ["| option | type | default | what |", "| --- | --- | --- | --- |"]
        for option, *words in describe_options(provider):
            cells = [each.replace("|", "\\|") for each in words]
            lines.append(f"| `{option}` | {' | '.join(cells)} |")
        lines.append("")
    if provider.scheduled:
        lines += [f"Scheduled values: {', '.join(f'`{value}`' for value in provider.scheduled)}.", ""]
    if provider.switched_by:
        lines += [f"Switched on by the plugin `{provider.switched_by}`.", ""]
    return lines


if __name__ == "__main__":
    PAGE.write_text(write())
