"""The notebooks of `examples/` are executed as by a user, with smaller parameters, and committed without outputs."""

import ast
import os

import nbformat
import pytest
from conftest import ROOT
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.util import run_sync

NOTEBOOKS = {
    "01_train_and_evaluate.ipynb": {"EPOCHS": 1, "EXAMPLES": 20},
    "02_your_own_model.ipynb": {"EPOCHS": 1, "EXAMPLES": 20},
}


def read(name):
    return nbformat.read(ROOT / "examples" / name, as_version=4)


def parameters_of(notebook):
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    return cell, {node.targets[0].id for node in ast.parse(cell.source).body}


def text_of(notebook):
    """All that the cells printed or showed as text, and the number of pictures."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join(texts), sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.chdir(tmp_path)  # a short name for the kernel's sockets
    notebook = read(name)
    cell, known = parameters_of(notebook)
    assert known == set(NOTEBOOKS[name])
    cell.source += "".join(f"\n{key} = {value}" for key, value in NOTEBOOKS[name].items())
    kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip="kernel")  # no open port
    try:
        NotebookClient(notebook, km=kernel, timeout=1200).execute()
    finally:
        run_sync(kernel.shutdown_kernel)(now=True)
    text, pictures = text_of(notebook)
    assert pictures == 2 and "Traceback" not in text
    expected = "base learner linf" if name.startswith("01") else "logits x 1,000: CW breaks far more than PGD-20"
    assert expected in text


def test_all_notebooks_are_run_and_committed_without_outputs():
    assert sorted(path.name for path in (ROOT / "examples").iterdir()) == sorted(NOTEBOOKS)
    for name in NOTEBOOKS:
        notebook = read(name)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert code and all(not cell.outputs and cell.execution_count is None for cell in code)
