"""Docstrings of fewstep as Markdown, for the reference.

They are plain text: a paragraph that begins with "name: ..." describes parameters, indented lines
are formulas or code, and backquoted names of the package are links.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Set
from pathlib import Path
from typing import Any

import griffe

_PARAMETER = re.compile(r"([a-z_]\w*(?:, (?:\.\.\.|[a-z_]\w*))*): ")
_CODE = re.compile(r"^(from|import|pipe\.|model = |\w+ = fewstep)|\bfs\.|\bawait\b", re.MULTILINE)
_EXPORTED = re.compile(r"``?(fewstep(?:\.[A-Za-z_]\w*)+)``?")


def markdown(text: str, names: set[str], parameters: Set[str] = frozenset()) -> str:
    """One docstring; names: full names that the reference has; parameters: of what it describes."""
    parts: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        lines = paragraph.split("\n")
        if all(line.startswith("    ") for line in lines):
            numbered = parts and re.match(r"\d\. ", parts[-1])
            code = textwrap.dedent(paragraph)
            fence = f"```{'python' if _CODE.search(code) else 'text'}\n{code}\n```"
            parts.append(textwrap.indent(fence, "    ") if numbered else fence)
        elif _PARAMETER.match(paragraph):
            parts.append("\n".join(_items(lines, parameters)))
        elif all(line.startswith((">>> ", "... ")) for line in lines):
            parts.append("```python\n" + "\n".join(line[4:] for line in lines) + "\n```")
        else:
            items = re.sub(r"\n(?=- )", "\n\n", paragraph)  # a list needs a line before it
            parts.append(_escaped(items))
    linked = "\n\n".join(parts)
    return _EXPORTED.sub(lambda m: f"[`{m[1]}`][{m[1]}]" if m[1] in names else m[0], linked)


def _items(lines: list[str], parameters: Set[str]) -> list[str]:
    """One item for every parameter, also where several are described on one line."""
    text = ""
    for line in lines:
        new = text and _PARAMETER.match(line)
        text += ("\n" if new else " ") + line.strip()

    def split(match: re.Match[str]) -> str:
        known = set(match[1].split(", ")) <= parameters | {"..."}
        return ("\n" if known else " ") + match[0].lstrip()

    text = re.sub(rf"(?<=[.)]) {_PARAMETER.pattern}", split, text.strip())
    items = []
    for line in text.split("\n"):
        name, rest = line.split(": ", 1)
        items.append(f"- `{name}`: {_escaped(rest)}")
    return items


def _parameters(of: griffe.Object) -> set[str]:
    if isinstance(of, griffe.Function):
        return {p.name for p in of.parameters}
    return {name for name in of.members if not name.startswith("_")}


def _escaped(text: str) -> str:
    """Formulas are no Markdown: outside backquotes, stars and brackets are themselves."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([*<\[\]_$])", r"\\\1", p) for p in parts)


def _comment(attribute: griffe.Attribute) -> str:
    """The lines "#: ..." above an attribute, which are its documentation."""
    if not isinstance(attribute.filepath, Path) or attribute.lineno is None:
        return ""
    above = attribute.filepath.read_text().splitlines()[: attribute.lineno - 1]
    lines: list[str] = []
    while above and above[-1].startswith("#: "):
        lines.insert(0, above.pop().removeprefix("#: "))
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Rewrites every docstring once the package is read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """`pkg`: the whole package."""
        names = {f"fewstep.{name}" for name in pkg.members if not name.startswith("_")}
        self._rewrite(pkg, names)

    def _rewrite(self, of: griffe.Object, names: set[str]) -> None:
        if of.docstring is None and isinstance(of, griffe.Attribute):
            comment = _comment(of)
            if comment:
                of.docstring = griffe.Docstring(comment, parent=of)
        if of.docstring is not None:
            of.docstring.value = markdown(of.docstring.value, names, _parameters(of))
        for member in of.members.values():
            if not member.is_alias:
                self._rewrite(member, names)  # type: ignore[arg-type]
