"""torch.compile: no graph break, and a number of compilations that no budget, length or step makes grow."""

import itertools

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from tiny import ARCHITECTURES, assert_same_step, batch, selections, step, tiny, with_lora
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.utils import fresh_cache
from torch.utils._python_dispatch import TorchDispatchMode

import lemo_fx
from lemo_fx import Elimination, LemoConfig
from lemo_fx.graph.anatomy import decoder_layers
from lemo_fx.kernels.float8_linear import op as products
from lemo_fx.kernels.float8_linear import reference
from lemo_fx.kernels.select_blocks import op
from lemo_fx.runtime import branch

aten = torch.ops.aten


ADAPTED = ("q_proj", "down_proj")
"""In both branches some; a compiler reads PEFT's code anew for each, a fifth of its time if all were."""
ADAPTED_ANYWHERE = r".*\.(q_proj|qkv_proj|query_key_value|c_attn|down_proj|fc2|dense_4h_to_h|mlp\.c_proj)"
"""The same of every architecture."""


def transformed(site, layers=4, checkpointing=False, mlp=None, targets=ADAPTED, **settings):
    """A model whose first layer (the original's code) and last layer (a graph of its own) are dense."""
    model = with_lora(tiny("llama", layers), targets=targets)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return lemo_fx.transform(model, LemoConfig(site, mlp or site, block_size=8, **settings))


def compilations(model, batches, whole=False, backend="eager"):
    """Compilations in each step; the numbers must be the eager model's, and no graph may break."""
    expected = [step(model, inputs) for inputs in batches]
    torch.compiler.reset()
    counters.clear()
    for module in [model] if whole else model.get_decoder().layers:
        module.compile(fullgraph=True, backend=backend)
    counts = []
    for inputs, eager in zip(batches, expected, strict=True):
        before = counters["stats"]["unique_graphs"]
        assert_same_step(step(model, inputs), eager, "compiled")
        counts.append(counters["stats"]["unique_graphs"] - before)
    assert not counters["graph_break"]
    torch.compiler.reset()
    return counts


