"""What a sparse layer computes, against an independent oracle written with loops over samples and explicit masks."""

import itertools
import math

import pytest
import torch
from tiny import TOLERANCE, Recorder, assert_same_step, batch, fix_choice, gradients, packed, selections, step, tiny
from torch.nn import functional
from transformers import masking_utils
from transformers.integrations import flex_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lemo_fx
from lemo_fx import Elimination, LemoConfig
from lemo_fx.predictors import Predictors

LAYERS = 2


def sparse(keep=0.5, treatment="skip", score="measured", **settings) -> LemoConfig:
    site = Elimination(keep=keep, eliminated=treatment, score=score)
    return LemoConfig(**({"attention": site, "mlp": site, "block_size": 8, "dense_layers": ()} | settings))


def test_attention_may_be_called_by_position():
    class Layer(GradientCheckpointingLayer):
        def __init__(self, layer):
            super().__init__()
            self.self_attn, self.norm = layer.self_attn, layer.input_layernorm

        def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
            normed = self.norm(hidden_states)
            return hidden_states + self.self_attn(normed, position_embeddings, attention_mask, **kwargs)[0]

    class ByName(Layer):
        def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
            given = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, **kwargs}
            return hidden_states + self.self_attn(hidden_states=self.norm(hidden_states), **given)[0]

    results = []
    for layer_class in (Layer, ByName):
        model = tiny("llama")
        model.model.layers = torch.nn.ModuleList([layer_class(layer) for layer in model.model.layers])
        results.append(step(lemo_fx.transform(model.train(), sparse()), batch(2, 48, "both")))
    assert_same_step(*results, "same")


class Oracle:
    """A Llama or Mistral whose layers work on given tokens; nothing of lemo_fx or of the model's forward is used."""

    def __init__(self, model, inputs, documents=None, treatment="skip", stand_ins=None):
        self.model, self.treatment, self.stand_ins = model, treatment, stand_ins
        self.ids, self.labels = inputs["input_ids"], inputs["labels"]
        rows, length = self.ids.shape
        self.real = inputs.get("attention_mask", torch.ones_like(self.ids)).bool()
        self.documents = torch.zeros_like(self.ids) if documents is None else documents
        self.positions = inputs.get("position_ids", torch.arange(length)[None]).expand(rows, length)
        self.window = getattr(model.config, "sliding_window", None) or length

    def scores(self, attention, x, b, tokens):
        """x [K, H] the normed rows at original positions `tokens` of sample b -> masked Q K^T [N, K, K] and V."""
        sizes = (len(tokens), -1, attention.head_dim)
        q, k, v = (f(x).view(sizes).transpose(0, 1) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
        frequency = 1.0 / 10000 ** (torch.arange(0, attention.head_dim, 2) / attention.head_dim)
        angle = self.positions[b, tokens, None] * torch.cat([frequency, frequency])

        def turn(t):
            half = t.shape[-1] // 2
            return t * angle.cos() + torch.cat([-t[..., half:], t[..., :half]], -1) * angle.sin()

        groups = q.shape[0] // k.shape[0]
        q, k, v = turn(q), turn(k).repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        i, j = tokens[:, None], tokens[None]
        allowed = (j <= i) & (i - j < self.window) & self.real[b, j]
        allowed = allowed & (self.documents[b, i] == self.documents[b, j])
        allowed = allowed | (i == j)  # padding looks at itself, so that its softmax is defined
        return (q @ k.transpose(1, 2) / math.sqrt(attention.head_dim)).masked_fill(~allowed, -torch.inf), v

    def attend(self, attention, x, b, tokens):
        scores, v = self.scores(attention, x, b, tokens)
        return attention.o_proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))

    def site(self, name, norm, branch, x, b, tokens, index):
        every = torch.arange(x.shape[0])
        dropped = every[~torch.isin(every, tokens)]
        rows = branch(norm(x[tokens]), b, tokens)
        if self.treatment == "exact":
            with torch.no_grad():
                full = branch(norm(x), b, every)
            return x + full + torch.zeros_like(x).index_copy(0, tokens, rows - rows.detach())
        out = x.index_copy(0, tokens, x[tokens] + rows)
        if self.treatment == "stand_in":
            p = f"layers.{index}.{name}.stand_in."
            with torch.no_grad():
                low = norm(x[dropped]) @ self.stand_ins[p + "down"] @ self.stand_ins[p + "up"]
                low = low + self.stand_ins[p + "bias"]
            out = out.index_copy(0, dropped, out[dropped] + low)
        return out

    def hidden(self, chosen):
        model, out = self.model.model, []
        for b in range(self.ids.shape[0]):
            x = model.embed_tokens(self.ids[b])
            for index, layer in enumerate(model.layers):
                pick = [chosen[f"model.layers.{index}.lemo_{kind}_select"][-1][b] for kind in ("attention", "mlp")]
                x = self.site(
                    "attention",
                    layer.input_layernorm,
                    lambda r, b, t, m=layer.self_attn: self.attend(m, r, b, t),
                    x,
                    b,
                    pick[0],
                    index,
                )
                x = self.site(
                    "mlp",
                    layer.post_attention_layernorm,
                    lambda r, b, t, m=layer.mlp: m.down_proj(functional.silu(m.gate_proj(r)) * m.up_proj(r)),
                    x,
                    b,
                    pick[1],
                    index,
                )
            out.append(model.norm(x))
        return torch.stack(out)

    def step(self, chosen):
        self.model.zero_grad(set_to_none=True)
        logits = self.model.lm_head(self.hidden(chosen))
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        return logits.detach(), loss.detach(), gradients(self.model)


