"""The notebook of a first run: its cells run in order, and the model learns."""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_run.ipynb"


def test_the_cells_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["after"] < names["before"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert "No times" in capsys.readouterr().out
