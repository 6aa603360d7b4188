import ast
import functools
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest
import transformers

import lemo_fx

HOUSE = Path(lemo_fx.__file__).parent
FLOORS = (
    {"errors", "_version"},
    {"kernels", "config", "files"},
    {"distributed", "measure"},
    {"graph"},
    {"runtime"},
    {"passes", "predictors"},
    {"planning", "recall", "draw"},
    {"install"},
    {"reporting"},
    {"api"},
    {"fitting", "callback"},
    {"cli"},
    {"__main__"},
)
"""Files and folders of the package, each above all that it imports."""


def files():
    """All modules by dotted name, those of passes/ and kernels/ included."""
    paths = [*HOUSE.rglob("*.py"), *(p for link in ("passes", "kernels") for p in (HOUSE / link).rglob("*.py"))]
    parts = {p: p.relative_to(HOUSE).with_suffix("").parts for p in paths}
    return {".".join(("lemo_fx", *name)).removesuffix(".__init__"): path for path, name in parts.items()}


def imports(name, path, known):
    """Modules of the package that one imports, but for what only a type checker reads."""
    tree = ast.parse(path.read_text())
    typing = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    unread = {id(inner) for branch in typing for inner in ast.walk(branch)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in unread:
            yield from (alias.name for alias in node.names if alias.name in known)
        if isinstance(node, ast.ImportFrom) and id(node) not in unread:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found = inner if inner in known else node.module
                # Of the package itself, `from lemo_fx import transform` names what it hands on.
                if found in known and found not in (name, "lemo_fx"):
                    yield found


@functools.cache
def arrows():
    known = files()
    return [(name, other) for name, path in known.items() for other in imports(name, path, known)]


def flow(of=lambda name: name):
    pairs = {(of(name), of(other)) for name, other in arrows()}
    return nx.DiGraph(pair for pair in pairs if pair[0] != pair[1])


def top(name):
    return [*name.split("."), "__init__"][1]


def test_no_circle_of_imports_between_files_or_folders():
    assert len(flow()) > 90
    assert list(nx.simple_cycles(flow())) == []
    assert list(nx.simple_cycles(flow(top))) == []


def test_each_file_and_folder_imports_only_what_stands_below_it():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    rooms = {top(name) for name in files()} - {"__init__"}
    assert set(floor) == rooms
    assert [
        (one, other) for one, other in flow(top).edges if "__init__" not in (one, other) and floor[one] <= floor[other]
    ] == []


def test_no_module_above_four_hundred_lines_and_few_at_the_top():
    long = {name: count for name, path in files().items() if (count := len(path.read_text().splitlines())) > 400}
    assert long == {}
    assert len(list(HOUSE.glob("*.py"))) <= 15
    folders = [p for p in HOUSE.iterdir() if p.is_dir() and not p.is_symlink() and p.name != "__pycache__"]
    assert len(folders) <= 6, "demo_assets among them; passes and kernels stand beside the package"


@pytest.mark.parametrize("script", ["import lemo_fx.a\n", "from lemo_fx.a import x\n", "from lemo_fx import a\n"])
def test_every_spelling_of_an_import_counts(tmp_path, script):
    """What only a type checker reads does not."""
    file = tmp_path / "b.py"
    file.write_text(f"{script}if TYPE_CHECKING:\n    from lemo_fx import c\n")
    assert list(imports("lemo_fx.b", file, {"lemo_fx", "lemo_fx.a", "lemo_fx.b", "lemo_fx.c"})) == ["lemo_fx.a"]


def run(script, *arguments):
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_importing_initialises_no_cuda_hides_no_function_and_prints_nothing_over_a_commands_output(tmp_path):
    """In one process, as starting one is slow: what importing does, then a command.

    What libraries say at import they say once, here under the filters that a command sets before it imports anything.
    PEFT imports torchao where it can.
    """
    size = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config = tmp_path / "config.json"
    config.write_text(size.to_json_string(use_diff=False))
    script = """
import sys
from lemo_fx.cli.app import _quiet, app
_quiet()
assert "torch" not in sys.modules
import torch
import transformers.modeling_utils, transformers.modeling_layers, peft  # these may look for triton themselves
before = {name for name in sys.modules if name.split(".")[0] == "triton"}
import lemo_fx.fitting.fit, lemo_fx.reporting, lemo_fx.api
from lemo_fx.api import suspended
from lemo_fx import fit, report, transform, Report
for function in (fit, report, transform, lemo_fx.fit, lemo_fx.report, lemo_fx.transform):
    assert callable(function), function
from lemo_fx import *
assert LemoCallback.__name__ == "LemoCallback"
import pickle
assert pickle.loads(pickle.dumps(transform)) is transform
for name in lemo_fx.__all__:
    assert not type(getattr(lemo_fx, name)).__name__.endswith("odule"), name
assert not torch.cuda.is_initialized()
assert {name for name in sys.modules if name.split(".")[0] == "triton"} == before, "triton was imported"
assert not any(name.startswith("lemo_fx") and "triton" in name for name in sys.modules)
assert "matplotlib" not in sys.modules
from lemo_fx.passes import pipeline
from lemo_fx.kernels.eliminate import op
app()
"""
    done = run(script, "inspect", str(config), "--out", str(tmp_path))
    assert done.stderr == ""
    assert done.stdout.startswith("built with 4 of the 6 decoder layers\n")
    assert set(lemo_fx.__all__) <= set(dir(lemo_fx))
    assert not hasattr(lemo_fx, "no_such_name")


def test_help_imports_neither_torch_nor_transformers():
    """They take seconds; a clock would only measure the machine's other work."""
    output = run("""
import sys
from typer.testing import CliRunner
from lemo_fx.cli.app import app
helped = CliRunner().invoke(app, ["--help"])
assert helped.exit_code == 0
print(helped.output)
slow = {"torch", "transformers", "peft", "matplotlib", "numpy"} & set(sys.modules)
assert not slow, slow
""").stdout
    assert "inspect" in output
