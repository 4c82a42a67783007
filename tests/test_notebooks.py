"""The notebooks of the documents run, and what is stored below their cells is clean."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def runner() -> Any:
    """The module that makes the stored outputs."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    spec = importlib.util.spec_from_file_location("notebooks", DOCS / "_site/notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(path: Path) -> list[dict[str, Any]]:
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def shape(outputs: list[dict[str, Any]]) -> list[str]:
    """Kinds of outputs: numbers in the last digits may differ from machine to machine."""
    return [o.get("name", o["output_type"]) for o in outputs]


def test_there_are_three():
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_there_and_clean(path):
    outputs = [o for cell in cells(path) for o in cell["outputs"]]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert {o.get("name", o["output_type"]) for o in outputs} <= {"stdout", "display_data"}
    text = json.dumps([{**o, "data": {}} for o in outputs])
    assert not re.search(r"(^|[\s\"'])(/\w+/|[A-Z]:\\)|site-packages|0x[0-9a-f]{8}", text)
    assert all(cell["execution_count"] is None for cell in cells(path))
    for cell in cells(path):
        if re.search(r"^(print|plt\.show)", "".join(cell["source"]), flags=re.MULTILINE):
            assert cell["outputs"], cell["source"]
    assert path.stat().st_size < 300_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own event loops and sockets
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run_and_show_what_is_stored(path):
    run = runner().run(path)
    for new, old in zip([c for c in run.cells if c.cell_type == "code"], cells(path), strict=True):
        assert shape(new.outputs) == shape(old["outputs"]), old["source"]
