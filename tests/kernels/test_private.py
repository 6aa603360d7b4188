"""What breaks without each of the private names in `kernels/private.py`; and that they stand nowhere else."""

import ast
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lemo_fx.kernels import private
from lemo_fx.kernels.eliminate.op import eliminate
from lemo_fx.runtime.branch import MATMULS

ROOT = Path(__file__).parents[2]
ATTRIBUTES = {"_cdata", "_compiled_call_impl", "_codegen", "_opname"}
"""Private attributes of torch's objects."""


class Ops(TorchDispatchMode):
    """The ops that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function)
        return function(*args, **(kwargs or {}))


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


def private_names(path: Path) -> set[str]:
    """Names of torch's with an underscore in front that a file uses."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if node.attr in ATTRIBUTES or (name.startswith("torch.") and re.search(r"\._(?!_)", name)):
                found.add(name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            whole = [f".{node.module}.{alias.name}" for alias in node.names]
            found |= {name for name in whole if re.search(r"\._(?!_)", name)}
    return found


def test_they_stand_in_one_module():
    folders = (ROOT / name for name in ("lemo_fx", "passes", "kernels"))
    files = {path.resolve() for folder in folders for path in folder.rglob("*.py")} - {ROOT / "kernels/private.py"}
    assert len(files) > 50
    assert {str(path): names for path in files if (names := private_names(path))} == {}
    assert len(private_names(ROOT / "kernels/private.py")) > 5


def test_each_of_them_has_a_test_here():
    text = Path(__file__).read_text()
    assert [name for name in private.__all__ if f"private.{name}" not in text] == []


def test_a_recompute_policy_knows_what_attention_and_products_dispatch_to():
    """Renamed ops would be computed again in every backward, without a word."""
    query = torch.randn(1, 2, 64, 16, requires_grad=True)
    with Ops() as ops:
        F.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    assert ops.seen & private.ATTENTION_OPS == {private.CPU_ATTENTION.default}
    assert private.CPU_ATTENTION_BACKWARD.default in ops.seen

    matrix = torch.randn(16, 16)
    with Ops() as ops:
        matrix @ matrix
        torch.bmm(matrix[None], matrix[None])
        F.linear(matrix, matrix, matrix[0])
        torch.baddbmm(matrix[None], matrix[None], matrix[None])
        F.linear(matrix[None], matrix)
    assert {op for op in ops.seen if "mm" in str(op)} == MATMULS.keys() - {
        private.GROUPED_PRODUCT,
        private.SCALED_PRODUCT,
        torch.ops.lemo_fx.held_product.default,
    }


def test_products_of_experts_and_in_float8_are_what_the_policies_name():
    with Ops() as ops:
        rows, experts = torch.randn(32, 16).bfloat16(), torch.randn(2, 16, 16).bfloat16()
        F.grouped_mm(rows, experts, offs=torch.tensor([16, 32], dtype=torch.int32))
    assert private.GROUPED_PRODUCT in ops.seen
    rows = torch.randn(16, 32).to(torch.float8_e4m3fn)
    scale = torch.ones(())
    with Ops() as ops:
        private.scaled_product(rows, rows.t(), scale, scale, out_dtype=torch.bfloat16)
    assert private.SCALED_PRODUCT in ops.seen


def test_what_a_function_returns_may_be_written_to():
    """Else adapters that add to what a base returns in place (PEFT's AdaLoRA) die in float8."""

    class Rows(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return (2 * x.flatten(0, 1)).unflatten(0, x.shape[:2])

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    x = torch.ones(2, 3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified inplace"):
        Rows.apply(x).add_(x)
    out = Rows.apply(x)
    written = private.writable(out)
    written.add_(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))
    assert written.data_ptr() == out.data_ptr()


def test_graphs_of_rewritten_layers_are_kept_in_torchs_caches():
    """Else every process would compile them again; `test_compile.py` sees that they are found."""
    private.cache_functions()
    assert torch.ops.higher_order.autograd_function_apply.cacheable()
    assert torch._prims.rng_prims.graphsafe_run_with_rng_state.cacheable()


def test_a_recompute_is_told_from_a_forward():
    """Else it would choose its blocks anew: silently wrong gradients."""
    seen = []

    def body(x):
        seen.append(private.in_backward())
        return x.sin()

    checkpoint(body, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [False, True]


def test_transforms_of_functions_are_told_from_plain_calls():
    """Else they would go through rewritten layers, and gradients be left out without a word."""
    seen = []

    def body(x):
        seen.append(private.in_transform())
        return x.sin().sum()

    body(torch.ones(2, requires_grad=True)).backward()
    torch.func.grad(body)(torch.ones(2))
    torch.func.vmap(body)(torch.ones(2, 2))
    torch.func.jvp(body, (torch.ones(2),), (torch.ones(2),))
    with torch.autograd.forward_ad.dual_level():
        body(torch.ones(2))
    assert seen == [False, True, True, True, True]


def test_hooks_of_every_module_are_found():
    """Else rewritten layers would show them kept rows."""
    before, kept = private.global_hooks(), []
    module = torch.nn.modules.module
    for kind in ("forward_pre", "forward", "full_backward_pre", "full_backward"):
        hook = lambda *_: None  # noqa: E731
        kept.append((hook, getattr(module, f"register_module_{kind}_hook")(hook)))
    assert set(private.global_hooks()) - set(before) == {hook for hook, _ in kept}
    for _, handle in kept:
        handle.remove()
    assert private.global_hooks() == before


def test_an_assertion_that_does_not_wait():
    private.assert_on_device(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="forgotten"):
        private.assert_on_device(torch.tensor(False), "forgotten")


def test_a_compiler_believes_what_it_is_told_of_a_size_and_leaves_open_what_may_vary():
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    @torch.compile(fullgraph=True, backend=backend)
    def body(x, picked):
        count = int(picked.item())
        private.promise(count <= x.shape[0])
        private.promise(count >= 0)
        return x.narrow(0, 0, count).sum() + (1 if private.guard_or_false(x.shape[0] > 1000) else 0)

    torch.compiler.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for length in (8, 9, 10):
            x = torch.ones(length)
            private.may_vary(x, 0)
            assert body(x, torch.tensor(3)) == 3
    assert len(graphs) == 1
    torch.compiler.reset()


def test_a_compiled_layer_runs_as_it_is():
    layer = Doubling()
    calls = []
    layer.compile(backend=lambda module, inputs: calls.append(1) or module.forward)
    layer(torch.ones(1, 2))
    private.uncompile(layer)
    layer(torch.ones(2, 2))
    layer(torch.ones(3, 3))
    assert calls == [1]
    torch.compiler.reset()


def test_storages_are_told_apart_on_the_meta_device_too():
    one, other = torch.ones(4, device="meta"), torch.ones(4, device="meta")
    assert private.storage_key(one) == private.storage_key(one[1:])
    assert private.storage_key(one) != private.storage_key(other)


def test_ops_of_a_graph_are_told_from_functions():
    assert private.is_op(torch.ops.lemo_fx.eliminate.default)
    assert not private.is_op(eliminate)
    assert not private.is_op(torch.add)


def test_a_traced_forward_carries_its_keyword_arguments():
    def forward(self, x, **kwargs):
        return x

    graph = fx.Graph()
    one, other = graph.placeholder("x"), graph.placeholder("**kwargs")
    assert private.with_kwargs(forward, 3)(None, one, other) is one


def test_leaves_of_nested_arguments():
    assert private.tree_leaves([1, {"a": (2, None)}]) == [1, 2, None]
    assert private.tree_map(str, [1, {"a": (2,)}]) == ["1", {"a": ("2",)}]


def test_the_wrapper_that_is_refused_is_the_one_that_torch_wraps_with():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    assert isinstance(checkpoint_wrapper(nn.Linear(2, 2)), private.CheckpointWrapper)


def test_whether_there_is_triton_is_a_plain_answer():
    assert private.has_triton() in (True, False)


def test_a_tensor_without_data():
    """Logits that nobody uses take no memory, and can be asked for their shape."""

    class Late(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise AssertionError(func)

        __torch_dispatch__ = __torch_function__

    late = private.without_data(Late, (3, 5), dtype=torch.bfloat16, device=torch.device("cpu"), requires_grad=True)
    with private.as_it_is():
        assert (late.shape, late.dtype, late.requires_grad) == ((3, 5), torch.bfloat16, True)
        with pytest.raises(RuntimeError, match="storage"):
            late.untyped_storage().data_ptr()
    with pytest.raises(AssertionError):
        late.sum()
