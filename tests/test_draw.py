import itertools

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import lemo_fx
from lemo_fx import draw

SIZE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip


def pictures(model, layer, **site):
    before = draw.captured(model.get_submodule(layer))
    lemo_fx.transform(model, lemo_fx.LemoConfig(lemo_fx.Elimination(**site), lemo_fx.Elimination(**site)))
    return before, lemo_fx.graphs(model)[layer]


def roles(picture):
    return [call.role for _, call in picture.nodes(data="call")]


def test_a_layer_before_and_after():
    torch.manual_seed(0)
    before, after = pictures(LlamaForCausalLM(LlamaConfig(**SIZE)), "model.layers.0")
    dense = draw.calls(before)
    assert roles(dense) == ["stream", "dense", "dense", "restore", "dense", "dense", "restore"]
    sparse = draw.calls(after)
    assert roles(sparse) == ["stream"] + ["score", "select", "eliminate", "branch", "restore"] * 2
    labels = [call.label for _, call in sparse.nodes(data="call")]
    assert labels[:6] == [
        "hidden_states", "attention_scores", "attention_tokens", "attention_rows", "attention_branch",
        "attention_restored",
    ]  # fmt: skip
    assert sparse.nodes["attention_branch"]["call"].lines == ("· input_layernorm", "· self_attn")
    assert ("attention_tokens", "attention_restored") in sparse.edges


def test_a_score_that_is_one_module_is_drawn_as_a_score():
    """Random and predicted scores: no outlined function."""
    _, after = pictures(LlamaForCausalLM(LlamaConfig(**SIZE)), "model.layers.0", score="random")
    drawn = draw.calls(after)
    assert roles(drawn) == ["stream"] + ["score", "select", "eliminate", "branch", "restore"] * 2
    assert "attention_score" in [call.label for _, call in drawn.nodes(data="call")]


def test_every_box_but_the_stream_reads_another():
    _, after = pictures(LlamaForCausalLM(LlamaConfig(**SIZE)), "model.layers.0", eliminated="exact")
    drawn = draw.calls(after)
    assert [label for label, count in drawn.in_degree if not count] == ["hidden_states"]
    assert ("mlp_other_rows", "mlp_forward") in [
        tuple(drawn.nodes[end]["call"].label for end in edge) for edge in drawn.edges
    ]


def test_boxes_do_not_overlap_and_lie_below_what_they_read():
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE))
    for graph in pictures(model, "gpt_neox.layers.0", eliminated="exact"):
        picture = draw.calls(graph)
        places = draw._places(picture)
        spans = sorted((y - picture.nodes[n]["call"].height / 2, y + picture.nodes[n]["call"].height / 2)
                       for n, y in places.items())  # fmt: skip
        assert all(top <= bottom for (_, top), (bottom, _) in itertools.pairwise(spans))
        assert all(places[source] > places[target] for source, target in picture.edges)


def test_the_same_graph_gives_the_same_file(tmp_path):
    before, after = pictures(LlamaForCausalLM(LlamaConfig(**SIZE)), "model.layers.0")
    graphs = {"before": before, "after": after}
    for suffix in ("svg", "png"):
        one = draw.save(draw.draw(graphs, "layer"), tmp_path / f"one.{suffix}").read_bytes()
        assert one == draw.save(draw.draw(graphs, "layer"), tmp_path / "sub" / f"two.{suffix}").read_bytes()


def test_code_shows_the_functions():
    _, after = pictures(LlamaForCausalLM(LlamaConfig(**SIZE)), "model.layers.0")
    assert "class lemo_attention_branch" in draw.code(after, "LlamaDecoderLayer")