def random_stand_ins(model):
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for index in range(LAYERS):
        for site in ("attention", "mlp"):
            for name, shape in (("down", (32, 4)), ("up", (4, 32)), ("bias", (32,))):
                tensors[f"layers.{index}.{site}.stand_in.{name}"] = torch.randn(shape, generator=generator) * 0.3
    from lemo_fx.predictors import fingerprint

    return Predictors(tensors, {"fingerprint": fingerprint(model.config)})


BATCHES = {
    "plain": lambda: (batch(2, 64), None),
    "ragged": lambda: (batch(3, 61), None),
    "right_padding": lambda: (batch(2, 64, padding="right"), None),
    "left_padding": lambda: (batch(2, 61, padding="left"), None),
    "both_paddings": lambda: (batch(2, 72, padding="both"), None),
    "packed": lambda: (packed([17, 30, 20]), torch.tensor([[0] * 17 + [1] * 30 + [2] * 20])),
}


@pytest.mark.parametrize("inputs", BATCHES)
@pytest.mark.parametrize("treatment", ["skip", "exact", "stand_in"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_against_the_oracle(architecture, attention, treatment, inputs):
    model = tiny(architecture, LAYERS, attention)
    inputs, documents = BATCHES[inputs]()
    stand_ins = random_stand_ins(model)
    predictors = stand_ins if treatment == "stand_in" else None
    lemo_fx.transform(model, sparse(treatment=treatment), predictors=predictors)
    with Recorder(model) as recorder:
        logits = model(**{**inputs, "labels": None}).logits.detach()
        loss, found = step(model, inputs)
    if inputs["input_ids"].shape[0] > 1:
        assert any(not torch.equal(t[-1][0], t[-1][1]) for t in recorder.tokens.values()), "samples choose alone"
    assert all(t[-1].shape[1] < inputs["input_ids"].shape[1] for t in recorder.tokens.values())
    oracle = Oracle(model, inputs, documents, treatment, stand_ins.tensors)
    expected_logits, expected_loss, expected = oracle.step(recorder.tokens)
    torch.testing.assert_close(logits[oracle.real], expected_logits[oracle.real], **TOLERANCE["fp32"])
    torch.testing.assert_close(loss, expected_loss, **TOLERANCE["fp32"])
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **TOLERANCE["fp32"], msg=lambda m, n=name: f"{n}: {m}")


def naive_attention_scores(oracle, layer, x, size):
    """Block informativeness of one layer from its own Q and K, with the whole S x S matrix, per sample."""
    length = x.shape[1]
    out = torch.zeros(x.shape[0], -(-length // size))
    for b in range(x.shape[0]):
        scores, _ = oracle.scores(layer.self_attn, layer.input_layernorm(x[b]), b, torch.arange(length))
        scores = scores.clamp_min(0).mean(0) * oracle.real[b][None, :] * oracle.real[b][:, None]
        scores = scores.nan_to_num(0)
        for n in range(out.shape[1]):
            for m in range(out.shape[1]):
                out[b, n] += scores[m * size : (m + 1) * size, n * size : (n + 1) * size].max()
    return out


@pytest.mark.parametrize("inputs", BATCHES)
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@torch.no_grad()
def test_measured_scores_are_the_papers(architecture, inputs):
    model = tiny(architecture, LAYERS)
    inputs, documents = BATCHES[inputs]()
    lemo_fx.transform(model, sparse())
    seen = []
    layer = model.model.layers[0]
    layer.lemo_attention_score.register_forward_hook(lambda _, __, out: seen.append(out))
    layer.lemo_mlp_score.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    model(**inputs)
    oracle = Oracle(model, inputs, documents)
    x = model.model.embed_tokens(inputs["input_ids"])
    expected = naive_attention_scores(oracle, layer, x, 8)
    torch.testing.assert_close(seen[0], expected, **TOLERANCE["fp32"])
    normed, scores = seen[1]
    mlp = layer.mlp
    activation = (functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)).abs().mean(-1)
    expected = torch.stack([activation[:, s : s + 8].amax(1) for s in range(0, x.shape[1], 8)], 1)
    torch.testing.assert_close(scores, expected, **TOLERANCE["fp32"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("treatment", ["skip", "exact"])
def test_exact_forward_is_dense_and_eliminated_rows_get_no_branch_gradient(attention, treatment):
    model = tiny("llama", 1, attention)
    inputs = batch(2, 64)
    dense = model(**{**inputs, "labels": None}).logits
    lemo_fx.transform(model, sparse(treatment=treatment))
    fix_choice(model, [0, 2, 5, 7])
    embedded = model.model.embed_tokens(inputs["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    if treatment == "exact":
        torch.testing.assert_close(logits, dense, **TOLERANCE["fp32"])
    else:
        assert not torch.allclose(logits, dense)
    # The last token's logits reach an eliminated token through attention alone.
    (gradient,) = torch.autograd.grad(logits[:, -1].sum(), embedded)
    eliminated = [t for b in (1, 3, 4, 6) for t in range(8 * b, 8 * b + 8)]
    assert (gradient[:, eliminated] == 0).all()
    assert (gradient[:, :8] != 0).any()


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "qwen3", "opt", "gpt2", "gpt_neox", "phi3"])
def test_no_token_attends_to_padding(architecture):
    model = tiny(architecture).eval()
    inputs = batch(2, 64, padding="both")
    config = sparse(active="always")
    lemo_fx.transform(model, config)
    fix_choice(model, [0, 1, 3, 4, 6, 7])
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        before = model(**inputs).logits
        ids = torch.where(real, inputs["input_ids"], 50)
        after = model(**{**inputs, "input_ids": ids}).logits
    torch.testing.assert_close(after[real], before[real], **TOLERANCE["same"])
    assert not torch.equal(after[~real], before[~real])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "qwen3", "phi3"])
@torch.no_grad()
def test_no_token_attends_across_documents_or_to_the_future(architecture, attention):
    model = tiny(architecture, attention=attention)
    inputs = packed([20, 23, 21])
    inputs.pop("labels")
    lemo_fx.transform(model, sparse())
    fix_choice(model, [0, 2, 3, 5, 7])
    before = model(**inputs).logits
    changed = dict(inputs, input_ids=inputs["input_ids"].clone())
    changed["input_ids"][0, 20:43] = (changed["input_ids"][0, 20:43] + 1) % 97
    after = model(**changed).logits
    torch.testing.assert_close(after[0, :20], before[0, :20], **TOLERANCE["same"])
    torch.testing.assert_close(after[0, 43:], before[0, 43:], **TOLERANCE["same"])
    assert not torch.equal(after[0, 20:43], before[0, 20:43])


def varlen(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention like flash attention's: documents from cu_seq_lens_q or restarting position_ids, never from a mask."""
    length = query.shape[2]
    documents = torch.zeros(query.shape[0], length, dtype=torch.int64)
    if kwargs.get("cu_seq_lens_q") is not None:
        ends = kwargs["cu_seq_lens_q"].tolist()
        assert ends[0] == 0
        assert ends[-1] == length
        for number, (start, stop) in enumerate(itertools.pairwise(ends)):
            documents[:, start:stop] = number
    elif kwargs.get("position_ids") is not None:
        documents = (kwargs["position_ids"] == 0).cumsum(1).expand(query.shape[0], -1)
        varlen.positions.append(kwargs["position_ids"])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & (documents[:, :, None] == documents[:, None])
    if attention_mask is not None:
        assert attention_mask.shape == (query.shape[0], length)
        allowed = allowed & attention_mask[:, None].bool() | torch.eye(length, dtype=torch.bool)
    out = functional.scaled_dot_product_attention(query, key, value, allowed[:, None], scale=scaling)
    return out.transpose(1, 2).contiguous(), None


varlen.positions = []


@pytest.fixture
def varlen_attention():
    ALL_ATTENTION_FUNCTIONS.register("varlen_test", varlen)
    ALL_MASK_ATTENTION_FUNCTIONS.register("varlen_test", flash_attention_mask)
    varlen.positions.clear()
    return "varlen_test"


@pytest.mark.parametrize("told_by", ["cu_seq_lens", "position_ids", "padding"])
@pytest.mark.parametrize("score", ["measured", "random"])
def test_attention_that_is_told_of_documents_without_a_mask(varlen_attention, told_by, score):
    if told_by == "padding":
        inputs, documents = batch(2, 64, padding="both"), None
    else:
        inputs, documents = BATCHES["packed"]()
    extra = {}
    if told_by == "cu_seq_lens":
        ends = torch.tensor([0, 17, 47, 67], dtype=torch.int32)
        extra = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 30, "max_length_k": 30}
    model = tiny("llama", LAYERS, "eager")
    model.config._attn_implementation = varlen_attention
    lemo_fx.transform(model, sparse(score=score))
    with Recorder(model) as recorder:
        loss, found = step(model, {**inputs, **extra})
    oracle = Oracle(model, inputs, documents)
    _, expected_loss, expected = oracle.step(recorder.tokens)
    torch.testing.assert_close(loss, expected_loss, **TOLERANCE["fp32"])
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **TOLERANCE["fp32"])
    if told_by == "position_ids":
        for positions in varlen.positions:
            assert ((positions.diff(dim=1) == 1) | (positions[:, 1:] == 0)).all(), "a gap would look like a document"


def test_a_document_without_any_kept_token(varlen_attention):
    model = tiny("llama", LAYERS, "eager")
    model.config._attn_implementation = varlen_attention
    ends = torch.tensor([0, 16, 24, 64], dtype=torch.int32)
    extra = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 40, "max_length_k": 40}
    inputs = packed([16, 8, 40])
    lemo_fx.transform(model, sparse())
    fix_choice(model, [0, 1, 4, 7])
    with Recorder(model) as recorder:
        loss, _ = step(model, {**inputs, **extra})
    recorder.tokens = {
        name: [torch.cat([torch.arange(8 * b, 8 * b + 8) for b in (0, 1, 4, 7)])[None]] for name in selections(model)
    }
    documents = torch.tensor([[0] * 16 + [1] * 8 + [2] * 40])
    _, expected, _ = Oracle(model, inputs, documents).step(recorder.tokens)
    torch.testing.assert_close(loss, expected, **TOLERANCE["fp32"])


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("rows", [1, 2])
def test_four_dimensional_masks(rows, kind, per_head):
    """A custom mask with two documents equals packing the same two documents."""
    inputs = batch(2, 64)
    documents = torch.tensor([[0] * 25 + [1] * 39]).expand(2, -1)
    allowed = torch.ones(64, 64, dtype=torch.bool).tril() & (documents[:, :, None] == documents[:, None])
    mask = allowed[:rows, None]
    if per_head:
        mask = mask.expand(-1, 4, -1, -1)
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    model = tiny("llama", LAYERS)
    lemo_fx.transform(model, sparse())
    with Recorder(model) as recorder:
        loss, found = step(model, {**inputs, "attention_mask": mask})
    _, expected_loss, expected = Oracle(model, inputs, documents).step(recorder.tokens)
    torch.testing.assert_close(loss, expected_loss, **TOLERANCE["fp32"])
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **TOLERANCE["fp32"])