HALF = Elimination(keep=0.5, eliminated="exact", score="random")
BY_DYNAMO = ("skip", "float8")
"""Variants that go through AOTAutograd in test_equality.py and test_float8_linear.py."""
VARIANTS = {
    "skip": (Elimination(keep=0.5), {}),
    "shared": (Elimination(keep=0.5), {"mlp": Elimination(keep=0.5, score="shared")}),
    "checkpointing": (Elimination(keep=0.5, balance=True), {"checkpointing": True}),
    "projections": (HALF, {"checkpointing": True, "recompute": "projections"}),
    "elementwise": (HALF, {"checkpointing": True, "recompute": "elementwise"}),
    "float8": (HALF, {"forward": "float8"}),
    "float8_both": (HALF, {"checkpointing": True, "forward": "float8", "backward": "float8"}),
    "offload": (HALF, {"checkpointing": True, "offload": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_compilation_for_each_kind_of_layer(variant):
    site, settings = VARIANTS[variant]
    batches = [batch(2, 64, padding=side, seed=seed) for seed, side in enumerate(("right", "left", "both"))]
    # A dense layer, the sparse ones and the last one; rewritten dense layers are all alike.
    kinds = 2 if variant in ("offload", "projections", "elementwise", "float8_both") else 3
    backend = "eager" if variant in BY_DYNAMO else "aot_eager"
    assert compilations(transformed(site, **settings), batches, backend=backend) == [kinds, 0, 0]


@pytest.mark.parametrize(
    ("whole", "slope"),
    [(False, 0.0), pytest.param(True, 0.0, marks=pytest.mark.slow), pytest.param(False, 0.5, marks=pytest.mark.slow)],
)
def test_the_leader_of_a_shared_choice_is_compiled_with_the_others(whole, slope):
    site = Elimination(keep=0.5, eliminated="exact", score="step", slope=slope)
    model = transformed(site, layers=4 if whole else 5)
    batches = [batch(1, 64, seed=seed) for seed in range(2)]
    assert compilations(model, batches, whole) == [1 if whole else 3, 0]


@pytest.mark.parametrize(("layers", "whole"), [(9, False), (4, True)])
@pytest.mark.slow
def test_budgets_that_differ_by_layer_cost_one_compilation(layers, whole, monkeypatch):
    # In as many pieces for all of them: 10 to 70 tokens of 80.
    monkeypatch.setattr(branch, "SEGMENT", 16)
    site = Elimination(keep=[1 - layer / 10 for layer in range(layers)], score="random")
    model = transformed(site, layers, checkpointing=not whole)
    # By layer: both dense ones and the first sparse one, whose budget was said to vary.
    assert compilations(model, [batch(1, 80, seed=seed) for seed in range(2)], whole) == [1 if whole else 3, 0]
    kept = [select.record.kept_tokens for select in selections(model).values()]
    assert len(set(kept)) == layers - 2


@pytest.mark.parametrize(
    ("site", "layers", "kinds"),
    [(Elimination(keep=0.4), 2, 2), (Elimination(threshold=3.0), 1, 1)],
    ids=["keep_by_layer", "threshold_whole_model"],
)
@pytest.mark.slow
def test_any_length_compiles_twice(site, layers, kinds):
    # Static, then dynamic, which takes a ragged tail too.
    batches = [batch(2, length, padding="both") for length in (64, 96, 73)]
    model = transformed(site, layers, dense_layers=(-1,) if layers > 1 else ())
    assert compilations(model, batches, whole=layers == 1) == [kinds, kinds, 0]


@pytest.mark.slow
def test_any_threshold_and_count_compiles_once(monkeypatch):
    monkeypatch.setattr(branch, "SEGMENT", 16)
    thresholds = [0.2, 0.5, 0.7, 0.9]
    site = Elimination(threshold=thresholds, score="random")
    model = transformed(site, len(thresholds), checkpointing=True, dense_layers=())
    batches = [batch(1, 80, seed=seed) for seed in range(3)]
    assert compilations(model, batches, backend="aot_eager") == [1, 0, 0]
    assert len({select.record.kept_tokens for select in selections(model).values()}) > 2


def test_a_branch_is_recomputed_in_as_few_pieces_as_its_largest_share_needs(monkeypatch):
    monkeypatch.setattr(branch, "SEGMENT", 16)
    site = Elimination(keep=[0.1, 0.25, 0.25], score="random")
    model = transformed(None, 3, checkpointing=True, mlp=site, dense_layers=())
    inputs, pieces = batch(1, 80), []
    expected = step(model, inputs)
    torch.compiler.reset()

    def count(graph, _):
        """24 tokens of 80 are the largest share, of which the first layer keeps 16."""
        pieces.append(
            sum(node.target is torch.ops.higher_order.tag_activation_checkpoint for node in graph.graph.nodes)
        )
        return graph.forward

    for layer in model.get_decoder().layers:
        layer.compile(fullgraph=True, backend=count)
    assert_same_step(step(model, inputs), expected, "compiled")
    torch.compiler.reset()
    assert {*pieces} == {1 + 2}


@pytest.mark.slow
def test_models_of_more_kinds_than_dynamo_compiles_of_one_code():
    treatments = [None, Elimination(0.5, score="random"), HALF, Elimination(0.5, eliminated="exact", score="step")]
    pairs = list(itertools.product(treatments, repeat=2))[1 : torch._dynamo.config.recompile_limit + 2]
    torch.compiler.reset()
    for attention, mlp in pairs:
        model = lemo_fx.transform(tiny("llama", 1), LemoConfig(attention, mlp, block_size=8, dense_layers=()))
        model.model.layers[0].compile(fullgraph=True, backend="eager")
        model(**batch(1, 64))
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("treatment", "segment", "other"),
    [("skip", None, (16, 1e-6, 4)), ("exact", 16, (32, 1e-4, 2))],
    ids=["one_piece", "pieces"],
)
@pytest.mark.slow
def test_models_of_other_scalings_compile_in_one_process(treatment, segment, other, monkeypatch):
    if segment:
        monkeypatch.setattr(branch, "SEGMENT", segment)
    torch.compiler.reset()
    inputs = batch(1, 64)
    for alpha, epsilon, heads in ((8, 1e-6, 4), other):
        model = with_lora(tiny("llama", 2, rms_norm_eps=epsilon, num_attention_heads=heads), lora_alpha=alpha)
        site = Elimination(0.5, eliminated=treatment)
        lemo_fx.transform(model, LemoConfig(site, site, block_size=8, dense_layers=(0,)))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        expected = step(model, inputs)
        model.get_decoder().layers[1].compile(fullgraph=True, backend="aot_eager")
        assert_same_step(step(model, inputs), expected, "compiled")
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("recompute", "segment"),
    [pytest.param("all", 16, marks=pytest.mark.slow), ("projections", None)],
    ids=["all_pieces", "projections_one_piece"],
)
def test_a_checkpointed_exact_layer_computes_kept_rows_in_the_backward_only(recompute, segment, monkeypatch):
    if segment:
        monkeypatch.setattr(branch, "SEGMENT", segment)
    site = Elimination(keep=0.25, eliminated="exact", score="random")
    model = transformed(site, layers=5, checkpointing=True, recompute=recompute)
    inputs = batch(1, 64)
    expected = step(model, inputs)
    forwards, layers = [], model.get_decoder().layers
    compiled = aot_autograd(fw_compiler=lambda graph, _: forwards.append(graph) or make_boxed_func(graph.forward))
    for layer in (layers[0], layers[2]):
        layer.compile(fullgraph=True, backend=compiled)
    assert_same_step(step(model, inputs), expected, "compiled")
    torch.compiler.reset()

    def rows_multiplied(graph):
        """By the frozen weights, not by the adapters."""
        products = [n for n in graph.graph.nodes if n.target in (aten.mm.default, aten.addmm.default)]
        shapes = [[a.meta["val"].shape for a in n.args] for n in products]
        return sum(s[-2][0] * s[-1].numel() for s in shapes if min(s[-1]) > 8)

    dense, sparse = forwards[0], forwards[1]
    whole = 64 * sum(w.weight.numel() for w in layers[2].modules() if type(w) is nn.Linear and min(w.weight.shape) > 8)
    assert rows_multiplied(dense) == whole
    # Its values are those of every row: none is moved.
    assert not any(node.target is torch.ops.lemo_fx.restore.default for node in sparse.graph.nodes)
    if recompute == "all":
        assert rows_multiplied(sparse) == whole
    else:
        # What the attention gave is kept, so it is computed.
        assert whole < rows_multiplied(sparse) < 1.25 * whole


def test_elementwise_recompute_repeats_no_product_of_a_frozen_weight_and_keeps_less():
    products, adapters, kept = {}, {}, {}
    for recompute in (None, "elementwise"):
        settings = {"recompute": recompute, "checkpointing": True} if recompute else {}
        model = transformed(Elimination(keep=0.5), targets="all-linear", **settings)
        layer, graphs = model.get_decoder().layers[1], []

        def collect(graph, _, graphs=graphs):
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        expected = step(model, batch(1, 80))
        layer.compile(fullgraph=True, backend=aot_autograd(fw_compiler=collect, bw_compiler=collect))
        assert_same_step(step(model, batch(1, 80)), expected, "compiled")
        torch.compiler.reset()
        nodes = [n for graph in graphs for n in graph.graph.nodes if n.target in (aten.mm.default, aten.addmm.default)]
        inner = [min(*n.args[-2].meta["val"].shape, *n.args[-1].meta["val"].shape) for n in nodes]
        products[recompute] = sum(width > 4 for width in inner)
        adapters[recompute] = len(inner) - products[recompute]
        # What the backward takes besides parameters and the gradient of the layer's output.
        (arguments,) = ([n for n in graph.graph.nodes if n.op == "placeholder"] for graph in graphs[1:])
        sizes = [n.meta["val"] for n in arguments if isinstance(n.meta["val"], torch.Tensor)]
        kept[recompute] = sum(x.nbytes for x in sizes if 40 in x.shape)
    assert products["elementwise"] == products[None] > 0
    # Rotated queries and keys are kept, and so is the sum after the output projection; values alone are added up again.
    assert adapters["elementwise"] <= adapters[None] + 1
    assert kept["elementwise"] < 0.8 * kept[None]


@pytest.mark.slow
def test_a_whole_model_behind_a_checkpointed_dense_layer_chooses_in_its_forward():
    """The layer's recompute gives the input from which a compiler could choose in the backward alone."""
    site = Elimination(keep=0.5, eliminated="exact", score="step")
    # Two models: the choices of an eager step would be remembered.
    eager, model = (transformed(site, layers=2, checkpointing=True, dense_layers=(0,)) for _ in range(2))
    expected = step(eager, batch(2, 80))
    torch.compiler.reset()
    model.compile(backend="aot_eager")
    for _ in range(2):
        assert_same_step(step(model, batch(2, 80)), expected, "compiled")
    torch.compiler.reset()


def few_weights():
    """One layer of four weights, seven in a Llama: tracing their roundings takes most of the time."""
    return with_lora(tiny("phi3", 1), targets=("qkv_proj", "down_proj"))


@pytest.mark.parametrize(
    ("site", "rows"), [(None, 1), (Elimination(keep=0.5, score="random"), 2)], ids=["dense", "skip"]
)
def test_a_checkpointed_float8_layer_keeps_its_rows_only(site, rows):
    model = few_weights()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    config = LemoConfig(site, site, block_size=8, dense_layers=(), forward="float8", backward="float8")
    lemo_fx.transform(model, config)
    layer, backwards, inputs = model.get_decoder().layers[0], [], batch(1, 80)
    expected = step(model, inputs)
    collect = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        bw_compiler=lambda graph, _: backwards.append(graph) or make_boxed_func(graph.forward),
    )
    layer.compile(fullgraph=True, backend=collect)
    assert_same_step(step(model, inputs), expected, "compiled")
    torch.compiler.reset()
    (graph,) = backwards
    saved = [n for n in graph.graph.nodes if n.op == "placeholder" and not n.name.startswith(("primals", "tangents"))]
    values = [n.meta["val"] for n in saved if isinstance(n.meta["val"], torch.Tensor)]
    # No result of a float8 product: the rows that each branch reads; a dense attention's are the layer's input.
    assert sum(v.is_floating_point() and {40, 80} & {*v.shape} != set() for v in values) == rows


