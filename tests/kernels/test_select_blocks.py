import copy
import logging
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lemo_fx.errors import SelectionError
from lemo_fx.kernels.eliminate.op import eliminate
from lemo_fx.kernels.restore.op import restore
from lemo_fx.kernels.select_blocks import op
from lemo_fx.kernels.select_blocks.reference import (
    THRESHOLD_BUCKETS,
    dropped_tokens,
    select_blocks,
    select_by_threshold,
)
from lemo_fx.runtime.kept import labelled_tokens
from lemo_fx.runtime.select import SelectBlocks
from lemo_fx.runtime.step import Step


def blocks_of(tokens, size):
    return [sorted({int(t) // size for t in row}) for row in tokens]


def choose(scores, length=None, size=4, keep=(1, 2), valid=None, labelled=None):
    scores = torch.as_tensor(scores, dtype=torch.float32)
    scores = scores[None] if scores.dim() == 1 else scores
    return select_blocks(scores, valid, labelled, length or scores.shape[1] * size, size, keep)


def test_best_blocks_in_order_and_first_and_last_always():
    tokens = choose([0.0, 1, 9, 3, 8, 0])
    assert blocks_of(tokens, 4) == [[0, 2, 5]]
    assert tokens.tolist() == [[0, 1, 2, 3, 8, 9, 10, 11, 20, 21, 22, 23]]


def test_each_sample_chooses_for_itself():
    assert blocks_of(choose([[0.0, 1, 9, 3, 8, 0], [0.0, 1, 2, 3, 8, 0]]), 4) == [[0, 2, 5], [0, 4, 5]]


def test_ties_go_to_the_earlier_block():
    assert blocks_of(choose([1.0] * 8), 4) == [[0, 1, 2, 7]]


def test_nan_is_kept_and_infinities_are_ordered():
    inf, nan = float("inf"), float("nan")
    assert blocks_of(choose([0.0, nan, 9, 3, 8, 0]), 4) == [[0, 1, 5]]
    assert blocks_of(choose([0.0, 1, 9, -inf, inf, 0]), 4) == [[0, 4, 5]]
    assert blocks_of(choose([0.0, -inf, -inf, -5, -inf, 0]), 4) == [[0, 3, 5]]


def test_ragged_tail_is_kept_and_cut():
    tokens = choose([0.0, 1, 9, 3, 8, 0], length=22)
    assert tokens.tolist() == [[0, 1, 2, 3, 8, 9, 10, 11, 20, 21]]


def test_padding_comes_last_and_the_ends_of_the_real_tokens_are_pinned():
    valid = torch.zeros(2, 32, dtype=torch.bool)
    valid[0, 10:] = True
    valid[1, :15] = True
    scores = torch.full((2, 8), 5.0)
    scores[0, 2], scores[1, 3] = 0, 0
    kept = blocks_of(choose(scores, valid=valid, keep=(1, 2)), 4)
    assert kept[0] == [2, 3, 4, 7], "left padding: first real block and last block"
    assert {0, 3} <= set(kept[1]), "right padding: first block and last real block"
    assert {0, 1, 2, 3} <= set(blocks_of(choose(scores, valid=valid, keep=(5, 8)), 4)[1])


def test_ragged_tail_survives_padding_and_labels_under_a_tiny_budget():
    """The cut at the end takes what the tail lacks, so the tail must be the last block of every sample."""
    valid = torch.ones(1, 30, dtype=torch.bool)
    valid[0, 14:] = False
    tokens = choose([5.0] * 8, length=30, valid=valid, keep=(1, 8))
    assert blocks_of(tokens, 4)[0][-1] == 7
    assert tokens.shape[1] == 2 * 4 - 2
    labelled = torch.zeros(1, 30, dtype=torch.bool)
    labelled[0, 4:12] = True
    tokens = choose([5.0] * 8, length=30, valid=valid, labelled=labelled, keep=(1, 2))
    assert blocks_of(tokens, 4)[0][-1] == 7
    assert all(sum(int(t) // 4 == b for t in tokens[0]) == (2 if b == 7 else 4) for b in blocks_of(tokens, 4)[0])


def test_few_labelled_blocks_are_pinned_and_many_are_not():
    labelled = torch.zeros(1, 32, dtype=torch.bool)
    labelled[0, 9] = True
    scores = [9.0, 9, 0, 9, 9, 9, 9, 9]
    assert 2 in blocks_of(choose(scores, labelled=labelled), 4)[0]
    assert 2 not in blocks_of(choose(scores), 4)[0]
    assert 2 not in blocks_of(choose(scores, labelled=torch.ones(1, 32, dtype=torch.bool)), 4)[0]


@pytest.mark.parametrize(
    ("labels", "keep", "length", "expected"),
    [
        ([17], (1, 8), 32, [0, 4]),
        ([15, 16], (1, 8), 32, [3, 4]),
        ([17], (3, 8), 32, [0, 4, 7]),
        ([7, 12, 17], (3, 8), 32, [0, 1, 3]),
        ([7, 12, 17, 31], (3, 8), 32, [0, 1, 7]),
        ([7, 12, 17, 31], (1, 8), 30, [1, 7]),
        ([17], (1, 8), 30, [4, 7]),
        ([15, 16], (1, 8), 30, [3, 7]),
        ([17], (3, 8), 30, [0, 4, 7]),
    ],
)
def test_labels_go_before_the_ends_but_not_before_a_ragged_tail(labels, keep, length, expected):
    labelled = torch.zeros(1, length, dtype=torch.bool)
    labelled[0, [label for label in labels if label < length]] = True
    valid = torch.arange(length)[None] < 24
    scores = [9.0, 9, 99, 9, 0, 9, 9, 9]
    # Where there is padding, the last real block has no place beside a padded tail.
    assert blocks_of(choose(scores, length, keep=keep, labelled=labelled), 4) == [expected]
    if length == 30:
        assert blocks_of(choose(scores, length, keep=keep, labelled=labelled, valid=valid), 4) == [expected]
        nothing_real = torch.zeros(1, length, dtype=torch.bool)
        assert 7 in blocks_of(choose(scores, length, keep=keep, labelled=labelled, valid=nothing_real), 4)[0]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_only_label_survives(data):
    """For any length, batch, padding, block size, budget and threshold; the token that predicts it, first of all."""
    size, length, rows = (data.draw(st.integers(*ends)) for ends in ((1, 9), (2, 60), (1, 3)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    scores = torch.randn(rows, -(-length // size), generator=generator)
    scores[torch.rand(scores.shape, generator=generator) < 0.2] = data.draw(
        st.sampled_from([0.0, float("nan"), float("inf"), -float("inf")])
    )
    valid = None
    if data.draw(st.booleans()):
        real = torch.tensor([data.draw(st.integers(2, length)) for _ in range(rows)])[:, None]
        valid = torch.arange(length) < real if data.draw(st.booleans()) else torch.arange(length) >= length - real
    labels = torch.full((rows, length), -100)
    first = 0 if valid is None else valid.int().argmax(1)
    last = length - 1 if valid is None else length - 1 - valid.flip(1).int().argmax(1)
    target = first + 1 + (torch.rand(rows, generator=generator) * (last - first)).long()
    labels[torch.arange(rows), target] = 5
    labelled = labelled_tokens(labels, torch.zeros(rows, length, 1))
    if data.draw(st.booleans()):
        keep = data.draw(st.sampled_from([(1, 100), (1, 10), (1, 4), (1, 3), (1, 2), (3, 4), (1, 1)]))
        tokens = select_blocks(scores, valid, labelled, length, size, keep)
        assert tokens.shape == select_blocks(scores, None, None, length, size, keep).shape
    else:
        threshold = data.draw(st.sampled_from([-1.0, 0.0, 1.0, float("inf")]))
        part = SelectBlocks(size, 1.0, Step())
        part.set_threshold(threshold)
        tokens = select_by_threshold(scores, valid, labelled, length, size, part.threshold)
    for row, predicts in zip(tokens, target - 1, strict=True):
        assert predicts in row


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_however_many_labels_some_survive(data):
    size, blocks = data.draw(st.integers(1, 9)), data.draw(st.integers(3, 24))
    scores = torch.tensor([data.draw(st.lists(st.floats(-9, 9), min_size=blocks, max_size=blocks))])
    chosen = data.draw(st.sets(st.integers(0, blocks - 1), min_size=1))
    labelled = torch.isin(torch.arange(blocks * size) // size, torch.tensor(sorted(chosen)))[None]
    count = data.draw(st.integers(2, blocks))
    kept = set(blocks_of(select_blocks(scores, None, labelled, blocks * size, size, (count, blocks)), size)[0])
    assert len(kept & chosen) >= min(len(chosen), 2)
    if len(chosen) <= max(2, count // 2):
        assert chosen <= kept
    if len(chosen) == blocks:
        assert {0, blocks - 1} <= kept


def test_threshold_keeps_every_block_above():
    scores = torch.tensor([[0.0, 1, 9, 3, 8, 0, 2, 0], [5.0, 5, 5, 5, 0, 0, 0, 0]])
    tokens = select_by_threshold(scores, None, None, 32, 4, 2.5)
    kept = blocks_of(tokens, 4)
    assert {2, 3, 4} <= set(kept[0])
    assert {0, 1, 2, 3} <= set(kept[1])
    assert len(kept[0]) == len(kept[1]) == 5
    nan = scores.clone()
    nan[0, 5] = float("nan")
    assert 5 in blocks_of(select_by_threshold(nan, None, None, 32, 4, 2.5), 4)[0]


def test_threshold_counts_fall_into_few_buckets():
    sizes = set()
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(1, 100, generator=generator)
        threshold = float(torch.rand((), generator=generator))
        tokens = select_by_threshold(scores, None, None, 400, 4, threshold)
        wanted = set((scores[0] >= threshold).nonzero().flatten().tolist())
        assert wanted <= set(blocks_of(tokens, 4)[0])
        sizes.add(tokens.shape[1])
    assert len(sizes) <= THRESHOLD_BUCKETS
    assert select_by_threshold(scores, None, None, 400, 4, 2.0).shape[1] <= -(-100 // THRESHOLD_BUCKETS) * 4


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_selection_to_restoration(data):
    """For any length, batch, padding, block size and keep: ascending, unique, a count of s alone, nothing lost."""
    size = data.draw(st.integers(1, 9))
    length = data.draw(st.integers(1, 60))
    rows = data.draw(st.integers(1, 3))
    keep = data.draw(st.sampled_from([(1, 10), (1, 4), (1, 3), (1, 2), (3, 4), (1, 1)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    count = -(-length // size)
    scores = torch.randn(rows, count, generator=generator)
    valid = labelled = None
    if data.draw(st.booleans()):
        valid = torch.ones(rows, length, dtype=torch.bool)
        for row in range(rows):
            missing = data.draw(st.integers(0, length - 1))
            valid[row, :missing] = data.draw(st.booleans())
            if valid[row].all():
                valid[row, length - missing :] = False
    if data.draw(st.booleans()):
        labelled = torch.rand(rows, length, generator=generator) < 0.1
    tokens = select_blocks(scores, valid, labelled, length, size, keep)
    assert tokens.shape[1] == select_blocks(scores * 0, None, None, length, size, keep).shape[1]
    if keep == (1, 1):
        assert tokens.shape[1] == length
    assert (tokens.diff(dim=1) > 0).all()
    assert tokens.min() >= 0
    assert tokens.max() < length
    for row, kept in enumerate(blocks_of(tokens, size)):
        for block in kept:
            whole = range(block * size, min((block + 1) * size, length))
            assert set(whole) <= set(tokens[row].tolist()), "blocks are kept whole"
        first = 0 if valid is None else int(valid[row].int().argmax()) // size
        # Of two or three places, a ragged tail and labels may need all.
        assert first in kept or (labelled is not None and len(kept) <= 3)
    rest = dropped_tokens(tokens, length)
    for row in range(rows):
        assert sorted(tokens[row].tolist() + rest[row].tolist()) == list(range(length))
        assert rest[row].tolist() == sorted(rest[row].tolist())
    stream = torch.randn(rows, length, 3, dtype=torch.float64)
    doubled = restore(stream, eliminate(stream, tokens), tokens)
    doubled = restore(doubled, eliminate(stream, rest), rest)
    assert torch.equal(doubled, 2 * stream)


@pytest.fixture
def record():
    return op.SiteRecord()


@pytest.fixture
def site(record):
    return record.site


def test_opcheck(site):
    scores, stream = torch.randn(2, 5), torch.randn(2, 18, 4)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    tokens, digest, nan = select_blocks(scores, None, None, 18, 4, (1, 2)), torch.randn(2, 16), torch.tensor(False)
    torch.library.opcheck(op.remember, (tokens, digest, nan, site, 18, 4), test_utils=utilities)
    limit = torch.tensor(0.5)
    for x in (stream, stream.transpose(0, 1).contiguous().transpose(0, 1)):
        arguments = (scores, None, None, x, site, 4, limit)
        torch.library.opcheck(torch.ops.lemo_fx.select_by_threshold.default, arguments, test_utils=utilities)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 17, 18, 19, 20, 64])
@pytest.mark.parametrize("keep", [(1, 10), (1, 2), (2, 3), (1, 1)])
def test_the_fake_knows_the_count(length, keep, site):
    from torch._subclasses.fake_tensor import FakeTensorMode

    scores, stream = torch.randn(2, -(-length // 4)), torch.randn(2, length, 4)
    real = op.select_blocks(scores, None, None, stream, site, 4, keep)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        arguments = [mode.from_tensor(t) for t in (scores, stream, site)]
        fake = op.select_blocks(arguments[0], None, None, *arguments[1:], 4, keep)
    assert fake.shape == real.shape


def test_nan_warns_once(site, caplog):
    scores, stream = torch.tensor([[0.0, float("nan"), 1, 2, 3]]), torch.randn(1, 20, 4)
    with caplog.at_level(logging.WARNING, logger="lemo_fx"):
        for _ in range(3):
            tokens = op.select_blocks(scores, None, None, stream, site, 4, (1, 2))
    assert blocks_of(tokens, 4) == [[0, 1, 4]]
    assert len([r for r in caplog.records if "NaN" in r.message]) == 1


class Recompute(torch.autograd.Function):
    """Runs a function in the backward, as a checkpoint does."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.function()
        return grad, None


def recompute(function):
    Recompute.apply(torch.ones(1, requires_grad=True), function).sum().backward()


def test_a_recompute_that_no_forward_made_is_an_error(site):
    with pytest.raises(SelectionError, match="did not record"):
        recompute(lambda: op.select_blocks(torch.zeros(1, 5), None, None, torch.randn(1, 20, 4), site, 4, (1, 2)))


def test_a_site_that_is_gone_is_an_error():
    with pytest.raises(SelectionError, match="revert between steps"):
        op.select_blocks(torch.zeros(1, 5), None, None, torch.randn(1, 20, 4), op.SiteRecord().site, 4, (1, 2))


def test_a_recompute_passes_by_what_was_chosen_on_another_device(record):
    """A model that moves keeps its record, and a step may have been dropped before its backward."""
    stream, found = torch.randn(1, 20, 4), []
    chosen = op.select_blocks(torch.tensor([[0.0, 1, 9, 3, 0]]), None, None, stream, record.site, 4, (1, 2))
    record.choices.append(
        op.Choice(*(x.to("meta") if torch.is_tensor(x) else x for x in vars(record.choices[0]).values()))
    )
    run = (torch.zeros(1, 5), None, None, stream, record.site, 4, (1, 2))
    recompute(lambda: found.append(op.select_blocks(*run)))
    assert torch.equal(found[0], chosen)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda record: pickle.loads(pickle.dumps(record))])
def test_a_copied_site_begins_a_record_of_its_own(record, copied):
    other = copied(record)
    op.select_blocks(torch.zeros(1, 5), None, None, torch.randn(1, 20, 4), other.site, 4, (1, 2))
    assert (len(record.choices), len(other.choices)) == (0, 1)


def test_pinned_blocks_reach_every_threshold():
    valid = torch.arange(30) >= torch.tensor([[9], [0]])
    valid[:, 21:] = False
    part = SelectBlocks(4, 1.0, Step())
    part.set_threshold(float("inf"))
    kept = part(torch.zeros(2, 8), torch.randn(2, 30, 4), valid.long())
    # The first and the last real block, and the ragged tail, in either sample.
    assert [row[-1] for row in blocks_of(kept, 4)] == [7, 7]
    assert {2, 5, 7} <= set(blocks_of(kept, 4)[0])
    assert {0, 5, 7} <= set(blocks_of(kept, 4)[1])
