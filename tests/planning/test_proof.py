"""The proof of a rewrite: every fault put in on purpose is seen while transforming, and none where there is none.

Faults are put into passes and kernels, or into layers whose analysis is told to accept them.
"""

import copy
import functools
import time

import pytest
import torch
from tiny import ARCHITECTURES, anatomy, batch, gradients, tiny, with_lora
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import lemo_fx
from lemo_fx import Elimination, LemoConfig, UnsupportedModelError
from lemo_fx.graph import sites
from lemo_fx.kernels.restore import op as restore
from lemo_fx.passes import insert_elimination, insert_restoration
from lemo_fx.passes.pipeline import PASSES
from lemo_fx.passes.rewrite import call
from lemo_fx.planning import proof


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(proof, "_known", {})


def config(treatment="skip", score="random", attention=True, mlp=True, **settings):
    site = Elimination(eliminated=treatment, score=score)
    return LemoConfig(site if attention else None, site if mlp else None, block_size=8, dense_layers=(), **settings)


def faults(model, treatment="skip", **settings):
    """What proofs found, by (layer, site); the layers are then dense at that site, or as they were."""
    classes = [type(layer) for layer in model.get_decoder().layers]
    try:
        lemo_fx.transform(model, config(treatment, **settings))
    except UnsupportedModelError as error:
        assert [type(layer) for layer in model.get_decoder().layers] == classes
        return {"everywhere": str(error)}
    report = lemo_fx.report(model)
    left = {note.split(":")[0]: note for note in report.notes if "left as it is" in note}
    return left | {f"{s.module} {s.site}": s.note for s in report.sites if "left dense" in s.note}


def seen(model, treatment="skip", **settings):
    found = faults(model, treatment, **settings)
    assert found, "not seen"
    words = ("off by", "fails", "other shapes", "numbers the rows")
    assert all(any(word in what for word in words) for what in found.values()), found
    return found


