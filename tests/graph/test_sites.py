import copy

import pytest
import torch
import transformers
from tiny import ARCHITECTURES, TOLERANCE, anatomy, assert_same_step, batch, saved_bytes, step, tiny, with_lora
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lemo_fx
from lemo_fx import Elimination, LemoConfig
from lemo_fx.graph.anatomy import decoder_layers, is_softmax_attention
from lemo_fx.graph.capture import ABSENT_IN_TRAINING, capture
from lemo_fx.graph.sites import find_sites
from lemo_fx.graph.token_wise import why_not_token_wise

PARALLEL = ("gpt_neox", "phi")


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture, lora):
    model = tiny(architecture, 2)
    layers = decoder_layers(with_lora(model) if lora else model)
    assert len(layers) == 2
    graph = capture(layers[0][1], ABSENT_IN_TRAINING)
    sites, refusals = find_sites(graph)
    assert not refusals
    first, second = sites
    assert first.stream is next(iter(graph.nodes))
    assert [s.kind for s in sites] == ["attention", "mlp"]
    if architecture in PARALLEL:
        assert first.stream is second.stream
        assert first.add is second.add
    else:
        assert first.add is not second.add
        between = second.stream
        assert between is first.add or between.args[0] is first.add, "the MLP reads what the attention was added to"
    for site in sites:
        assert site.branch in site.nodes
        assert site.mixer in site.nodes
        assert site.stream not in site.nodes
        assert site.add not in site.nodes
    assert not set(first.nodes) & set(second.nodes) or architecture == "phi", "only Phi shares a norm"
    assert not any(n.target in ("reshape", "view") for n in graph.nodes), "OPT's flattening is gone"


class Attention(nn.Module):
    is_causal = True

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.config = None

    def forward(self, x):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](self, x, x, x, None)


class Encoder(Attention):
    is_causal = False

    def forward(self, x):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](self, x, x, x, None)


class MixesTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(x).cumsum(1)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.inner(x)


class Block(nn.Module):
    """A layer whose forward is given; every kind of part is at hand."""

    def __init__(self, run):
        super().__init__()
        self.norm, self.attention, self.second, self.encoder = nn.LayerNorm(8), Attention(), Attention(), Encoder()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.mixes, self.hidden, self.dropout = MixesTokens(), Residual(), nn.Dropout(0.1)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def found(run):
    sites, refusals = find_sites(capture(Block(run)))
    return [s.kind for s in sites], refusals


def test_a_plain_block():
    kinds, refusals = found(lambda m, x: (h := x + m.attention(m.norm(x))) + m.dropout(m.mlp(m.norm(h))))
    assert kinds == ["attention", "mlp"]
    assert not refusals


def test_residual_on_the_right_and_token_wise_work_around():
    kinds, refusals = found(lambda m, x: torch.nn.functional.gelu(m.norm(m.mlp(m.norm(x)))) * 2 + x)
    assert kinds == ["mlp"]
    assert not refusals


def test_three_parallel_branches():
    kinds, _ = found(lambda m, x: x + m.attention(m.norm(x)) + m.mlp(x) + m.mlp(m.norm(x)))
    assert sorted(kinds) == ["attention", "mlp", "mlp"]


def test_what_a_layer_returns_besides_its_stream():
    kinds, refusals = found(lambda m, x: ((h := x + m.attention(m.norm(x))) + m.mlp(m.norm(h)), h, None))
    assert kinds == ["attention", "mlp"]
    assert not refusals
    kinds, refusals = found(lambda m, x: ((h := x + (a := m.attention(m.norm(x)))) + m.mlp(m.norm(h)), a * 2))
    assert kinds == ["mlp"]
    assert [(r.site.kind, r.reason) for r in refusals] == [
        ("attention", "is also read outside of its branch, by 'mul'")
    ]
    kinds, refusals = found(lambda m, x: ((a := m.attention(m.norm(x))), b := a * 2, x + a, b)[2:])
    assert [r.site for r in refusals] == [None], "what reads it comes before the add"
    kinds, refusals = found(lambda m, x: x + (a := m.attention(m.norm(x))) + m.mlp(a))
    assert not kinds
    assert "is shared by two branches" in refusals[0].reason