@pytest.mark.parametrize(("architecture", "packing"), [("llama", False), ("mistral", True)])
@torch.no_grad()
def test_block_masks(architecture, packing, monkeypatch):
    # Not compiled, as transformers would: torch's kernel for CPUs without AVX512 is wrong at some lengths (104, say).
    monkeypatch.setattr(flex_attention, "WrappedFlexAttention", lambda training: lambda: flex_attention.flex_attention)
    # Nor the mask, which takes inductor ten seconds and gives the same.
    make = masking_utils.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda *a, _compile=None, **k: make(*a, **k))
    inputs = packed([50, 60, 90]) if packing else batch(2, 200, padding="both")
    documents = torch.tensor([[0] * 50 + [1] * 60 + [2] * 90]) if packing else None
    model = tiny(architecture, LAYERS, "flex_attention").eval()
    lemo_fx.transform(model, sparse(active="always", keep=0.5))
    with Recorder(model) as recorder:
        logits = model(**{**inputs, "labels": None}).logits
    oracle = Oracle(model, inputs, documents)
    expected = model.lm_head(oracle.hidden(recorder.tokens))
    torch.testing.assert_close(logits[oracle.real], expected[oracle.real], **TOLERANCE["fp32"])


@pytest.mark.parametrize("architecture", ["opt", "opt_post_norm", "gpt_neox", "gpt_neox_sequential", "phi", "gpt2"])
def test_gradients_are_those_of_the_sparse_forward(architecture):
    """Finite differences in float64 with a fixed choice (RMS norms compute in float32: see the oracle for those)."""
    model = tiny(architecture, 1).double()
    inputs = batch(1, 32)["input_ids"]
    lemo_fx.transform(model, sparse(score="random"))
    fix_choice(model, [0, 2])
    weights = torch.randn(32, 97, dtype=torch.float64)
    (model(inputs, use_cache=False).logits[0] * weights).sum().backward()
    for name, parameter in model.named_parameters():
        if ".0." not in name:
            continue
        direction = torch.randn_like(parameter)
        values = []
        with torch.no_grad():
            for amount in (1e-5, -2e-5, 1e-5):
                parameter.add_(direction, alpha=amount)
                values.append((model(inputs, use_cache=False).logits[0] * weights).sum())
        slope = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((parameter.grad * direction).sum(), slope, **TOLERANCE["compiled"])


