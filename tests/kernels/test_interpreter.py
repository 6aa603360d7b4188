"""The Triton kernels on a CPU, in Triton's interpreter, which a process must ask for before it imports Triton."""

import os
import subprocess
import sys

import pytest
import torch
from tolerance import TOLERANCE

from lemo_fx.kernels.block_scores import reference as scores_reference
from lemo_fx.kernels.eliminate import reference as rows_reference
from lemo_fx.kernels.restore import reference as restore_reference
from lemo_fx.kernels.segmented_cross_entropy import reference as loss_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs within test_kernels_in_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_kernels_in_the_interpreter():
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("older interpreters fail with NumPy 2.4 in a loop whose bound is computed")
    command = [sys.executable, "-m", "pytest", "-v", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore", __file__]
    found = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert "1 skipped" in found.stdout, found.stdout


SHAPES = [(1, 10, 4, 8), (3, 33, 32, 20), (2, 16, 16, 7), (2, 9, 0, 5), (1, 1, 1, 3), (2, 40, 1, 6), (1, 17, 9, 5000)]


@inside
@pytest.mark.parametrize(("batch", "length", "kept", "width"), SHAPES)
def test_rows_move_there_and_back(batch, length, kept, width):
    from lemo_fx.kernels.eliminate import triton

    stream = torch.randn(length, batch, width).transpose(0, 1)
    rows = torch.randn(batch, width, kept).transpose(1, 2)
    tokens = torch.stack([torch.randperm(length)[:kept].sort().values for _ in range(batch)])
    assert torch.equal(triton.eliminate(stream, tokens), rows_reference.eliminate(stream, tokens))
    back = triton.scatter(None, rows, tokens, length, rows.dtype)
    assert torch.equal(back, rows_reference.scatter_rows(rows, tokens, length))
    restored = triton.scatter(stream, rows, tokens, length, torch.float32)
    torch.testing.assert_close(restored, restore_reference.restore(stream, rows, tokens), **TOLERANCE["fp32"])


@inside
@pytest.mark.parametrize("shape", [(16, 16), (64, 128), (80, 144)])
def test_bytes_are_transposed(shape):
    from lemo_fx.kernels.float8_linear import triton

    matrix = torch.randint(256, shape, dtype=torch.uint8)
    assert torch.equal(triton.transposed(matrix), matrix.t())


@inside
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("heads", "group", "length", "width", "block"), [(4, 2, 70, 8, 16), (2, 1, 150, 20, 48)])
def test_block_scores(heads, group, length, width, block, packed):
    from lemo_fx.kernels.block_scores import triton

    query = torch.randn(2, length, heads, width).transpose(1, 2)
    key = torch.randn(2, heads // group, length, width)
    documents = None
    if packed:
        documents = (torch.arange(length) // 25).expand(2, -1).clone()
        documents[0, -12:] = -1
    found = triton.block_scores(query, key, documents, width**-0.5, block)
    expected = scores_reference.block_scores(query, key, None, documents, width**-0.5, block)
    torch.testing.assert_close(found, expected, **TOLERANCE["fp32"])


@inside
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("vocabulary", [13, 9000])
def test_cross_entropy(vocabulary, softcap):
    from lemo_fx.kernels.segmented_cross_entropy import triton

    logits = 4 * torch.randn(6, vocabulary)
    labels = torch.randint(0, vocabulary, (6,))
    labels[2] = -100
    gradient = logits.clone()
    loss = triton.loss_and_gradient(gradient, labels, softcap, -100, True)
    # An identity as the head: the hidden states are the logits.
    expected = loss_reference.segmented_cross_entropy(
        logits, torch.eye(vocabulary), None, labels, softcap, -100, 6, (True, False, False)
    )
    torch.testing.assert_close(loss, expected[0], **TOLERANCE["fp32"])
    torch.testing.assert_close(gradient, expected[1], **TOLERANCE["fp32"])
