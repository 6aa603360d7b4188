"""Pattern predictors: arithmetic, the part a layer carries, its place in the graph, and the file format."""

import json
import math
import shutil

import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask

import lemo_fx
from lemo_fx import Elimination, LemoConfig, PredictorError, Predictors
from lemo_fx.fitting.training import Blocks, Recipe, predict, recall, train
from lemo_fx.kernels.select_blocks.reference import WINDOWS, balanced
from lemo_fx.predictors import RECORD, TENSORS
from lemo_fx.runtime import network
from lemo_fx.runtime.network import compressed, random_weights
from lemo_fx.runtime.scores import Candidates, PredictedScore, Predictor
from tests.helpers.tiny import TOLERANCE, assert_same_step, batch, packed, step, tiny, with_lora

BLOCK = 8
CONFIG = LemoConfig(
    attention=Elimination(keep=0.5), mlp=Elimination(keep=0.5), block_size=BLOCK, dense_layers=(), active="always"
)


def random_part(kind, hidden=32, width=4, block_size=BLOCK, seed=0):
    weights = random_weights(kind, hidden, width, torch.Generator().manual_seed(seed))
    extra = "distance" if kind == "attention" else "offset"
    weights[extra] = torch.linspace(-0.2, 0.5, weights[extra].numel()).bfloat16()
    weights["third"] = weights["third"] * 5
    return (PredictedScore if kind == "attention" else Candidates)(weights, block_size)


def naive_network(w, t, x):
    x = x.double() / math.sqrt(float((x.double() ** 2).mean()) + 1e-6)
    hidden = (x @ w["first"][t] * network.QUANTUM + w["first_bias"][t]).clamp_min(0)
    return (hidden @ w["second"][t] + w["second_bias"][t]).clamp_min(0) @ w["third"][t]


def naive_scores(weights, stream, block_size, documents=None):
    """One token, one block, one pair, one term at a time, for a single sample [S, H]."""
    w = {name: value.double() for name, value in weights.items()}
    documents = [0] * len(stream) if documents is None else documents
    blocks = [range(i, min(i + block_size, len(stream))) for i in range(0, len(stream), block_size)]
    query, key = ([torch.stack([naive_network(w, t, stream[i]) for i in b]).mean(0) for b in blocks] for t in (0, 1))
    out = torch.zeros(len(blocks), dtype=torch.float64)
    for m in range(len(blocks)):
        for n in range(m + 1):
            if not any(documents[i] == documents[j] for i in blocks[m] for j in blocks[n]):
                continue
            bias = sum(
                float(a) * math.exp(-rate * (m - n)) for a, rate in zip(w["distance"], network.DECAYS, strict=True)
            )
            out[n] += max(0.0, float(query[m] @ key[n]) + bias)
    return out


@pytest.mark.parametrize("length", [48, 45, 8])
def test_score_equals_a_naive_reimplementation(length):
    part = random_part("attention")
    stream = torch.randn(2, length, 32)
    expected = torch.stack([naive_scores(part.weights, row, BLOCK) for row in stream]).float()
    torch.testing.assert_close(part(stream), expected, **TOLERANCE["compiled"])


