"""Execute a notebook without a browser, show its text as it appears, and keep the executed page.

    python -m tools.run_notebook notebooks/00_quickstart.ipynb --into runs/quickstart

Writes `report.html` and `executed.ipynb` (the executed notebook, as a page and as a file) and adds a line to `executions.jsonl`:
seconds, and the peak memory of the kernel with all that it starts.
The notebook file itself is not changed, so no outputs reach git.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

from tools.peak_memory import PeakOfChildren

SECONDS_PER_CELL = 3600
# Jupyter's page without what it would load from other places: require.js, MathJax (to which every "$" is mathematics), Mermaid.
# The policy keeps out what an output or a picture in a text may ask for.
PAGE = """
{%- extends "lab/index.html.j2" -%}
{%- block html_head_js -%}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
"""


def print_text(cell: nbformat.NotebookNode, cell_index: int, execute_reply: dict) -> None:
    for output in cell.get("outputs", []):
        if output.output_type == "stream" and output.name == "stdout":
            print(output.text, end="", flush=True)


def as_page(notebook: nbformat.NotebookNode, title: str) -> str:
    """HTML that needs neither a network nor a script; pictures from elsewhere (badges) become their words."""
    offline = copy.deepcopy(notebook)
    for cell in offline.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"!\[([^]]*)\]\(https?://[^)]*\)", r"\1", cell.source)
    page, _ = HTMLExporter(raw_template=PAGE).from_notebook_node(offline, resources={"metadata": {"name": title}})
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--into", type=Path, required=True, help="folder for report.html and executions.jsonl")
    arguments = parser.parse_args()

    notebook = nbformat.read(arguments.notebook, as_version=4)
    workdir = {"metadata": {"path": str(arguments.notebook.parent)}}
    client = (
        NotebookClient(  # without the widgets' state: a page shows the panel's text, as widgets would need a network
            notebook, timeout=SECONDS_PER_CELL, resources=workdir, on_cell_executed=print_text, store_widget_state=False
        )
    )
    started, failure = time.monotonic(), None
    try:
        with PeakOfChildren() as peak:
            client.execute()
    except CellExecutionError as error:
        failure = error
    seconds = time.monotonic() - started

    arguments.into.mkdir(parents=True, exist_ok=True)
    page = as_page(notebook, arguments.notebook.stem)
    (arguments.into / "report.html").write_text(page, encoding="utf-8")
    nbformat.write(notebook, arguments.into / "executed.ipynb")
    if failure is not None:
        print(
            f"\n{arguments.notebook} failed; the page up to there: {arguments.into / 'report.html'}\n\n{failure}",
            file=sys.stderr,
        )
        return 1
    measured = {
        "notebook": arguments.notebook.name,
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(peak.gib, 2),
    }
    with (arguments.into / "executions.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(measured) + "\n")
    print(
        f"\n{arguments.notebook.name}: {seconds / 60:.1f} minutes, peak memory {measured['peak_memory_gib']} GiB. "
        f"Everything it made is in {arguments.into}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