def test_labels_few_in_number_are_kept():
    model = tiny("llama")
    inputs = batch(2, 128)
    inputs["labels"][:] = -100
    inputs["labels"][0, 41] = 5
    inputs["labels"][1, 90] = 5
    lemo_fx.transform(model, sparse(keep=0.3))
    with Recorder(model) as recorder:
        model(**inputs)
    assert recorder.tokens
    for (tokens,) in recorder.tokens.values():
        assert {40, 41} <= set(tokens[0].tolist())
        assert {89, 90} <= set(tokens[1].tolist())


@pytest.mark.parametrize("length", [64, 61])
def test_the_only_labelled_block_keeps_its_gradient_under_the_smallest_budget(length):
    model = lemo_fx.transform(tiny("llama"), LemoConfig(Elimination(keep=0.01), Elimination(keep=0.01), 8, ()))
    inputs = batch(1, length)
    inputs["labels"] = torch.where(torch.arange(length) == 30, inputs["input_ids"], -100)
    _, found = step(model, inputs)
    assert all(gradient.any() for name, gradient in found.items() if "layers" in name)


def test_sequences_shorter_than_a_block_run_dense():
    model = tiny("llama")
    inputs = batch(2, 7)
    expected = step(model, inputs)
    lemo_fx.transform(model, sparse(keep=0.1))
    with Recorder(model) as recorder:
        found = step(model, inputs)
    assert not recorder.tokens
    torch.testing.assert_close(found[0], expected[0], **TOLERANCE["fp32"])