def test_a_stream_that_is_cast_for_the_add_and_back():
    kinds, refusals = found(lambda m, x: (x.float() + m.attention(m.norm(x))).to(x.dtype))
    assert kinds == ["attention"]
    assert not refusals


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda m, x: m.hidden(m.hidden(x)), "hands the residual stream through"),
        (lambda m, x: torch.sub(x, m.mlp(x)), "is no plain x + y"),
        (lambda m, x: x, "is returned as it comes"),
        (lambda m, x: x + m.mixes(m.norm(x)), "mixes tokens"),
        (lambda m, x: x + m.second(m.attention(m.norm(x))), "is a second attention"),
        (lambda m, x: x + m.encoder(m.norm(x)), "is not causal"),
        (lambda m, x: x + m.mlp(x).cumsum(1), "not known to treat tokens one by one"),
        (lambda m, x: x + m.mlp(x)[0], "indexes a value"),
        (lambda m, x: x + m.norm(x).transpose(0, 1), "not known to treat tokens one by one"),
        (lambda m, x: x + torch.roll(m.mlp(x), 1, 1), "roll"),
        (lambda m, x: x + m.mlp(x).reshape(-1, 8).cumsum(0).view(x.shape), "not known"),
        (lambda m, x: x + torch.sigmoid(x) * x, "holds no module"),
        (lambda m, x: torch.zeros(1, 2, 8), "does not reach the output"),
    ],
)
def test_refusals(run, reason):
    kinds, refusals = found(run)
    assert any(reason in r.reason for r in refusals), (kinds, refusals)


class RunningMean(nn.Module):
    def forward(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


def mixing(layers=2, checkpointing=False, **settings):
    """MLPs that read every token."""
    model = tiny("llama", layers, **settings)
    for layer in model.model.layers:
        layer.mlp = nn.Sequential(layer.mlp, RunningMean())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


EXACT = Elimination(keep=0.5, eliminated="exact")


@pytest.mark.parametrize("mlp", [EXACT, None])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_refused_branch_stays_dense_and_the_rest_is_rewritten(checkpointing, mlp):
    inputs = batch(2, 48, "right")
    expected = step(mixing(), inputs)
    everything = Elimination(keep=1.0)
    plan = LemoConfig(everything, mlp and everything, block_size=8, dense_layers=())
    whole = lemo_fx.transform(mixing(checkpointing=checkpointing), plan)
    assert_same_step(step(whole, inputs), expected, "fp32")
    half = mixing(checkpointing=checkpointing)
    lemo_fx.transform(half, LemoConfig(EXACT, mlp, block_size=8, dense_layers=()))
    loss, gradients = step(half, inputs)
    torch.testing.assert_close(loss, expected[0], **TOLERANCE["fp32"])
    name = "model.layers.0.self_attn.v_proj.weight"
    assert not torch.allclose(gradients[name], expected[1][name]), "half of the tokens give no gradient"
    rows = {row.site: row for row in lemo_fx.report(half).sites if row.module == "model.layers.0"}
    assert rows["attention"].eliminated == "exact"
    assert rows["mlp"].eliminated == "dense"
    assert "Sequential mixes tokens" in rows["mlp"].note


@pytest.mark.parametrize("mlp", [EXACT, None])
def test_checkpointing_covers_a_refused_branch(mlp):
    inputs = batch(2, 48)
    original = saved_bytes(mixing(4, checkpointing=True), inputs)
    assert original < 0.5 * saved_bytes(mixing(4), inputs)
    model = mixing(4, checkpointing=True)
    lemo_fx.transform(model, LemoConfig(EXACT, mlp, block_size=8, dense_layers=(), loss_segments=None))
    # Two functions a layer are recomputed instead of one: the stream between them is kept, and the kept rows.
    assert saved_bytes(model, inputs) < 2 * original


def test_a_model_in_which_nothing_can_be_rewritten():
    model = mixing(attention="eager")
    for layer in model.model.layers:
        layer.unused, layer.self_attn = layer.self_attn, copy.copy(layer.self_attn)
        layer.self_attn.is_causal = False
    before = anatomy(model)
    with pytest.raises(lemo_fx.UnsupportedModelError, match=r"can rewrite: model.layers.0: left dense: self_attn"):
        lemo_fx.transform(model, LemoConfig(block_size=8, dense_layers=()))
    with pytest.raises(lemo_fx.UnsupportedModelError, match="is not causal"):
        lemo_fx.transform(model, LemoConfig(EXACT, None, block_size=8, dense_layers=()))
    assert anatomy(model) == before
    lemo_fx.transform(model, LemoConfig(None, None, block_size=8))


def test_a_warning_where_no_site_of_a_kind_is_rewritten(caplog):
    lemo_fx.transform(mixing(), LemoConfig(EXACT, EXACT, block_size=8, dense_layers=()))
    assert "no mlp of LlamaForCausalLM is rewritten" in caplog.text
    caplog.clear()
    lemo_fx.transform(mixing(), LemoConfig(EXACT, None, block_size=8, dense_layers=()))
    assert not caplog.text


def replaced(forward, layers=1):
    """A tiny Llama whose layers run this forward."""
    model = tiny("llama", layers)
    original = type(model.model.layers[0])
    for layer in model.model.layers:
        layer.__class__ = type(original.__name__, (original,), {"forward": forward})
    return model


def test_a_layer_that_takes_its_mask_and_positions_in_a_mapping():
    def passes_on(self, hidden_states, **options):
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **options)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    inputs = batch(2, 48, "both")
    for treatment in ("skip", "exact"):
        site = Elimination(keep=0.5, eliminated=treatment, score="measured")
        plan = LemoConfig(site, site, block_size=8, dense_layers=())
        expected = step(lemo_fx.transform(tiny("llama", 2), plan), inputs)
        model = lemo_fx.transform(replaced(passes_on, 2), plan)
        assert_same_step(step(model, inputs), expected, "fp32")


