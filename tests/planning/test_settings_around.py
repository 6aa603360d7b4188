"""What a program has set for itself when it calls `transform`: autocast, precision, default device, no gradient."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from tiny import tiny

import lemo_fx
from lemo_fx import Elimination, LemoConfig
from lemo_fx.graph.probe import quiet
from lemo_fx.planning import proof

MATMUL = torch.backends.cuda.matmul


@contextmanager
def newer_interface():
    own = MATMUL.fp32_precision
    MATMUL.fp32_precision = "tf32"
    try:
        yield
    finally:
        MATMUL.fp32_precision = own


@contextmanager
def older_interface():
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


AROUND = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "newer interface to TF32": newer_interface,
    "older interface to TF32": older_interface,
    "another default device": lambda: torch.device("meta"),
    "no gradient": torch.no_grad,
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("keys", ["kept", "every"])
@pytest.mark.parametrize("around", AROUND)
def test_a_transform_is_proven_whatever_is_set_around_it(around, keys, monkeypatch):
    monkeypatch.setattr(proof, "_known", {})
    model = tiny("llama", layers=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                # Sharp attention, as pretrained models have it: half precision shows.
                parameter.mul_(8)
    ids = torch.randint(0, 60, (2, 48))
    expected = model(input_ids=ids, labels=ids).loss
    attention = Elimination(keep=0.5, eliminated="exact", keys=keys)
    with AROUND[around]():
        lemo_fx.transform(model, LemoConfig(attention=attention, mlp=Elimination(keep=0.5, eliminated="exact")))
    report = lemo_fx.report(model)
    assert report.sites
    assert not any("not proven" in note for note in report.notes)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)


@pytest.mark.parametrize("around", [nullcontext, newer_interface, older_interface])
def test_float32_matmuls_are_in_float32_and_the_setting_comes_back(around):
    with around():
        before = MATMUL.fp32_precision
        with quiet(torch.nn.Linear(2, 2)):
            assert MATMUL.fp32_precision in ("ieee", "none")
        assert MATMUL.fp32_precision == before