@pytest.mark.parametrize("shape", [(1, 1, 32, 40), (1, 1, 40, 40), (1, 32, 32)])
@pytest.mark.parametrize("score", ["measured", "random"])
def test_a_mask_of_unknown_shape_is_an_error(score, shape):
    model = tiny("llama", 1)
    lemo_fx.transform(model, sparse(score=score))
    layer = model.model.layers[0]
    x = torch.randn(1, 32, 32)
    rope = model.model.rotary_emb(x, torch.arange(32)[None])
    with pytest.raises(lemo_fx.InputError, match="attention_mask of shape"):
        layer(x, attention_mask=torch.zeros(shape), position_embeddings=rope)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "opt"])
def test_one_choice_for_the_whole_step(architecture):
    model = tiny(architecture, 4)
    keep = [1.0, 0.5, 0.25, 0.5]
    site = lemo_fx.Elimination(keep=keep, eliminated="exact", score="step")
    lemo_fx.transform(model, lemo_fx.LemoConfig(site, site, block_size=4, dense_layers=(0,)))
    steps = []
    for inputs in (batch(2, 64), batch(2, 64, seed=1)):
        with Recorder(model) as recorder:
            step(model, inputs)
        layers = [[t for (t,) in (recorder.tokens[n] for n in recorder.tokens if f".{i}." in n)] for i in (1, 2, 3)]
        assert [len(tokens) for tokens in layers] == [2, 2, 2]
        for attention, mlp in layers:
            assert torch.equal(attention, mlp)
        assert torch.equal(layers[0][0], layers[2][0])
        for sample in range(2):
            assert set(layers[1][0][sample].tolist()) < set(layers[0][0][sample].tolist())
        steps.append(layers[0][0])
    assert not torch.equal(*steps)