def with_layers(layer_class, layers=2, **settings):
    model = tiny("llama", layers, **settings)
    model.model.layers = nn.ModuleList(layer_class(model.config, index) for index in range(layers))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.copy_(parameter * 5 if parameter.dim() > 1 else parameter + 0.1 * torch.randn_like(parameter))
    return model.train()


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("treatment", ["skip", "exact"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_seen_where_nothing_is_wrong(architecture, treatment, lora, monkeypatch):
    found = []

    def spied(*args):
        found.append(prove(*args))
        return found[-1]

    prove = proof.prove
    monkeypatch.setattr(proof, "prove", spied)
    model = with_lora(tiny(architecture)) if lora else tiny(architecture)
    lemo_fx.transform(model, config(treatment, "measured"))
    assert found
    assert set(found) == {None}
    report = lemo_fx.report(model)
    assert not [note for note in report.notes if "not proven" in note]
    assert {site.eliminated for site in report.sites} == {treatment}


# Faults of the passes.


def renumbered(value, tokens, length):
    """The kept tokens get the positions of the sequence's first ones."""
    return tuple(part[:, : tokens.shape[1]].expand(tokens.shape[0], -1, -1) for part in value)


@pytest.mark.parametrize("treatment", ["skip", "exact"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi", "gpt_neox"])
def test_positions_renumbered_after_elimination(architecture, treatment, monkeypatch):
    monkeypatch.setitem(insert_elimination.COMPACT, "position_embeddings", renumbered)
    found = seen(tiny(architecture), treatment)
    assert all("attention" in where or where == "everywhere" for where in found)


@pytest.mark.parametrize("treatment", ["skip", "exact"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "opt"])
def test_a_mask_that_the_kept_tokens_lose(architecture, treatment, monkeypatch):
    monkeypatch.setitem(insert_elimination.COMPACT, "attention_mask", lambda mask, tokens, length: None)
    seen(tiny(architecture), treatment)


def test_a_mask_whose_columns_are_not_followed(monkeypatch):
    def rows_only(mask, tokens, length):
        count = tokens.shape[1]
        return None if mask is None else real(mask, torch.arange(count).expand(tokens.shape[0], -1), length)

    real = insert_elimination.COMPACT["attention_mask"]
    monkeypatch.setitem(insert_elimination.COMPACT, "attention_mask", rows_only)
    seen(tiny("llama"))


def scaled(out):
    return torch.cat([out[:, :3], out[:, 3:4] * 1.05, out[:, 4:]], 1)


def swapped(out):
    return out[:, [1, 0, *range(2, out.shape[1])]]


def raises(out):
    raise RuntimeError("broken on purpose")


BREAKS = {"scaled": scaled, "swapped": swapped, "raises": raises}


@pytest.mark.parametrize("fault", BREAKS)
def test_exact_restored_wrongly(fault, monkeypatch):
    # What the attention of `exact` goes through, and the MLP's two steps.
    both = {"restore_exact": restore.reference.restore_exact, "restore": restore.reference.restore}
    for name, real in both.items():
        monkeypatch.setattr(restore.reference, name, lambda *args, real=real: BREAKS[fault](real(*args)))
    found = seen(tiny("llama"), "exact")
    assert ("fails" in str(found)) == (fault == "raises")


def test_only_the_gradient_of_exact_is_wrong(monkeypatch):
    real = restore._backward

    def less(ctx, grad):
        stream, rows, tokens = real(ctx, grad)
        return stream, 0.9 * rows, tokens

    monkeypatch.setattr(restore, "_backward", less)
    assert "gradients are off" in str(seen(tiny("llama"), "exact"))


def test_an_addend_added_twice(monkeypatch):
    """What a layer written `add(add(x, attention), mlp)` once got."""

    def add_twice(rewrite):
        output = rewrite.graph.output_node()
        first = next(n for n in rewrite.graph.nodes if n.name == "attention_restored")
        with rewrite.graph.inserting_before(output):
            twice = call(rewrite.graph, torch.add, (output.args[0], first), "twice")
        output.args = (twice,)
        return 1

    at = PASSES.index(insert_restoration.insert_restoration) + 1
    transform = functools.partial(lemo_fx.transform, passes=(*PASSES[:at], add_twice, *PASSES[at:]))
    monkeypatch.setattr(lemo_fx, "transform", transform)
    seen(tiny("llama"))


# Layers that the analysis should not have accepted.


class Nested(modeling_llama.LlamaDecoderLayer):
    """A parallel layer."""

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(
            hidden_states=normed, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
        )
        return torch.add(torch.add(hidden_states, attended), self.mlp(self.post_attention_layernorm(hidden_states)))


class MixingMLP(modeling_llama.LlamaMLP):
    """Every token reads its predecessor."""

    def forward(self, x):
        return super().forward(x + 0.3 * x.roll(1, 1))


class MixesTokens(modeling_llama.LlamaDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.mlp = MixingMLP(config)


class CountingMLP(modeling_llama.LlamaMLP):
    """Counts the rows that it is given."""

    def forward(self, x):
        return super().forward(x) * (1 + torch.arange(x.shape[1], device=x.device)[:, None] / 100)


class CountsRowsInMLP(modeling_llama.LlamaDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.mlp = CountingMLP(config)


def scaling_attention(scale):
    """A layer class whose attention scales its queries by `scale(rows, arguments)` [S or B, S]."""

    class Attention(modeling_llama.LlamaAttention):
        def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
            sizes = (*hidden_states.shape[:2], -1, self.head_dim)
            q, k, v = (f(hidden_states).view(sizes).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
            q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
            q = q * scale(sizes[1], kwargs)[..., None, :, None]
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, modeling_llama.eager_attention_forward
            )
            out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
            return self.o_proj(out.flatten(2)), weights

    class Layer(modeling_llama.LlamaDecoderLayer):
        def __init__(self, config, layer_idx):
            super().__init__(config, layer_idx)
            self.self_attn = Attention(config, layer_idx)

    return Layer


@pytest.mark.parametrize("treatment", ["skip", "exact"])
def test_a_layer_with_nested_adds_is_no_fault(treatment):
    assert faults(with_layers(Nested), treatment) == {}


@pytest.mark.parametrize("treatment", ["skip", "exact"])
@pytest.mark.parametrize("layer_class", [MixesTokens, CountsRowsInMLP])
def test_an_mlp_that_does_not_treat_tokens_alone(layer_class, treatment, monkeypatch):
    monkeypatch.setattr(sites, "why_not_token_wise", lambda module, width: None)
    found = seen(with_layers(layer_class), treatment)
    assert list(found) == ["model.layers.0 mlp", "model.layers.1 mlp"]


@pytest.mark.parametrize("treatment", ["skip", "exact"])
def test_an_attention_that_counts_its_rows(treatment):
    layer_class = scaling_attention(lambda rows, _: 1 + torch.arange(rows) / rows)
    found = seen(with_layers(layer_class), treatment)
    assert list(found) == ["model.layers.0 attention", "model.layers.1 attention"]


@pytest.mark.parametrize("treatment", ["skip", "exact"])
def test_an_attention_that_scales_by_position_is_no_fault_where_positions_follow_the_kept_tokens(treatment):
    layer_class = scaling_attention(lambda _, given: 1 + given["position_ids"] / 512)
    assert faults(with_layers(layer_class), treatment) == {}


@pytest.mark.parametrize("treatment", ["skip", "exact"])
def test_an_attention_that_scales_by_positions_that_are_renumbered(treatment, monkeypatch):
    positions = lambda value, tokens, length, renumber: value[:, : tokens.shape[1]]  # noqa: E731
    monkeypatch.setattr(insert_elimination.kept, "compact_positions", positions)
    monkeypatch.setattr(insert_elimination, "COMPACT", insert_elimination.COMPACT | {"position_ids": positions})
    others = lambda given, *_: {k: v[:, : _[0].shape[1]] if k == "position_ids" else v for k, v in given.items()}  # noqa: E731
    monkeypatch.setattr(insert_elimination.kept, "compact_kwargs", others)
    seen(with_layers(scaling_attention(lambda _, given: 1 + given["position_ids"] / 512)), treatment)


def test_an_attention_that_scales_by_its_row_only_from_a_floor_on():
    # What no probe of a few tokens shows.
    layer_class = scaling_attention(lambda rows, _: 1 + 0.1 * torch.log1p(torch.arange(rows) // 8192))
    seen(with_layers(layer_class))


# What a proof leaves behind, and what it costs.


def state(model):
    config = model.config
    return {
        **anatomy(model),
        "implementations": [getattr(getattr(m, "config", None), "_attn_implementation", None) for m in model.modules()],
        "use_cache": config.use_cache,
        "values": {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]},
        "grads": gradients(model),
        "random": torch.get_rng_state(),
        "grad_mode": torch.is_grad_enabled(),
    }


def assert_equal_states(one, other):
    for key in one:
        if isinstance(one[key], dict):
            assert one[key].keys() == other[key].keys(), key
            assert all(torch.equal(value, other[key][name]) for name, value in one[key].items()), key
        elif isinstance(one[key], torch.Tensor):
            assert torch.equal(one[key], other[key]), key
        else:
            assert one[key] == other[key], key


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt", "phi3"])
def test_the_model_is_as_it_was(architecture, mode):
    settings = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    model = with_lora(tiny(architecture, **(settings if architecture == "llama" else {})), dropout=0.1)
    model(**batch(2, 24)).loss.backward()
    model.train(mode != "eval")
    if mode == "mixed":
        model.get_decoder().layers[0].eval()
    before = state(model)
    for treatment in ("skip", "exact"):
        lemo_fx.revert(lemo_fx.transform(model, config(treatment, active="always")))
        assert_equal_states(before, state(model))


def test_a_refused_model_is_as_it_was():
    model = with_layers(scaling_attention(lambda rows, _: 1 + torch.arange(rows) / rows))
    model(**batch(2, 24)).loss.backward()
    before = state(model)
    with pytest.raises(UnsupportedModelError, match="numbers the rows"):
        lemo_fx.transform(model, config(mlp=False))
    assert_equal_states(before, state(model))


def test_one_proof_for_layers_of_one_kind_and_for_models_of_one_config(monkeypatch):
    proven = []
    prove = proof.prove
    monkeypatch.setattr(proof, "prove", lambda rewrite, *rest: proven.append(rewrite) or prove(rewrite, *rest))

    def proofs(model, **settings):
        proven.clear()
        lemo_fx.transform(model, config(**settings))
        return len(proven)

    assert proofs(tiny("llama", 4)) == 1
    assert proofs(tiny("llama", 4, seed=1)) == 0
    assert proofs(tiny("llama", 4), treatment="exact") == 1
    assert proofs(tiny("gemma3", 4)) == 2, "a layer with a window and one without"
    wider = tiny("llama", 2, intermediate_size=96)
    assert proofs(wider) == 1
    assert proofs(copy.deepcopy(lemo_fx.revert(wider))) == 0


@pytest.mark.slow
def test_a_proof_takes_less_than_fifty_milliseconds_a_layer(monkeypatch):
    """Of the processor's time, at best of a few, beside the same without proofs; on a machine without other work."""

    def seconds(proven):
        model = tiny("llama")
        with monkeypatch.context() as patched:
            patched.setattr(proof, "_known", {})
            if not proven:
                patched.setattr(proof.Proofs, "fault", lambda *_: None)
            began = time.process_time()
            lemo_fx.transform(model, config("exact"))
            return time.process_time() - began

    proven, plain = (min(seconds(p) for _ in range(4)) for p in (True, False))
    assert proven - plain < 2 * 0.05
