"""The residual add is opened: what is planned comes back by a restore, everything else is added once."""

import pytest
import torch
from layers import PARALLEL, output_of, rewrite_of

from lemo_fx.passes.pipeline import run_passes


@pytest.mark.parametrize("layer", PARALLEL)
def test_a_branch_that_nobody_planned_is_added_once(layer):
    module = layer()
    expected = module(x := torch.randn(2, 16, 8))
    rewrite = rewrite_of(module)
    del rewrite.sites[1], rewrite.modules["lemo_mlp_1_score"], rewrite.modules["lemo_mlp_1_select"]
    rewrite.modules["lemo_mlp_0_select"].set_keep(1.0)
    run_passes(rewrite)
    torch.testing.assert_close(output_of(rewrite, x), expected)
