import pytest
import torch
from tiny import tiny

import lemo_fx
from lemo_fx import Elimination, LemoConfig
from lemo_fx.kernels import lowering
from lemo_fx.kernels.block_scores import op, reference

CUDA = torch.device("cuda")


@pytest.fixture
def _triton(monkeypatch):
    monkeypatch.setattr(lowering, "has_triton", lambda: True)


@pytest.mark.usefixtures("_triton")
def test_why_a_kernel_does_not_take_a_call():
    mask = torch.ones(1)
    assert lowering.obstacle("block_scores", CUDA, block_size=128, mask=None) == ""
    assert "arbitrary form" in lowering.obstacle("block_scores", CUDA, block_size=128, mask=mask)
    assert "128 tokens" in lowering.obstacle("block_scores", CUDA, block_size=129, mask=None)
    assert "cpu" in lowering.obstacle("block_scores", torch.device("cpu"), block_size=128, mask=None)
    assert lowering.obstacle("restore_exact", CUDA)


@pytest.mark.usefixtures("_triton")
def test_what_is_not_known_yet_is_said():
    assert lowering.explain("eliminate", CUDA) == "kernel eliminate/triton.py"
    assert "plain torch where a mask" in lowering.explain("block_scores", CUDA, block_size=64)
    assert lowering.explain("block_scores", CUDA, block_size=256).startswith("plain torch, no kernel (")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(lowering, "has_triton", lambda: False)
    assert lowering.explain("restore", CUDA) == "plain torch, no kernel (no Triton)"


def test_an_op_asks_the_table(monkeypatch):
    asked = []
    monkeypatch.setattr(op, "obstacle", lambda *args, **named: asked.append((args[0], *named)) or "because")
    query = torch.randn(1, 2, 16, 4)
    found = op.block_scores(query, query, None, None, 1.0, 8)
    assert torch.equal(found, reference.block_scores(query, query, None, None, 1.0, 8))
    assert asked == [("block_scores", "mask", "block_size")]


def test_the_report_says_what_runs():
    site = Elimination(eliminated="skip", score="measured")
    notes = lemo_fx.report(lemo_fx.transform(tiny("llama"), LemoConfig(site, site, block_size=8))).notes
    assert (
        "block_scores, eliminate, restore, segmented_cross_entropy: plain torch, no kernel (tensors on cpu, not cuda)"
        in notes
    )