@torch.library.custom_op("lemo_tests::float8_product", mutates_args=())
def float8_product(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """One operation, as on a GPU: nothing that reads a weight in float8 can be computed again for less."""
    return (a.float() @ b.float()) * scale * other


@float8_product.register_fake
def _(a, b, scale, other):
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


def float8_linear(x, weight, again=False):
    (rows, scale), (columns, other) = reference.quantise(x.flatten(0, -2)), reference.quantise(weight, again)
    out = float8_product(rows, columns.contiguous().t(), scale, other.t())
    return out.to(x.dtype).unflatten(0, x.shape[:-1])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain_activations", "checkpointing"])
def test_no_copy_of_a_weight_in_float8_is_kept_for_the_backward(checkpointing, monkeypatch):
    """`exact` rounds each weight for its values and again for its kept rows; rounded once, it would be kept between."""
    monkeypatch.setattr(products, "float8_linear", float8_linear)
    model = few_weights()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    lemo_fx.transform(model, LemoConfig(HALF, HALF, block_size=8, dense_layers=(), forward="float8", backward="float8"))
    backwards = []
    collect = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        bw_compiler=lambda graph, _: backwards.append(graph) or make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    expected = step(model, batch(1, 80))
    model.get_decoder().layers[0].compile(fullgraph=True, backend=collect)
    assert_same_step(step(model, batch(1, 80)), expected, "compiled")
    torch.compiler.reset()
    (graph,) = backwards
    saved = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder" and not n.name.startswith("primals")]
    assert [v for v in saved if isinstance(v, torch.Tensor) and v.dtype is torch.float8_e4m3fn] == []


# Gemma 3 has Gemma 2's masks and norms.
# Mixtral's experts do not compile whole on the CPU with transformers 5.17, nor under adapters, with lemo_fx or without.
@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES} - {"gemma2", "mixtral"}))
def test_checkpointed_exact_layers_of_every_architecture(architecture):
    model = with_lora(tiny(architecture), targets=ADAPTED_ANYWHERE)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    site = Elimination(keep=0.4, eliminated="exact", score="step")
    lemo_fx.transform(model, LemoConfig(site, site, block_size=8, dense_layers=()))
    inputs = batch(2, 75, padding="both")
    expected = step(model, inputs)
    torch.compiler.reset()
    # The first layer counts where it attends in another way than the second.
    for _, layer in decoder_layers(model)[0 if architecture in ("llama", "gemma3") else 1 :]:
        layer.compile(fullgraph=True, backend="aot_eager")
    assert_same_step(step(model, inputs), expected, "compiled")
    torch.compiler.reset()


