"""docs/tour.ipynb runs from top to bottom, as a reader would run it."""
from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).resolve().parent.parent


def test_the_tour_runs_from_top_to_bottom():
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    where = dict(metadata=dict(path=str(ROOT / "docs")))
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()    # a cell that raises ends it
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "Traceback" not in said and "moves the sum by 1.000 C" in said
    assert "after 16 steps epsilon = 10.0000" in said and "private      True: epsilon = 9.99" in said
