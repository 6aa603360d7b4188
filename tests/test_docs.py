"""The pages say what is so: their Python runs, prints what is shown, and the commands and files they name exist.

All blocks of a page run as one module, in a folder of their own; one that begins with `# name.py` is that file there,
for others to import. A ```text block right after a Python block is what it
prints: `LEMO_UPDATE_DOCS=1 pytest tests/test_docs.py` writes it anew; then read the diff. A block that cannot run has
`<!-- not run: reason -->` on the line above it.
"""

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
import typer
from tiny import tiny

import lemo_fx
from lemo_fx.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "passes" / "README.md"]
BLOCK = re.compile(
    r"(?P<skip><!-- not run: [^\n]+ -->\n)?```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<printed>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
CACHE = re.compile(r", (?:cache|past_key_values)\b.*")
"""A layer's cache, which versions of transformers name differently, and what of a line is shown after it."""
SLOW = {"README": pytest.mark.slow}
"""It compiles."""
ids = pytest.mark.parametrize("page", [pytest.param(p, id=p.stem, marks=SLOW.get(p.stem, ())) for p in PAGES])
every = pytest.mark.parametrize("page", PAGES + OTHERS, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Model folders of tiny random Llamas, named by their number of layers."""
    path = tmp_path_factory.mktemp("model")
    tiny("llama", 4).save_pretrained(path / "4")
    # Enough for a page that compiles: a dense layer, a sparse one, and a dense one with a graph of its own.
    tiny("llama", 3).save_pretrained(path / "3")
    return path


def prelude(folder: Path) -> dict:
    """What pages may take for granted: the folder of a model, its training data, and a Trainer's arguments."""
    rows = torch.randint(3, 97, (2, 512), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    return {"name": str(folder), "data": data, "args": transformers.TrainingArguments("runs")}


@ids
def test_python_blocks(page, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == len(re.findall(r"^\s*(?:```|~~~)\s*(?:py|pycon)", text, re.MULTILINE)), "a block is not seen"
    assert sum(bool(block["skip"]) for block in blocks) == text.count("<!-- not run"), "a mark stands alone"
    module, updated = types.ModuleType("page"), text
    vars(module).update(prelude(folder / ("3" if page.stem == "README" else "4")))
    monkeypatch.setitem(sys.modules, "page", module)
    for block in blocks:
        if block["skip"]:
            continue
        if name := re.match(r"# (\w+)\.py\n", block["code"]):
            (tmp_path / f"{name[1]}.py").write_text(block["code"])
            monkeypatch.delitem(sys.modules, name[1], raising=False)
            continue
        line = text.count("\n", 0, block.start("code"))
        code = compile("\n" * line + block["code"], str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, vars(module))
        if block["printed"] is not None:
            printed = "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())
            if os.environ.get("LEMO_UPDATE_DOCS"):
                # Counted from the end, which no earlier block has moved.
                end = len(updated) - len(text)
                updated = updated[: block.start("printed") + end] + printed + updated[block.end("printed") + end :]
            else:
                found, shown = (CACHE.sub(", ...", x) for x in (printed, block["printed"]))
                assert found == shown, f"line {line}: the page shows something else"
    if updated != text:
        page.write_text(updated)


@every
def test_commands_and_files(page):
    """Every `lemo-fx` command and option, script and relative link."""
    text = page.read_text()
    commands = typer.main.get_command(app).commands
    for words in re.findall(r"lemo-fx((?: [\w<>./\[\]-]+)+)", text):
        command, *rest = words.split()
        assert command in commands, f"lemo-fx{words}"
        options = {option for parameter in commands[command].params for option in parameter.opts}
        options |= {option for parameter in commands[command].params for option in parameter.secondary_opts}
        unknown = {word for word in rest if word.startswith("--")} - options
        assert not unknown, f"lemo-fx{words}"
    for script in re.findall(r"\b(?:tools|examples|tests)/[\w/]+\.py\b", text):
        assert (ROOT / script).exists(), script
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (page.parent / link).exists(), link


@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="the extra `docs` is not installed")
def test_the_site_builds(tmp_path):
    # Not --quiet: it hides warnings from --strict too.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    missing = [name for name in lemo_fx.__all__ if name != "__version__" and f">{name}<" not in api]
    assert not missing, f"docs/api.md lacks {missing}"
