"""docs/tour.ipynb runs from top to bottom, as its reader runs it."""
from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).resolve().parent.parent


def test_the_tour_runs_from_top_to_bottom(tmp_path):
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    kernel = nbclient.NotebookClient(notebook, timeout=600, resources=dict(metadata=dict(path=str(ROOT / "docs"))))
    kernel.execute()                                                     # a cell that raises ends it here
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "Traceback" not in said and "moves the sum by 1.000 C" in said and "lower bound" in said
