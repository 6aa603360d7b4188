import pytest
import torch
from tiny import TOLERANCE

from lemo_fx.kernels.eliminate.op import eliminate, scatter_rows
from lemo_fx.kernels.restore.op import restore, restore_exact


def some_tokens(rows, length, count):
    return torch.stack([torch.randperm(length)[:count].sort().values for _ in range(rows)])


def layouts(*shape, dtype=torch.float64):
    """The same shape contiguous, transposed, sliced and expanded."""
    yield torch.randn(*shape, dtype=dtype)
    yield torch.randn(shape[1], shape[0], shape[2], dtype=dtype).transpose(0, 1)
    yield torch.randn(shape[0], shape[1] + 3, 2 * shape[2], dtype=dtype)[:, 2:-1, ::2]
    yield torch.randn(shape[0], 1, shape[2], dtype=dtype).expand(shape)


@pytest.mark.parametrize("rows", [1, 3])
def test_against_loops(rows):
    tokens = some_tokens(rows, 11, 4)
    for stream in layouts(rows, 11, 5):
        kept = torch.stack([torch.stack([stream[b, t] for t in tokens[b]]) for b in range(rows)])
        assert torch.equal(eliminate(stream, tokens), kept)
        assert eliminate(stream, tokens).is_contiguous()
        back = torch.zeros(rows, 11, 5, dtype=torch.float64)
        added = stream.clone()
        for b in range(rows):
            for k, t in enumerate(tokens[b]):
                back[b, t] = kept[b, k]
                added[b, t] += kept[b, k]
        assert torch.equal(scatter_rows(kept, tokens, 11), back)
        torch.testing.assert_close(restore(stream, kept, tokens), added, **TOLERANCE["fp64"])
        full = torch.randn(rows, 11, 5, dtype=torch.float64)
        torch.testing.assert_close(restore_exact(stream, full, kept, tokens), stream + full, **TOLERANCE["same"])


@pytest.mark.parametrize("rows", [1, 2])
def test_opcheck(rows):
    tokens = some_tokens(rows, 7, 3)
    pairs = zip(layouts(rows, 7, 4, dtype=torch.float32), layouts(rows, 3, 4, dtype=torch.float32), strict=True)
    for stream, kept in pairs:
        stream, kept = stream.requires_grad_(), kept.requires_grad_()
        torch.library.opcheck(eliminate, (stream, tokens))
        torch.library.opcheck(scatter_rows, (kept, tokens, 7))
        torch.library.opcheck(restore, (stream, kept, tokens))


@pytest.mark.parametrize("rows", [1, 2])
def test_gradcheck(rows):
    tokens = some_tokens(rows, 7, 3)
    stream = torch.randn(rows, 7, 4, dtype=torch.float64, requires_grad=True)
    kept = torch.randn(rows, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: eliminate(x, tokens), stream)
    assert torch.autograd.gradcheck(lambda x: scatter_rows(x, tokens, 7), kept)
    assert torch.autograd.gradcheck(lambda x, y: restore(x, y, tokens), (stream, kept))
    assert torch.autograd.gradgradcheck(lambda x: eliminate(x, tokens), stream)
    assert torch.autograd.gradgradcheck(lambda x, y: restore(x, y, tokens), (stream, kept))


def test_gradient_of_restore_exact_goes_to_the_kept_rows():
    tokens = some_tokens(2, 7, 3)
    stream = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    kept = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    full = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 7, 4, dtype=torch.float64)
    (restore_exact(stream, full, kept, tokens) * weights).sum().backward()
    assert torch.equal(stream.grad, weights)
    assert torch.equal(kept.grad, eliminate(weights, tokens))
    assert full.grad is None


@pytest.mark.parametrize(
    ("stream", "rows"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16,) * 2]
)
def test_mixed_dtypes(stream, rows):
    tokens = some_tokens(2, 7, 3)
    x, y = torch.randn(2, 7, 4, dtype=stream, requires_grad=True), torch.randn(2, 3, 4, dtype=rows, requires_grad=True)
    out = restore(x, y, tokens)
    assert out.dtype == torch.promote_types(stream, rows)
    out.float().sum().backward()
    assert (x.grad.dtype, y.grad.dtype) == (stream, rows)
    torch.library.opcheck(restore, (x, y, tokens))


def test_only_indices_are_saved():
    tokens = some_tokens(2, 64, 8)
    stream = torch.randn(2, 64, 32, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = restore(stream, eliminate(stream, tokens), tokens)
        restore_exact(out, torch.zeros(2, 64, 32), eliminate(out, tokens), tokens)
    assert saved
    assert all(t.dtype == torch.int64 and t.numel() == tokens.numel() for t in saved)


def test_the_stream_is_not_changed_in_place():
    tokens = some_tokens(2, 7, 3)
    stream = torch.randn(2, 7, 4)
    before = stream.clone()
    restore(stream, torch.randn(2, 3, 4), tokens)
    restore(stream[:1], torch.randn(1, 3, 4), tokens[:1])
    assert torch.equal(stream, before)
