import pytest
import torch
from tiny import TOLERANCE, Largest

from lemo_fx.kernels.block_scores.op import block_scores, random_scores
from lemo_fx.kernels.block_scores.reference import activation_scores


def naive_scores(query, key, allowed, scaling, size):
    """Equation of LeMo section 4.1 from the whole S x S matrix, in float64 and with loops over blocks."""
    rows, heads, length, _ = query.shape
    key = key.double().repeat_interleave(heads // key.shape[1], dim=1)
    scores = (query.double() @ key.transpose(-1, -2) * scaling).clamp_min(0).mean(1)
    scores = scores.masked_fill(~allowed, 0)
    blocks = -(-length // size)
    out = torch.zeros(rows, blocks, dtype=torch.float64)
    for n in range(blocks):
        for m in range(blocks):
            piece = scores[:, m * size : (m + 1) * size, n * size : (n + 1) * size]
            out[:, n] += piece.flatten(1).amax(1)
    return out


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()[None]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(("length", "size"), [(32, 8), (37, 8), (5, 8), (8, 8), (33, 1)])
def test_causal_scores(length, size, heads, groups):
    query, key = torch.randn(2, heads, length, 6), torch.randn(2, groups, length, 6)
    expected = naive_scores(query, key, causal(length), 0.3, size)
    found = block_scores(query, key, None, None, 0.3, size)
    torch.testing.assert_close(found.double(), expected, **TOLERANCE["fp32"])


@pytest.mark.parametrize("kind", ["bool", "additive", "additive_inf", "per_head"])
def test_masks(kind):
    query, key = torch.randn(2, 4, 29, 6), torch.randn(2, 2, 29, 6)
    allowed = causal(29) & (torch.rand(2, 29, 29) > 0.3) | torch.eye(29, dtype=torch.bool)
    mask = allowed[:, None]
    if kind == "per_head":
        mask = mask.expand(2, 4, 29, 29)
    if kind.startswith("additive"):
        low = -torch.inf if kind == "additive_inf" else torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape).masked_fill(~mask, low)
    found = block_scores(query, key, mask, None, 0.5, 8)
    torch.testing.assert_close(found.double(), naive_scores(query, key, allowed, 0.5, 8), **TOLERANCE["fp32"])


def test_one_mask_for_all_samples():
    query, key = torch.randn(2, 4, 29, 6), torch.randn(2, 2, 29, 6)
    found = block_scores(query, key, causal(29)[:, None], None, 0.5, 8)
    torch.testing.assert_close(found, block_scores(query, key, None, None, 0.5, 8))


def test_padding_queries_do_not_count():
    query, key = torch.randn(2, 4, 29, 6), torch.randn(2, 2, 29, 6)
    real = torch.ones(2, 29, dtype=torch.bool)
    real[0, 20:] = real[1, :9] = False
    found = block_scores(query, key, (causal(29) & real[:, None])[:, None], None, 0.5, 8)
    allowed = causal(29) & real[:, None] & real[:, :, None]
    torch.testing.assert_close(found.double(), naive_scores(query, key, allowed, 0.5, 8), **TOLERANCE["fp32"])


def test_documents_and_padding():
    query, key = torch.randn(2, 4, 30, 6), torch.randn(2, 2, 30, 6)
    documents = torch.tensor([[0] * 11 + [1] * 12 + [2] * 7, [-1] * 9 + [1] * 21])
    allowed = causal(30) & (documents[:, :, None] == documents[:, None]) & (documents >= 0)[:, None]
    found = block_scores(query, key, None, documents, 0.5, 8)
    torch.testing.assert_close(found.double(), naive_scores(query, key, allowed, 0.5, 8), **TOLERANCE["fp32"])
    assert found[1, 0] == 0, "a block of padding is attended by nobody"


def test_layout_and_dtype():
    query, key = torch.randn(2, 30, 4, 6), torch.randn(2, 30, 2, 6)
    found = block_scores(query.transpose(1, 2), key.transpose(1, 2), None, None, 0.5, 8)
    packed = block_scores(query.transpose(1, 2).contiguous(), key.transpose(1, 2).contiguous(), None, None, 0.5, 8)
    torch.testing.assert_close(found, packed)
    low = block_scores(query.transpose(1, 2).bfloat16(), key.transpose(1, 2).bfloat16(), None, None, 0.5, 8)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, found, **TOLERANCE["bf16"])


