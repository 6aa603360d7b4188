import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import lemo_fx
from lemo_fx.measure import counts, flops, saved_bytes


def test_a_storage_counts_once_and_parameters_not_at_all():
    linear = nn.Linear(8, 8, bias=False)
    x = torch.ones(4, 8, requires_grad=True)
    assert saved_bytes(lambda: linear(x), linear) == 4 * 8 * 4
    assert saved_bytes(lambda: linear(x)) == 4 * 8 * 4 + 8 * 8 * 4

    def twice():
        # A view of one row keeps all rows.
        return linear(x), linear(x[:1])

    assert saved_bytes(twice, linear) == 4 * 8 * 4


def test_what_the_backward_released_does_not_add_up():
    x = torch.ones(10, requires_grad=True)

    def step():
        x.exp().sum().backward()

    one = saved_bytes(step)
    assert one == 40
    assert saved_bytes(lambda: [step(), step()]) == one


def test_a_checkpoint_counts_with_its_arguments():
    linear = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.ones(4, 8, requires_grad=True)
    plain = saved_bytes(lambda: linear(x).sum().backward(), linear)
    held = saved_bytes(lambda: checkpoint(linear, x, use_reentrant=False).sum().backward(), linear)
    assert held == 4 * 8 * 4 < plain


def test_flops_of_a_matrix_product():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert flops(lambda: a @ b) == 2 * 3 * 5 * 7


def cost(model, ids):
    """(bytes saved, operations) of one step."""
    return counts(lambda: model(input_ids=ids, labels=ids).loss.backward(), model)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, use_cache=False
    )
    return LlamaForCausalLM(config).train()


def test_attention_is_counted_on_the_cpu(model):
    def of(length):
        ids = torch.arange(length)[None] % 64
        with torch.no_grad():
            return flops(lambda: model(ids))

    quadratic = of(512) - 2 * of(256)
    assert quadratic == 2 * 2 * (2 * 2 * 32) * 256 * 256


def test_a_transformed_step_costs_less_and_counts_repeat(model):
    ids = torch.arange(512)[None] % 64
    site = lemo_fx.Elimination(keep=0.5, score="random")
    saved, operations = cost(model, ids)
    lemo_fx.transform(model, lemo_fx.LemoConfig(attention=site, mlp=site))
    after = cost(model, ids)
    assert after[0] < 0.7 * saved
    assert after[1] < 0.7 * operations
    assert after == cost(model, ids)


def test_measuring_scores_is_counted(model):
    ids = torch.arange(256)[None] % 64

    def operations(score):
        site = lemo_fx.Elimination(keep=0.5, score=score)
        lemo_fx.transform(model, lemo_fx.LemoConfig(attention=site, mlp=None))
        return cost(model, ids)[1]

    # Q, K, V and their products for every token, in both layers.
    assert operations("measured") - operations("random") >= 2 * 2 * 256 * 256 * 32
