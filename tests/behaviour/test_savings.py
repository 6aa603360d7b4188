"""The savings that are judged, counted deterministically and independently of lemo_fx.measure."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import lemo_fx
from lemo_fx import Elimination, LemoConfig


def cost(model, inputs):
    """(bytes saved for the backward, FLOPs of forward and backward): each storage once, parameters not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = []

    def pack(tensor):
        held.append(tensor)
        return tensor

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(**inputs).loss
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        loss.backward()
    return sum(n for p, n in sizes.items() if p not in weights), counter.get_total_flops()


class NoModules:
    """In the place of the counter's hooks on modules, which use the logits of every output."""

    parents = frozenset({"Global"})

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=4096,
    )
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.randint(256, (1, 2048))
    inputs = {"input_ids": ids, "labels": ids}
    return model, inputs, cost(model, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("treatment", "keep", "bytes_ratio", "flops_ratio"), [("skip", 0.5, 1.9, 1.9), ("exact", 0.25, 2.2, 1.3)]
)
def test_judged_ratios(original, treatment, keep, bytes_ratio, flops_ratio):
    model, inputs, (dense_bytes, dense_flops) = original
    site = Elimination(keep=keep, eliminated=treatment, score="random")
    lemo_fx.transform(model, LemoConfig(attention=site, mlp=site, dense_layers=()))
    try:
        sparse_bytes, sparse_flops = cost(model, inputs)
    finally:
        lemo_fx.revert(model)
    assert dense_bytes / sparse_bytes >= bytes_ratio
    assert dense_flops / sparse_flops >= flops_ratio