def test_a_slope_keeps_more_in_every_higher_layer():
    model = tiny("llama", 5)
    site = lemo_fx.Elimination(keep=0.5, slope=0.5, eliminated="exact", score="step")
    lemo_fx.transform(model, lemo_fx.LemoConfig(site, site, block_size=4, dense_layers=()))
    step(model, batch(2, 64))
    sites = lemo_fx.report(model).sites
    assert [site.kept_tokens for site in sites[::2]] == [16, 24, 32, 40, 48]
    assert [site.budget for site in sites[1::2]] == [f"keep {keep}" for keep in (0.25, 0.375, 0.5, 0.625, 0.75)]


def test_layers_that_are_called_by_themselves_draw_their_own_choice():
    model = tiny("llama", 3)
    site = lemo_fx.Elimination(keep=0.5, eliminated="exact", score="step")
    lemo_fx.transform(model, lemo_fx.LemoConfig(site, site, block_size=4, dense_layers=()))
    for length in (64, 32):
        x = torch.randn(1, length, 32, requires_grad=True)
        rope = model.model.rotary_emb(x, torch.arange(length)[None])
        with Recorder(model) as recorder:
            model.model.layers[2](x, position_embeddings=rope).sum().backward()
        assert {tokens.shape for (tokens,) in recorder.tokens.values()} == {(1, length // 2)}


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "phi"])
def test_a_shared_choice_is_that_of_the_attention(architecture):
    model, inputs, found = tiny(architecture), batch(2, 64, padding="both"), []
    for score in ("random", "shared"):
        config = sparse(mlp=lemo_fx.Elimination(keep=0.5, score=score))
        lemo_fx.transform(model, config)
        fix_choice(model, [0, 2, 5, 7])
        found.append(step(model, inputs))
    assert len(selections(model)) == 2
    assert_same_step(found[1], found[0], "fp32")