@pytest.mark.parametrize(("length", "block_size", "count"), [(48, 8, 2), (45, 8, 2), (130, 64, 4), (129, 64, 4)])
def test_candidates_are_the_tokens_that_the_network_ranks_first(length, block_size, count):
    part = random_part("mlp", block_size=block_size)
    stream = torch.randn(2, length, 32)
    w = {name: value.double() for name, value in part.weights.items()}
    expected = []
    for row in stream:
        tokens = []
        for first in range(0, length, block_size):
            block = range(first, min(first + block_size, length))
            ranked = sorted(block, key=lambda i, row=row: -float(naive_network(w, 0, row[i])))[:count]
            tokens += sorted(ranked + ranked[:1] * (count - len(ranked)))
        expected.append(tokens)
    assert part(stream).tolist() == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_candidate(side):
    part, stream = random_part("mlp"), torch.randn(1, 45, 32)
    padded, mask = torch.randn(1, 69, 32) * 9, torch.zeros(1, 69, dtype=torch.int64)
    where = slice(24, 69) if side == "left" else slice(0, 45)
    padded[:, where], mask[:, where] = stream, 1
    found = part(padded, mask)[0]
    assert found[mask[0, found].bool()].sub(where.start).tolist() == part(stream)[0].tolist()
    assert part(padded, mask).shape == (1, 2 * 9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_neither_scores_nor_counts(side):
    part = random_part("attention")
    stream = torch.randn(1, 48, 32)
    padded = torch.zeros(1, 64, 32).normal_()
    mask = torch.zeros(1, 64, dtype=torch.int64)
    where = slice(16, 64) if side == "left" else slice(0, 48)
    padded[:, where], mask[:, where] = stream, 1
    blocks = slice(2, 8) if side == "left" else slice(0, 6)
    torch.testing.assert_close(part(padded, mask)[:, blocks], part(stream), **TOLERANCE["compiled"])


def naive_documents(lengths):
    return [number for number, length in enumerate(lengths) for _ in range(length)]


@pytest.mark.parametrize("told_by", ["square mask", "additive mask", "BlockMask", "position_ids", "cu_seq_lens"])
def test_pairs_across_documents_score_nothing(told_by):
    """A packed row, with documents that end within blocks, one that fills none, and a ragged tail."""
    lengths = [13, 3, 24, 21]
    part, stream = random_part("attention"), torch.randn(1, sum(lengths), 32)
    number = torch.tensor(naive_documents(lengths))
    allowed = (number[:, None] == number).tril()[None, None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    arguments = {
        "square mask": lambda: (allowed,),
        "additive mask": lambda: (torch.where(allowed, 0.0, torch.finfo(torch.float32).min),),
        "BlockMask": lambda: (
            create_block_mask(lambda b, h, q, k: (q >= k) & (number[q] == number[k]), 1, None, 61, 61, device="cpu"),
        ),
        "position_ids": lambda: (None, positions),
        "cu_seq_lens": lambda: (None, None, {"cu_seq_lens_q": torch.tensor([0, 13, 16, 40, 61])}),
    }[told_by]()
    expected = naive_scores(part.weights, stream[0], BLOCK, number.tolist()).float()[None]
    torch.testing.assert_close(part(stream, *arguments), expected, **TOLERANCE["compiled"])
    assert not torch.allclose(part(stream), expected, rtol=0.01)


def test_a_packed_batch_is_predicted_by_document():
    """What reaches the predictor in a model: the first document's choice does not depend on the second's text."""
    scores = []
    for seed in (0, 1):
        model, _ = transformed()
        part = next(m for n, m in model.named_modules() if n.endswith("layers.0.lemo_attention_predictor"))
        part.distance.fill_(1)
        part.third.mul_(50)
        part.register_forward_hook(lambda _, __, out: scores.append(out))
        inputs = packed([32, 32])
        inputs["input_ids"][:, 32:] = batch(1, 32, seed=seed + 5)["input_ids"]
        model(**inputs)
    assert torch.equal(scores[0][:, :4], scores[1][:, :4])
    assert not torch.equal(scores[0][:, 4:], scores[1][:, 4:])


def test_the_part_has_buffers_only_and_follows_a_cast():
    part = random_part("attention")
    assert not list(part.parameters())
    assert not part.state_dict()
    assert not any(isinstance(m, nn.Linear) for m in part.modules())
    stream = torch.randn(1, 64, 32)
    full = part(stream)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        scores = random_part("attention").to(dtype)(stream.to(dtype))
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, full, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(part(stream), full)


def test_layers_share_one_compilation():
    parts = [random_part("attention", seed=seed) for seed in range(4)]
    stream = torch.randn(1, 64, 32)
    expected = [part(stream) for part in parts]
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for part, scores in zip(parts, expected, strict=True):
            part.compile(fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(part(stream), scores, **TOLERANCE["compiled"])
    torch.compiler.reset()


def transformed(config=CONFIG, targets="all-linear", **settings):
    model = with_lora(tiny("llama", **settings), targets=targets)
    predictors = Predictors.random(model, config, seed=1)
    return lemo_fx.transform(model, config, predictors=predictors), predictors


def test_the_graph_shows_the_predictor_and_the_state_dict_does_not():
    before = list(with_lora(tiny("llama")).state_dict())
    model, _ = transformed()
    graph = next(g for name, g in lemo_fx.graphs(model).items() if name.endswith("layers.0")).graph
    nodes = [n for n in graph.nodes if str(n.target).endswith("_predictor")]
    assert [str(n.target) for n in nodes] == ["lemo_attention_predictor", "lemo_mlp_predictor"]
    # The predictors read the stream itself: no norm is computed of every token for the sake of a score.
    assert nodes[0].args[0].op == "placeholder"
    assert nodes[1].args[0].name == "attention_restored"
    assert list(model.state_dict()) == before
    rows = [s for s in lemo_fx.report(model).sites if s.site in ("attention", "mlp")]
    assert all(s.score == "predicted" and "KiB" in s.note for s in rows)
    lemo_fx.revert(model)
    assert not any(isinstance(m, Predictor) for m in model.modules())


def test_an_mlp_block_scores_the_measured_maximum_of_its_candidates():
    model, _ = transformed()
    layer, seen = model.get_base_model().model.layers[0], {}
    layer.lemo_mlp_predictor.register_forward_hook(lambda _, args, out: seen.update(stream=args[0], tokens=out))
    layer.lemo_mlp_score.register_forward_hook(lambda _, __, out: seen.update(scores=out))
    model(**batch(2, 64))
    normed = layer.post_attention_layernorm(seen["stream"])
    activation = functional.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
    candidates = activation.abs().mean(-1).gather(1, seen["tokens"])
    torch.testing.assert_close(seen["scores"], candidates.unflatten(1, (8, 2)).amax(2), **TOLERANCE["fp32"])
    assert not seen["scores"].requires_grad


def test_a_predictor_of_another_kind_of_site_is_refused():
    model = with_lora(tiny("llama"))
    predictors = Predictors.random(model, CONFIG)
    swapped = {"attention": "mlp", "mlp": "attention"}
    tensors = {
        ".".join([*name.split(".")[:2], swapped[name.split(".")[2]], *name.split(".")[3:]]): value
        for name, value in predictors.tensors.items()
    }
    with pytest.raises(PredictorError, match="another kind of site"):
        lemo_fx.transform(model, CONFIG, predictors=Predictors(tensors, predictors.record))


def test_auto_measures_where_nothing_was_trained():
    model = with_lora(tiny("llama"))
    predictors = Predictors.random(model, LemoConfig(attention=CONFIG.attention, mlp=None, dense_layers=()))
    config = LemoConfig(attention=Elimination(), mlp=Elimination(), dense_layers=(), block_size=64)
    lemo_fx.transform(model, config, predictors=predictors)
    assert {(s.site, s.score) for s in lemo_fx.report(model).sites} >= {("attention", "predicted"), ("mlp", "measured")}


@pytest.mark.parametrize("padding", [None, "both"])
def test_checkpointed_gradients_are_bit_equal(padding):
    config = LemoConfig(attention=CONFIG.attention, mlp=CONFIG.mlp, block_size=BLOCK, dense_layers=())
    inputs = batch(2, 64, padding)
    results = []
    for checkpointing in (False, True):
        model = with_lora(tiny("llama"))
        trained = Predictors.random(model, LemoConfig(dense_layers=(), block_size=BLOCK), seed=1)
        lemo_fx.transform(model, config, predictors=trained)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        results.append(step(model, inputs))
    assert_same_step(*results, "same")


def test_bfloat16_step():
    model = with_lora(tiny("llama")).to(torch.bfloat16)
    predictors = Predictors.random(model, CONFIG)
    lemo_fx.transform(model, CONFIG, predictors=predictors)
    loss, gradients = step(model, batch(2, 64))
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients.values())


def test_embeddings_narrower_than_the_stream():
    """OPT-350M projects its embeddings up: predictors read the stream, not them."""
    model = tiny("opt_post_norm", word_embed_proj_dim=16)
    inputs = batch(1, 64)
    predictors = lemo_fx.fit(model, [inputs["input_ids"][0]] * 2, CONFIG, recipe=Recipe(most_steps=8), progress=False)
    assert predictors.record["hidden_size"] == 32
    lemo_fx.transform(model, CONFIG, predictors=predictors)
    assert torch.isfinite(step(model, inputs)[0])


def test_a_layer_compiles_once_for_all_layers():
    # A compiler reads PEFT's code anew for each adapter: one in either branch.
    model, _ = transformed(targets=("q_proj", "down_proj"), layers=3)
    inputs = batch(1, 64)
    expected = step(model, inputs)
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        # The first layer differs for another reason: its input carries no gradient.
        for layer in model.get_base_model().model.layers[1:]:
            layer.compile(fullgraph=True, backend="aot_eager")
        assert_same_step(step(model, inputs), expected, "compiled")
    torch.compiler.reset()


def planted(kind, count=24, blocks=24, hidden=32, seed=0):
    """Streams whose scores follow from a low-rank product of each token, as a real predictor would produce them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, blocks * BLOCK, hidden, generator=generator)
    # Blocks differ, and so do their means.
    x += 2 * torch.randn(count, blocks, 1, hidden, generator=generator).expand(-1, -1, BLOCK, -1).flatten(1, 2)
    x *= torch.rsqrt(x.square().mean(-1, keepdim=True))
    q, k = (torch.randn(hidden, 2, generator=torch.Generator().manual_seed(s)) / 2 for s in (7, 8))
    valid = torch.ones(count, blocks * BLOCK, dtype=torch.bool)
    valid[::3, -4 * BLOCK - 3 :] = False
    if kind == "mlp":
        return Blocks(x.half(), (x @ q)[..., 0].abs() + 0.05, valid, BLOCK)
    queries, keys = (network.pool(x @ m, valid, BLOCK, "mean") for m in (q, k))
    pairs = (queries @ keys.transpose(1, 2) + 0.5).relu().tril()
    found = Blocks(x.half(), torch.zeros(count, blocks), valid, BLOCK)
    found.scores = torch.where(found.real[:, :, None], pairs, 0.0).sum(1) + 0.05
    return found


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_training_learns_planted_structure(kind):
    blocks, heldout = planted(kind, 96), planted(kind, 16, seed=1)
    done = train(kind, blocks, Recipe(width=8, mlp_width=8, rate=2e-2, epochs=15), heldout)
    predicted, true, real = predict(done.weights, heldout), heldout.block_scores, heldout.real
    position = torch.arange(24.0).expand(16, -1)
    rules = {"random": torch.rand(16, 24), "recent": position, "early": -position}
    got = recall(predicted, true, real, 0.4)
    assert got > max(recall(rule, true, real, 0.4) for rule in rules.values()) + 0.03
    # In the units of the true scores.
    assert 0.6 < float(predicted[real].sum() / true[real].sum()) < 1.6


@pytest.mark.parametrize("loss", ["kl", "log", "regression"])
def test_every_loss_falls(loss):
    losses = train("mlp", planted("mlp", 96), Recipe(mlp_width=8, loss=loss, epochs=15)).record["losses"]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


def test_elastic_sizing_ends_at_the_asked_width():
    done = train("attention", planted("attention"), Recipe(width=6, epochs=5))
    shapes = {name: tuple(w.shape) for name, w in done.weights.items()}
    assert shapes["first"] == (2, 32, 6)
    assert shapes["second"] == (2, 6, 6)
    assert shapes["third"] == (2, 6, 6)
    before, after = done.record["parameters"]
    assert after < 0.75 * before
    assert after == sum(w.numel() for w in done.weights.values())
    assert done.weights.pop("first").dtype == torch.int8
    assert {w.dtype for w in done.weights.values()} == {torch.bfloat16}


def test_compressing_moves_a_weight_by_half_a_step():
    weights = random_weights("attention", 64, 8, torch.Generator().manual_seed(0), compress=False)
    small = compressed(weights)
    assert small["first"].abs().amax(1).eq(127).all()
    step = weights["first"].abs().amax(1, keepdim=True) / 127
    assert ((small["first"] * step - weights["first"]).abs() <= 0.501 * step).all()
    # The rows of the second matrix make up for the scales: the networks differ by rounding alone.
    rounded = {name: w.bfloat16() for name, w in weights.items()} | {"first": small["first"] * step}
    stream = torch.randn(2, 64, 64)
    full, found = (network.network(w, stream)[1] for w in (rounded, small))
    torch.testing.assert_close(found, full, **TOLERANCE["bf16"])


def test_balanced_ranks_keep_the_same_share_everywhere():
    scores = torch.arange(64.0, 0, -1)[None] + torch.rand(1, 64) * 5
    kept = torch.zeros(64, dtype=torch.bool)
    kept[balanced(scores)[0].topk(32).indices] = True
    assert kept.view(WINDOWS, -1).sum(1).tolist() == [4] * WINDOWS
    for window in range(WINDOWS):
        part = slice(8 * window, 8 * window + 8)
        assert scores[0, part][kept[part]].min() > scores[0, part][~kept[part]].max()


@pytest.mark.parametrize("blocks", [1, 3, 8, 13, 67])
def test_balanced_is_a_rank_within_each_window(blocks):
    scores = torch.randn(2, blocks)
    scores[0, 0] = torch.nan
    ranks = balanced(scores)
    assert ranks[0, 0].isnan()
    for row in range(1, 2):
        for window in range(WINDOWS):
            inside = [i for i in range(blocks) if i * WINDOWS // blocks == window]
            for i in inside:
                better = sum(bool(scores[row, j] > scores[row, i]) for j in inside)
                assert float(ranks[row, i]) == pytest.approx(-(better + 0.5) / len(inside))


def test_balance_spreads_the_kept_tokens():
    model = with_lora(tiny("llama"))
    config = LemoConfig(
        attention=Elimination(keep=0.5, balance=True), mlp=None, block_size=4, dense_layers=(), active="always"
    )
    lemo_fx.transform(model, config)
    tokens = []
    select = next(m for n, m in model.named_modules() if n.endswith("lemo_attention_select"))
    select.register_forward_hook(lambda _, __, out: tokens.append(out))
    model(**batch(1, 256))
    quarters = torch.bincount(tokens[0][0] // 64, minlength=4)
    assert quarters.max() - quarters.min() <= 16


def test_balance_needs_a_budget():
    with pytest.raises(lemo_fx.ConfigError, match="balance"):
        Elimination(threshold=1.0, balance=True)


def test_save_and_load(tmp_path):
    model = tiny("llama")
    predictors = Predictors.random(model, CONFIG)
    predictors.save(tmp_path)
    loaded = Predictors.load(tmp_path)
    assert loaded.tensors.keys() == predictors.tensors.keys()
    assert all(torch.equal(loaded.tensors[n], t) for n, t in predictors.tensors.items())
    assert loaded.record == predictors.record
    assert sum(loaded.predictor_bytes.values()) == sum(t.nbytes for t in predictors.tensors.values())


def test_hub_push_and_load(tmp_path, monkeypatch):
    """Against a local folder in the hub's place; no network."""
    predictors = Predictors.random(tiny("llama"), CONFIG)
    commit = "0" * 40
    hub = tmp_path / "models--someone--predictors"

    def upload(self, repo_id, folder_path, commit_message):
        assert repo_id == "someone/predictors"
        (hub / "refs").mkdir(parents=True)
        (hub / "refs/main").write_text(commit)
        shutil.copytree(folder_path, hub / "snapshots" / commit)
        return f"https://huggingface.co/{repo_id}/commit/{commit}"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, private, exist_ok: RepoUrl(f"models/{repo_id}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert commit in predictors.push_to_hub("someone/predictors")
    loaded = Predictors.load("someone/predictors", cache_dir=tmp_path, local_files_only=True)
    assert all(torch.equal(loaded.tensors[n], t) for n, t in predictors.tensors.items())
    assert loaded.record == predictors.record


def test_hub_errors_are_typed(tmp_path, monkeypatch):
    with pytest.raises(PredictorError, match="neither a folder nor found"):
        Predictors.load("someone/nothing", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(PredictorError, match="there is no folder"):
        Predictors.load(tmp_path / "nowhere")

    def unreachable(*args, **kwargs):
        raise HfHubHTTPError.__bases__[0]("no route")

    monkeypatch.setattr(HfApi, "create_repo", unreachable)
    with pytest.raises(PredictorError, match="no route"):
        Predictors.random(tiny("llama"), CONFIG).push_to_hub("someone/predictors")


def edit_record(folder, **changes):
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(record | changes))


def truncate(folder):
    file = folder / TENSORS
    file.write_bytes(file.read_bytes()[:-10])


def absurd_header(folder):
    """A header that claims a tensor of a petabyte."""
    listed = json.loads((folder / RECORD).read_text())["tensors"]
    name = next(iter(listed))
    header = {name: {"dtype": "F32", "shape": [1 << 25, 1 << 23], "data_offsets": [0, 1 << 50]}}
    text = json.dumps(header).encode()
    (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text)
    edit_record(folder, tensors={name: ["float32", 1 << 25, 1 << 23]})


def strange_name(folder):
    from safetensors.torch import save_file

    save_file({"layers.0.attention.code": torch.zeros(2)}, folder / TENSORS)
    edit_record(folder, tensors={"layers.0.attention.code": ["float32", 2]})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit_record(f, format_version=99), "version 99"),
        (lambda f: (f / RECORD).write_text("{"), "damaged"),
        (lambda f: (f / RECORD).unlink(), "missing"),
        (lambda f: (f / TENSORS).unlink(), "missing"),
        (lambda f: edit_record(f, tensors={}), "does not hold"),
        (truncate, "damaged"),
        (absurd_header, "damaged|shape"),
        (strange_name, "no use"),
    ],
)
def test_load_refuses(tmp_path, damage, message):
    Predictors.random(tiny("llama"), CONFIG).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(PredictorError, match=message):
        Predictors.load(tmp_path)


def test_transform_refuses_what_does_not_fit():
    model = with_lora(tiny("llama"))
    with pytest.raises(PredictorError, match="needs trained predictors"):
        lemo_fx.transform(model, LemoConfig(attention=Elimination(score="predicted"), dense_layers=()))
    other = Predictors.random(tiny("llama", intermediate_size=48), CONFIG)
    with pytest.raises(PredictorError, match="other kind or size"):
        lemo_fx.transform(model, CONFIG, predictors=other)
    with pytest.raises(PredictorError, match="block_size"):
        lemo_fx.transform(
            model, LemoConfig(block_size=16, dense_layers=()), predictors=Predictors.random(model, CONFIG)
        )
    some = Predictors.random(model, LemoConfig(attention=CONFIG.attention, mlp=None, block_size=BLOCK, dense_layers=()))
    with pytest.raises(PredictorError, match="no predictor was trained"):
        lemo_fx.transform(
            model, LemoConfig(mlp=Elimination(score="predicted"), block_size=BLOCK, dense_layers=()), predictors=some
        )