def test_memory_is_linear_in_length():
    largest = []
    for length in (256, 512, 1024):
        query, key = torch.randn(1, 2, length, 4), torch.randn(1, 2, length, 4)
        with Largest() as seen:
            block_scores(query, key, None, None, 0.5, 16)
        largest.append(seen.numel)
    assert largest == [256 * 16 * 2, 512 * 16 * 2, 1024 * 16 * 2]


def test_activation_scores():
    activation = torch.randn(2, 19, 5)
    expected = torch.stack([activation[:, s : s + 8].abs().mean(-1).amax(1) for s in (0, 8, 16)], 1)
    torch.testing.assert_close(activation_scores(activation, 8), expected)


@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(permuted):
    query, key = torch.randn(2, 4, 13, 6), torch.randn(2, 2, 13, 6)
    if permuted:
        query, key = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key))
    torch.library.opcheck(block_scores, (query, key, None, None, 0.5, 4))
    torch.library.opcheck(block_scores, (query, key, causal(13)[:, None], None, 0.5, 4))
    torch.library.opcheck(block_scores, (query, key, None, torch.zeros(1, 13, dtype=torch.int64), 0.5, 4))
    stream = torch.randn(13, 2, 32).transpose(0, 1) if permuted else torch.randn(2, 13, 32)
    torch.library.opcheck(random_scores, (stream, torch.tensor([3]), 4))


class TestRandomScores:
    def test_uniform(self):
        stream = torch.randn(64, 4096, 16)
        scores = random_scores(stream, torch.tensor([1]), 8)
        assert scores.min() >= 0
        assert scores.max() < 1
        counts = torch.histc(scores, 20, 0, 1)
        expected = scores.numel() / 20
        # Chi-square with 19 degrees of freedom: 43.8 is its 99.9th percentile.
        assert ((counts - expected) ** 2 / expected).sum() < 43.8
        ranks = scores.argsort(1).double()
        by_position = torch.nn.functional.one_hot(ranks[:, :256].long(), 512).sum(0).double()
        assert by_position.max() < 12, "no block is chosen far more often than others"

    def test_deterministic_and_without_random_state(self):
        stream = torch.randn(2, 64, 32)
        state = torch.get_rng_state()
        scores = [random_scores(stream.clone(), torch.tensor([1]), 8) for _ in range(2)]
        assert torch.equal(*scores)
        assert torch.equal(torch.get_rng_state(), state)

    def test_differs_by_salt_by_content_by_sample_and_by_block(self):
        stream = torch.randn(2, 64, 32)
        scores = random_scores(stream, torch.tensor([1]), 8)
        assert (random_scores(stream, torch.tensor([2]), 8) != scores).all()
        other = stream.clone()
        other[0, 8, 0] += 1
        changed = random_scores(other, torch.tensor([1]), 8) != scores
        assert changed[0].all(), "one token changes the luck of every block of its sample"
        assert not changed[1].any(), "and of no other sample"
        same_everywhere = random_scores(torch.ones(1, 64, 32), torch.tensor([1]), 8)
        assert same_everywhere.unique().numel() == 8

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_dtypes(self, dtype):
        scores = random_scores(torch.randn(2, 65, 32).to(dtype), torch.tensor([1]), 8)
        assert scores.shape == (2, 9)
        assert scores.unique().numel() == 18

    def test_salts_are_uncorrelated(self):
        stream = torch.randn(1, 8192, 16)
        rows = torch.cat([random_scores(stream, torch.tensor([salt]), 1) for salt in range(1, 9)])
        off_diagonal = torch.corrcoef(rows) - torch.eye(8)
        assert off_diagonal.abs().max() < 0.06
