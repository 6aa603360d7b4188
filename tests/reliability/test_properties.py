"""Whole layers against the oracle, for any length, batch, padding, packing, block size and budget."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TOLERANCE, Recorder, batch, packed, step, tiny

import lemo_fx
from lemo_fx import Elimination, LemoConfig
from lemo_fx.kernels.eliminate import reference as eliminating
from lemo_fx.kernels.eliminate.op import eliminate
from lemo_fx.kernels.restore import reference as restoring
from lemo_fx.kernels.restore.op import restore, restore_exact
from lemo_fx.kernels.select_blocks.reference import balanced, select_blocks, select_by_threshold
from tests.behaviour.test_elimination import Oracle

STEADY = settings(deadline=None, derandomize=True, database=None)
"""The same examples in every run."""


@st.composite
def choices(draw):
    """(tokens, length, generator) of a choice under a budget or a threshold, with padding and labels."""
    size, length, rows = draw(st.integers(1, 9)), draw(st.integers(1, 60)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scores = torch.randn(rows, -(-length // size), generator=generator)
    scores[torch.rand(scores.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = draw(
        st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0])
    )
    valid = labelled = None
    if draw(st.booleans()):
        lost = torch.tensor([draw(st.integers(0, length)) for _ in range(rows)])[:, None]
        valid = torch.arange(length) >= lost if draw(st.booleans()) else torch.arange(length) < length - lost
    if draw(st.booleans()):
        labelled = torch.rand(rows, length, generator=generator) < 0.1
    if draw(st.booleans()):
        tokens = select_by_threshold(scores, valid, labelled, length, size, draw(st.floats(-1.0, 2.0)))
    else:
        share = draw(st.sampled_from([(1, 10), (1, 3), (1, 2), (3, 4), (1, 1)]))
        tokens = select_blocks(
            balanced(scores) if draw(st.booleans()) else scores, valid, labelled, length, size, share
        )
    return tokens, length, generator


@settings(STEADY, max_examples=150)
@given(choices(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.booleans())
def test_elimination_and_restoration_equal_their_references(chosen, dtype, contiguous):
    tokens, length, generator = chosen
    assert (tokens.diff(dim=1) > 0).all()
    assert tokens.min() >= 0
    assert tokens.max() < length
    stream = torch.randn(length, tokens.shape[0], 3, generator=generator).to(dtype).transpose(0, 1)
    stream = (stream.contiguous() if contiguous else stream).requires_grad_()
    full = torch.randn(stream.shape, generator=generator).to(dtype)
    weights = torch.randn(stream.shape, generator=generator).to(dtype)

    def both(take, put, put_exact):
        out = put(stream, take(stream, tokens).sin(), tokens)
        out = put_exact(out, full, take(out, tokens).cos(), tokens)
        (gradient,) = torch.autograd.grad((out * weights).sum(), stream)
        return out.detach(), gradient

    def put_exact(stream, full, rows, tokens):
        # What `restore_exact` stands for: the values of `full`, the gradient of rows.
        return restoring.restore(stream, rows - rows.detach(), tokens) + full

    found = both(eliminate, restore, restore_exact)
    expected = both(eliminating.eliminate, restoring.restore, put_exact)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE["bf16" if dtype == torch.bfloat16 else "fp32"])
    untouched = torch.ones(tokens.shape[0], length, dtype=torch.bool).scatter_(1, tokens, False)
    assert torch.equal(found[1][untouched], weights[untouched]), "an eliminated token's gradient passes by"


@st.composite
def batches(draw):
    """(inputs, document numbers or None)."""
    seed = draw(st.integers(0, 1000))
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(2, 30), min_size=2, max_size=4))
        documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        return packed(lengths, seed), documents[None]
    padding = draw(st.sampled_from([None, "left", "right", "both"]))
    return batch(draw(st.integers(1, 3)), draw(st.integers(24, 70)), padding, seed), None


@st.composite
def sites(draw):
    treatment = draw(st.sampled_from(["skip", "exact"]))
    score = draw(st.sampled_from(["measured", "random", "step"]))
    if draw(st.integers(0, 3)) == 0:
        return Elimination(threshold=draw(st.sampled_from([0.01, 0.3, 2.0])), eliminated=treatment, score=score)
    keep = draw(st.one_of(st.floats(0.05, 1.0), st.lists(st.floats(0.05, 1.0), min_size=2, max_size=2)))
    return Elimination(keep=keep, eliminated=treatment, score=score, balance=draw(st.booleans()))


@settings(STEADY, max_examples=60)
@given(st.sampled_from(["llama", "mistral"]), batches(), sites(), st.integers(1, 24), st.booleans())
def test_whole_layers_equal_the_oracle(architecture, given_batch, site, block_size, checkpointing):
    inputs, documents = given_batch
    model = tiny(architecture)
    config = LemoConfig(site, site, block_size, ())
    lemo_fx.transform(model, config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with Recorder(model) as recorder:
        loss, found = step(model, inputs)
    length = inputs["input_ids"].shape[1]
    every = torch.arange(length).expand(inputs["input_ids"].shape[0], -1)
    # The oracle takes the latest choice, which under checkpointing is the recompute's: it must be the first one again.
    for tokens in recorder.tokens.values():
        assert all(torch.equal(again, tokens[0]) for again in tokens)
        assert (tokens[0].diff(dim=1) > 0).all()
    names = [f"model.layers.{i}.lemo_{kind}_select" for i in range(2) for kind in ("attention", "mlp")]
    chosen = {name: recorder.tokens.get(name, [every]) for name in names}
    _, expected_loss, expected = Oracle(model, inputs, documents, site.eliminated).step(chosen)
    torch.testing.assert_close(loss, expected_loss, **TOLERANCE["fp32"])
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **TOLERANCE["fp32"], msg=lambda m, n=name: f"{n}: {m}")
