"""The gate of the benchmarks runs what is timed, and fails where `exact` is broken on purpose."""

import bench_model
import pytest
import torch
from bench_model import Variant
from torch import nn

from lemo_fx.kernels.restore import op, reference
from lemo_fx.planning.proof import Proofs

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TIMED = ("step-0.5-slope-0.6-both-float8-checkpointed", "skip-0.5-shared-eager")


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch):
    compiled = []
    compile = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, mode: compiled.append(self) or compile(self, backend="aot_eager")
    )
    yield compiled
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("adapters", ["float32", "autocast"])
def test_the_gate_compares_every_plan_as_it_is_timed(adapters, without_inductor):
    found = bench_model.gate("tiny", CPU, adapters, [Variant.named(name) for name in (*TIMED, "lora-eager")])
    unrounded = f"{TIMED[0]}, without float8"
    assert list(found) == [f"{bench_model.EXACT} in float32", bench_model.EXACT, unrounded, *TIMED]
    # The original's and the reference's layers are not compiled, nor is what says so.
    assert len(without_inductor) == 4 * bench_model.GATED_LAYERS
    assert all(errors["gradient"] > 0 for errors in found.values())


def without_proof_and_compiler(monkeypatch):
    """The proof sees a fault first; compiling takes most of the gate's time."""
    monkeypatch.setattr(Proofs, "fault", lambda *_: None)
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: None)


def scaled(out):
    return torch.cat([out[:, :3], out[:, 3:4] * 1.05, out[:, 4:]], 1)


def swapped(out):
    return out[:, [1, 0, *range(2, out.shape[1])]]


def raises(out):
    raise ArithmeticError


@pytest.mark.parametrize("fault", [raises, scaled, swapped])
def test_the_gate_fails_where_exact_is_broken(fault, monkeypatch):
    without_proof_and_compiler(monkeypatch)
    for name in ("restore", "restore_exact"):
        real = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *args, real=real: fault(real(*args)))
    with pytest.raises((SystemExit, ArithmeticError)):
        bench_model.gate("tiny", CPU, "float32", [])


def test_the_gate_fails_where_only_the_gradient_of_exact_is_wrong(monkeypatch):
    without_proof_and_compiler(monkeypatch)
    real = op._backward

    def less(ctx, grad):
        stream, rows, tokens = real(ctx, grad)
        return stream, None if rows is None else 0.9 * rows, tokens

    monkeypatch.setattr(op, "_backward", less)
    with pytest.raises(SystemExit, match="gradient"):
        bench_model.gate("tiny", CPU, "float32", [])
