import subprocess
import sys

import lemo_fx


def run(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_initialises_no_cuda_imports_no_triton_and_hides_no_function_by_the_file_of_its_name():
    """In one process: starting one is slow."""
    run("""
import sys
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
""")
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
""")
    assert "inspect" in output
