import pytest
import torch
from tiny import TOLERANCE
from torch.nn import functional

from lemo_fx.kernels.segmented_cross_entropy.op import segmented_cross_entropy


def data(tokens=13, hidden=6, vocabulary=11, dtype=torch.float64, bias=True):
    x = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, dtype=dtype, requires_grad=True)
    b = torch.randn(vocabulary, dtype=dtype, requires_grad=True) if bias else None
    labels = torch.randint(vocabulary, (tokens,))
    labels[::3] = -100
    return x, weight, b, labels


def run(x, weight, bias, labels, softcap=None, rows=5):
    needs = [t is not None and t.requires_grad for t in (x, weight, bias)]
    return segmented_cross_entropy(x, weight, bias, labels, softcap, -100, rows, *needs)[0]


def expect(x, weight, bias, labels, softcap=None):
    logits = functional.linear(x, weight, bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("rows", [1, 5, 13, 100])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_against_cross_entropy(rows, softcap, bias, dtype, tolerance):
    x, weight, b, labels = data(dtype=dtype, bias=bias)
    leaves = [t for t in (x, weight, b) if t is not None]
    found = torch.autograd.grad(run(x, weight, b, labels, softcap, rows) * 0.7, leaves)
    expected = torch.autograd.grad(expect(x, weight, b, labels, softcap) * 0.7, leaves)
    torch.testing.assert_close(
        run(x, weight, b, labels, softcap, rows), expect(x, weight, b, labels, softcap), **TOLERANCE[tolerance]
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE[tolerance])


def test_all_ignored_is_zero_with_zero_gradients():
    x, weight, b, labels = data(dtype=torch.float32)
    loss = run(x, weight, b, torch.full_like(labels, -100))
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, [x, weight, b]))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_gets_no_gradient(frozen):
    leaves = list(data(dtype=torch.float32))
    leaves[frozen] = leaves[frozen].detach()
    run(*leaves).backward()
    assert [t.grad is None for t in leaves[:3]] == [i == frozen for i in range(3)]


def test_gradcheck():
    """The loss is summed in float32, so finite differences need a wide step; the gradient itself is float64."""
    x, weight, b, labels = data()
    for wanted in (x, weight, b):
        analytic = torch.autograd.grad(run(x, weight, b, labels), wanted)[0]
        logits = functional.linear(x, weight, b)
        oracle = functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        torch.testing.assert_close(analytic, torch.autograd.grad(oracle, wanted)[0], **TOLERANCE["fp32"])


@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(permuted):
    x, weight, b, labels = data(dtype=torch.float32)
    if permuted:
        x = x.detach().T.contiguous().T.requires_grad_()
        weight = weight.detach().T.contiguous().T.requires_grad_()
    torch.library.opcheck(segmented_cross_entropy, (x, weight, b, labels, None, -100, 5, True, True, True))
    torch.library.opcheck(segmented_cross_entropy, (x, weight.detach(), None, labels, 2.0, -100, 5, True, False, False))