def test_an_unknown_layer_argument():
    def reads_gates(self, hidden_states, attention_mask=None, gates=None, **kwargs):
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)) * gates

    model = lemo_fx.transform(replaced(reads_gates), LemoConfig(EXACT, EXACT, block_size=8, dense_layers=()))
    rows = {row.site: row for row in lemo_fx.report(model).sites}
    assert rows["mlp"].eliminated == "dense"
    assert "'gates'" in rows["mlp"].note
    assert rows["attention"].eliminated == "exact"


def test_token_wise_modules():
    assert why_not_token_wise(nn.Linear(8, 8), 8) is None
    assert why_not_token_wise(nn.Dropout(0.5), 8) is None
    assert why_not_token_wise(nn.LayerNorm(8).bfloat16(), 8) is None
    assert "mixes" in why_not_token_wise(MixesTokens(), 8)
    assert "row per token" in why_not_token_wise(nn.Flatten(), 8)
    assert "reads more than its token" in why_not_token_wise(nn.Bilinear(8, 8, 8), 8)
    assert "could not be tried" in why_not_token_wise(nn.Conv3d(8, 8, 1), 8)
    assert "meta" in why_not_token_wise(nn.Linear(8, 8, device="meta"), 8)


def test_trying_a_module_leaves_random_state_and_modes_alone():
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5).eval())
    state = torch.get_rng_state()
    why_not_token_wise(module, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in module.modules()] == [True, True, False]


def test_what_counts_as_attention():
    assert is_softmax_attention(Attention())
    assert not is_softmax_attention(nn.MultiheadAttention(8, 2))


def test_a_hybrid_of_state_space_attention_and_mlp_layers():
    """Its norm is handed the stream cast to `norm.weight`'s dtype; its mixer's first vector is not hidden-sized."""
    kinds = ["mamba", "attention", "mlp", "attention"]
    config = transformers.NemotronHConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=8,
        layers_block_type=kinds,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.NemotronHForCausalLM(config).train()
    expected = step(model, batch(2, 64))[0]
    site = Elimination(keep=0.5, eliminated="exact", score="random")
    lemo_fx.transform(model, LemoConfig(site, site, block_size=8, dense_layers=()))
    torch.testing.assert_close(step(model, batch(2, 64))[0], expected, **TOLERANCE["fp32"])
    kept = [(s.module, s.kept_share) for s in lemo_fx.report(model).sites if s.eliminated == "exact"]
    assert kept == [(f"model.layers.{index}", 0.5) for index in (1, 2, 3)]
