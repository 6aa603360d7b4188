"""Every Triton kernel against its plain-torch reference on a real GPU: dtypes, strides, sizes, 64-bit offsets."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lemo_fx.kernels.block_scores import reference as scores_reference
from lemo_fx.kernels.block_scores.op import block_scores
from lemo_fx.kernels.eliminate import reference as rows_reference
from lemo_fx.kernels.eliminate.op import eliminate, scatter_rows
from lemo_fx.kernels.private import ATTENTION_OPS
from lemo_fx.kernels.restore import reference as restore_reference
from lemo_fx.kernels.restore.op import restore
from lemo_fx.kernels.segmented_cross_entropy import reference as loss_reference
from lemo_fx.kernels.segmented_cross_entropy.op import segmented_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def close(value: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> None:
    """Relative error in the Frobenius norm, in double precision; NaN never passes."""
    value, reference = value.double(), reference.double()
    assert float((value - reference).norm()) <= LIMIT[dtype] * float(reference.norm().clamp_min(1e-12))


def choose(batch: int, length: int, kept: int) -> torch.Tensor:
    return torch.stack([torch.randperm(length)[:kept].sort().values for _ in range(batch)]).cuda()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length", "kept", "width"), [(1, 100, 37, 64), (3, 129, 128, 4100), (2, 64, 1, 7)])
def test_rows_move_there_and_back(dtype, batch, length, kept, width):
    stream = torch.randn(length, batch, width, device="cuda").to(dtype).transpose(0, 1)
    rows = torch.randn(batch, width, kept, device="cuda").to(dtype).transpose(1, 2)
    tokens = choose(batch, length, kept)
    assert torch.equal(eliminate(stream, tokens), rows_reference.eliminate(stream, tokens))
    assert torch.equal(scatter_rows(rows, tokens, length), rows_reference.scatter_rows(rows, tokens, length))
    close(restore(stream, rows, tokens), restore_reference.restore(stream.double(), rows.double(), tokens), dtype)


def test_gradients_of_elimination_and_restoration():
    # Small: gradcheck runs the kernels once or twice for each element, and the sanitizers slow each run down.
    stream = torch.randn(2, 12, 3, device="cuda", dtype=torch.float64, requires_grad=True)
    rows = torch.randn(2, 5, 3, device="cuda", dtype=torch.float64, requires_grad=True)
    tokens = choose(2, 12, 5)
    torch.autograd.gradcheck(lambda x: eliminate(x, tokens), stream)
    torch.autograd.gradcheck(lambda x, r: restore(x, r, tokens), (stream, rows))


def test_offsets_beyond_32_bits():
    stream = torch.empty(1, 300_000, 8192, device="cuda", dtype=torch.float16)
    stream[0, -3:] = torch.arange(3, device="cuda", dtype=torch.float16)[:, None]
    tokens = torch.tensor([[0, 299_997, 299_998, 299_999]], device="cuda")
    taken = eliminate(stream, tokens)
    assert taken[0, 1:, 5].tolist() == [0.0, 1.0, 2.0]
    assert restore(stream, taken, tokens)[0, -3:, -1].tolist() == [0.0, 2.0, 4.0]


def test_rows_of_a_stream_of_two_billion_elements():
    """512K tokens of width 4096 are 2^31 elements: there and back, and their gradients."""
    stream = torch.zeros(1, 1 << 19, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.arange((1 << 19) - 64, 1 << 19, device="cuda")[None]
    rows = eliminate(stream, tokens)
    out = restore(stream, rows + 1, tokens)
    assert out[0, :-64].count_nonzero() == 0
    assert out[0, -64:].eq(1).all()
    (gradient,) = torch.autograd.grad(out, stream, torch.ones_like(out))
    assert gradient[0, -64:].eq(2).all()
    assert gradient[0, :-64].eq(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "group", "length", "width", "block"), [(4, 2, 1000, 64, 64), (8, 1, 300, 80, 16), (2, 2, 513, 128, 48)]
)
@pytest.mark.parametrize("packed", [False, True])
def test_block_scores(dtype, heads, group, length, width, block, packed):
    query = torch.randn(2, length, heads, width, device="cuda").to(dtype).transpose(1, 2)
    key = torch.randn(2, heads // group, length, width, device="cuda").to(dtype)
    documents = None
    if packed:
        documents = (torch.arange(length, device="cuda") // 100).expand(2, -1).clone()
        documents[0, -30:] = -1
    expected = scores_reference.block_scores(query.float(), key.float(), None, documents, width**-0.5, block)
    close(block_scores(query, key, None, documents, width**-0.5, block), expected, torch.bfloat16)
    again = block_scores(query, key, None, documents, width**-0.5, block)
    assert torch.equal(again, block_scores(query, key, None, documents, width**-0.5, block))


def test_nan_in_keys_reaches_the_score_of_its_block():
    query, key = (torch.randn(1, 2, 256, 32, device="cuda") for _ in range(2))
    key[0, 0, 70] = float("nan")
    scores = block_scores(query, key, None, None, 1.0, 64)
    assert scores.isnan().tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("vocabulary", [97, 50_272])
def test_segmented_cross_entropy(dtype, softcap, vocabulary):
    hidden = torch.randn(70, 64, device="cuda").to(dtype)
    weight = (torch.randn(vocabulary, 64, device="cuda") / 8).to(dtype)
    labels = torch.randint(0, vocabulary, (70,), device="cuda")
    labels[::7] = -100
    got = segmented_cross_entropy(hidden, weight, None, labels, softcap, -100, 32, True, True, False)
    expected = loss_reference.segmented_cross_entropy(
        hidden.double(), weight.double(), None, labels, softcap, -100, 70, (True, True, False)
    )
    for value, reference in zip(got[:3], expected[:3], strict=True):
        close(value, reference, torch.bfloat16 if dtype != torch.float32 else dtype)


@pytest.mark.parametrize("shape", [(1, 1000, 64), (2, 130, 4096), (7, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float8_linear(shape, dtype):
    from lemo_fx.kernels.float8_linear import op, reference

    x = torch.randn(shape, device="cuda", dtype=dtype)
    weight = torch.randn(48, shape[-1], device="cuda", dtype=torch.bfloat16) / shape[-1] ** 0.5
    # The same rounding on both sides: what is left is the order of the sum and the bf16 result.
    for again in (False, True):
        torch.testing.assert_close(
            op.float8_linear(x, weight, again), reference.float8_linear(x, weight), rtol=2e-2, atol=2e-2
        )
    x.requires_grad_()
    grad = torch.randn(*shape[:-1], 48, device="cuda", dtype=dtype)
    op.Float8Linear.apply(x, weight).backward(grad)
    torch.testing.assert_close(x.grad, reference.float8_linear(grad, weight.t()), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(1, 1000, 64), (2, 130, 4096), (7, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_held_in_float8(shape, dtype):
    from lemo_fx.kernels.float8_linear import held, op

    x = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(48, shape[-1], device="cuda", dtype=torch.bfloat16) / shape[-1] ** 0.5
    packed = held.pack(weight)
    out = held.Float8Product.apply(x, packed, shape[-1])
    assert torch.equal(out, op.float8_linear(x, weight))
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, x, grad)
    at_home = x.detach().cpu().requires_grad_()
    held.Float8Product.apply(at_home, packed.cpu(), shape[-1]).backward(grad.cpu())
    torch.testing.assert_close(found.cpu(), at_home.grad, rtol=2e-2, atol=2e-2)
    assert torch.equal(held.dequantise(packed, shape[-1], dtype).cpu(), held.dequantise(packed.cpu(), shape[-1], dtype))


def test_attention_dispatches_to_what_recompute_policies_keep():
    """An op under another name would be computed again in every backward, without a word."""
    query, key = (torch.randn(1, heads, 256, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2))
    attend = partial(F.scaled_dot_product_attention, query, key, key, is_causal=True, enable_gqa=True)
    with torch.profiler.profile() as profiler:
        attend()
    names = {op.overloadpacket.__name__ for op in ATTENTION_OPS}
    ran = {event.key.removeprefix("aten::") for event in profiler.key_averages()}
    assert ran & names
