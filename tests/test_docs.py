"""Every Python block of the documents runs; every printed plan is what is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fewstep as fs
import peers

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/generate.md", "docs/integrations.md")


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("name", "block"),
    [(n, b) for n in DOCUMENTS for b in blocks(n, "python")],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_python_blocks_run(name, block, tmp_path, monkeypatch, capsys):
    if "import deepinv" in block:
        peers.deepinv()
    monkeypatch.chdir(tmp_path)
    before = dict(fs.solvers._entries)
    try:
        exec(compile(block, name, "exec"), {})
    finally:
        fs.solvers._entries.clear()
        fs.solvers._entries.update(before)


def test_the_printed_plan_is_what_is_printed():
    (text,) = blocks("README.md", "text")
    assert text.rstrip() == str(fs.plan("dpmpp_2m", fs.VP(), nfe=5)).rstrip()
