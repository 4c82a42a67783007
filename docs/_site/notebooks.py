"""Run the notebooks and keep what they print and draw: `python docs/_site/notebooks.py [name ...]`.

Nothing that changes from run to run is kept: no times, no counts of executions.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


def run(path: Path, timeout: int = 300) -> nbformat.NotebookNode:
    """The notebook, run from its first cell to its last, with its new outputs."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}  # what a notebook writes stays there
        client = NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            resources=resources,
            coalesce_streams=True,  # else outputs are cut where the clock says
        )
        client.execute()
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                output.get("metadata", {}).clear()
                if "execution_count" in output:
                    output["execution_count"] = None
    return notebook


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            nbformat.write(run(path), path)
            print(path.name)