class HostReads(TorchDispatchMode):
    """How often a value is read on the host, also inside lemo_fx's threshold op."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
        if func is torch.ops.lemo_fx.select_by_threshold.default:
            # A mode is off while it handles an operation, and would not see what a custom op does.
            with self:
                return op.select_by_threshold._init_fn(*args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("site", "reads"), [(Elimination(keep=0.5), 0), (Elimination(threshold=3.0), 4)])
def test_only_a_threshold_reads_and_one_number_per_site(site, reads, monkeypatch):
    # On an accelerator NaN is only marked.
    monkeypatch.setattr(op, "_note_nan", lambda *_: None)
    inputs = batch(2, 64, padding="both")
    model, counts = transformed(site), []
    for _ in range(2):
        with HostReads() as found:
            step(model, inputs)
        counts.append(found.count)
        lemo_fx.revert(model)
    # transformers reads a few itself.
    assert counts[0] - counts[1] == reads


def test_every_recompute_policy_is_known_to_torchs_cache_by_its_own_name():
    policies = (branch.RECOMPUTE_ALL, *branch.SELECTIVE.values(), branch.SELECTIVE_COMPILED["elementwise"])
    assert len({policy.cache_hash for policy in policies}) == len(policies) == 4


@pytest.mark.slow
@pytest.mark.parametrize("float8", [False, True])
def test_what_is_compiled_is_found_in_torchs_cache(float8):
    """Another process does not compile again: an autograd.Function and a checkpoint's policy do not keep graphs out."""
    words = {"forward": "float8", "backward": "float8"} if float8 else {}
    model = transformed(Elimination(keep=0.5, eliminated="exact"), layers=3, checkpointing=True, **words)
    inputs = batch(1, 64)
    with fresh_cache():
        for kind in ("miss", "hit"):
            torch.compiler.reset()
            counters.clear()
            for layer in model.get_decoder().layers:
                layer.compile()
            step(model, inputs)
            found = counters["aot_autograd"]
            assert found[f"autograd_cache_{kind}"] == found["total"] > 0
    torch.compiler.reset()


class Breaking(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return nn.functional.silu(x)


def test_a_graph_that_breaks_in_a_branch_is_recomputed_in_float8_too():
    """Kernels of other packages break graphs: the checkpoint around them then runs in Python."""
    words = {"checkpointing": True, "forward": "float8", "backward": "float8"}
    model = transformed(None, 3, mlp=HALF, targets=("down_proj",), **words)
    sparse = model.get_decoder().layers[1]
    sparse.mlp.act_fn = Breaking()
    inputs = batch(1, 64)
    eager = step(model, inputs)
    torch.compiler.reset()
    counters.clear()
    sparse.compile(backend="eager")
    assert_same_step(step(model, inputs), eager, "compiled")
    assert counters["graph_break"]
    torch.compiler.reset()
