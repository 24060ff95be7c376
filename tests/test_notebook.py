"""The notebook runs from top to bottom, and the outputs that are stored in it are small."""

import json
import os
import sys

import pytest
from commands import ROOT

NOTEBOOK = ROOT / "docs" / "notebooks" / "quickstart.ipynb"

STORED_OUTPUT_LIMIT = 150_000
"""Characters of the stored outputs. Pictures are base64."""


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_stored_outputs_are_small_and_have_no_error():
    outputs = [output for cell in cells() for output in cell.get("outputs", [])]
    assert outputs, "the notebook is stored with its outputs"
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert len(json.dumps(outputs)) < STORED_OUTPUT_LIMIT


@pytest.mark.slow
@pytest.mark.needs("nbclient", "nbformat", "ipykernel", "matplotlib")
def test_the_notebook_runs(monkeypatch, tmp_path):
    import nbclient
    import nbformat

    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the runs of the notebook
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3")
    client.execute(cwd=str(tmp_path))

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    texts = "".join(output.get("text", "") for output in outputs)
    assert len(pictures) == 3
    assert "grpo  acc@.5" in texts
