"""The rivals of the accuracy study do what they are named for, and nothing else."""

import functools

import pytest
import rivals
import torch
from tiny import tiny

import lemo_fx
from lemo_fx import Elimination, LemoConfig


@pytest.fixture
def model():
    return tiny("llama", layers=4)


IDS = torch.randint(0, 64, (2, 128), generator=torch.Generator().manual_seed(0))


def gradients(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def exact(keep):
    site = Elimination(keep=keep, eliminated="exact", score="random")
    return LemoConfig(attention=site, mlp=site, block_size=8, dense_layers=(), loss_segments=None)


def test_sparse_channels_keep_the_forward_and_all_channels_keep_the_gradient(model):
    loss, dense = gradients(model)
    with rivals.sparse_channels(model, share=1.0):
        same = gradients(model)
    assert same[0] == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(same[1], dense)
    with rivals.sparse_channels(model, share=0.2):
        few = gradients(model)
    assert few[0] == pytest.approx(loss, rel=1e-6)
    # Only layer 2 is in the upper half and not the last: layer 3 is untouched, layer 2's gate hears less.
    torch.testing.assert_close(
        few[1]["model.layers.3.mlp.gate_proj.weight"], dense["model.layers.3.mlp.gate_proj.weight"]
    )
    rows = few[1]["model.layers.2.mlp.gate_proj.weight"].abs().sum(1)
    assert (rows > 0).sum() == round(0.2 * 64)
    assert gradients(model)[0] == pytest.approx(loss)


def test_full_keys_give_kept_rows_the_dense_attention(model, monkeypatch):
    lemo_fx.transform(model, exact(0.25))
    attention = model.model.layers[0].self_attn
    outputs, forward = [], type(attention).forward

    @functools.wraps(forward)
    def noted(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self is attention:
            outputs.append(output[0].detach())
        return output

    # No hook: a layer with one runs its original code.
    monkeypatch.setattr(type(attention), "forward", noted)
    tokens = []
    model.model.layers[0].lemo_attention_select.register_forward_hook(lambda m, a, out: tokens.append(out))
    with rivals.full_keys(model):
        gradients(model)
    full = next(x for x in outputs if x.shape[1] == 128)
    kept = next(x for x in outputs if x.shape[1] < 128)
    torch.testing.assert_close(kept, torch.stack([row[chosen] for row, chosen in zip(full, tokens[0], strict=True)]))


def test_shifted_groups_see_no_future_and_no_other_group(model):
    attention = model.model.layers[0]
    with rivals.shifted_groups(model):
        outputs = []
        attention.self_attn.register_forward_hook(lambda m, args, output: outputs.append(output[0].detach()))
        model(input_ids=IDS)
        changed = IDS.clone()
        changed[:, 40] = (changed[:, 40] + 1) % 64
        model(input_ids=changed)
    difference = (outputs[0] - outputs[1]).abs().amax(dim=(0, 2)) > 1e-7
    # Groups of 32: token 40 is in the plain group 32..63 and in the shifted group 16..47.
    assert difference.nonzero().flatten().tolist() == list(range(40, 64))
