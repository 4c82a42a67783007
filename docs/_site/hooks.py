"""What the site needs beside Markdown: formulas as MathML, and notebooks as pages.

MathML because browsers draw it by themselves: no script, no font and no server of others is needed
to read a formula.
"""

from __future__ import annotations

import base64
import html
import json
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', flags=re.DOTALL
)


def on_page_content(text: str, page: Page, **_: Any) -> str:
    """Formulas that arithmatex found, as MathML."""

    def formula(match: re.Match[str]) -> str:
        latex = html.unescape(match[3]).strip()
        display = "block" if match[2] == "[" else "inline"
        made = convert(latex, display=display)
        if "\\" in made:  # a command that the converter does not know is left as it was
            raise PluginError(f"{page.file.src_uri}: no MathML for {latex}")
        return f'<div class="formula">{made}</div>' if display == "block" else made

    return _FORMULA.sub(formula, text)


class Notebook(File):
    """A notebook that is a page of the site."""

    def is_documentation_page(self) -> bool:
        """It has a place in the navigation, and links to it lead to its page."""
        return True


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Notebooks become pages; their pictures and the notebooks themselves, files beside them."""
    for file in [f for f in files if f.src_uri.endswith(".ipynb")]:
        files.remove(file)
        page = Notebook(file.src_uri, config.docs_dir, config.site_dir, config.use_directory_urls)
        files.append(page)
        copy = File.generated(config, _download(file.src_uri), content=file.content_string)
        files.append(copy)
        for uri, content in _pictures(file.src_uri, file.content_string):
            files.append(File.generated(config, uri, content=content))
    return files


def on_page_read_source(page: Page, **_: Any) -> str | None:
    """A notebook as Markdown: cells, and below each what it printed and drew."""
    if not isinstance(page.file, Notebook):
        return None
    uri, text = page.file.src_uri, page.file.content_string
    pictures = iter(_pictures(uri, text))
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                parts.append(f"![output of the cell above]({next(pictures)[0].split('/')[-1]})")
            else:
                shown = output.get("text") or output["data"]["text/plain"]
                body = "".join(shown).rstrip()
                parts.append(f'<div class="output" markdown>\n\n```text\n{body}\n```\n\n</div>')
    copy = "/".join(_download(uri).split("/")[1:])
    parts.append(f'<a href="{copy}" download>This notebook</a>')
    return "\n\n".join(parts)


def _download(uri: str) -> str:
    folder, name = uri.rsplit("/", 1)
    return f"{folder}/files/{name}"


def _pictures(uri: str, text: str) -> list[tuple[str, bytes]]:
    outputs = [o for cell in json.loads(text)["cells"] for o in cell.get("outputs", [])]
    drawn = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    stem = uri.removesuffix(".ipynb")
    return [(f"{stem}-{i}.png", base64.b64decode(p)) for i, p in enumerate(drawn, 1)]
