import subprocess
import sys


def test_importing_initialises_no_cuda_and_imports_no_triton():
    script = """
import sys
import torch
import transformers.modeling_utils, transformers.modeling_layers, peft  # these may look for triton themselves
before = {name for name in sys.modules if name.split(".")[0] == "triton"}
import lemo_fx
assert not torch.cuda.is_initialized()
assert {name for name in sys.modules if name.split(".")[0] == "triton"} == before, "triton was imported"
assert not any(name.startswith("lemo_fx") and "triton" in name for name in sys.modules)
assert "matplotlib" not in sys.modules
from lemo_fx.passes import pipeline
from lemo_fx.kernels.eliminate import op
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
