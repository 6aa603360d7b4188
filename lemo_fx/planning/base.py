"""Refuse quantised bases that pass no gradient down, since adapters below them would be trained wrongly, unnoticed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from lemo_fx.errors import UnsupportedModelError
from lemo_fx.graph.probe import in_a_line, quiet
from lemo_fx.kernels.float8_linear.as_it_comes import is_packed, is_quantised

ROWS = 16
CLOSE = 0.25
"""Share by which the gradient of a product may miss the product's own size: more than activations are rounded by."""
WRONGLY = ", so adapters in the layers below would be trained wrongly, with lemo_fx or without it"
MENDS = {
    "FP8Linear": "a transformers whose FP8Linear has a backward (5.24), or FineGrainedFP8Config(dequantize=True)",
    "CompressedTensorsFP8Linear": "CompressedTensorsConfig(dequantize=True)",
    "compressed_tensors": "CompressedTensorsConfig(dequantize=True), or weights alone quantised",
    "torchao": "weights alone quantised (Float8WeightOnlyConfig, Int8WeightOnlyConfig)",
}
"""By class of the layer, or library: what to load instead."""


def refuse_untrainable(name: str, layer: nn.Module, known: set[tuple]) -> None:
    """Raise UnsupportedModelError where a quantised linear layer gives its input no gradient, or a wrong one.

    Args:
        known: kinds of linear layers that are tried already; those of this layer are added.
    """
    for part, module in layer.named_modules():
        # Not what an attribute would make anew.
        weight = module._parameters.get("weight")
        kind = (part, type(module), type(weight), getattr(weight, "dtype", None))
        # Compressed-tensors' layers have a forward on the instance.
        quantised = is_quantised(module) or (isinstance(module, nn.Linear) and "forward" in vars(module))
        if not (quantised and hasattr(module, "in_features")) or kind in known:
            continue
        known.add(kind)
        problem = _why_no_gradient(module, list(_dtypes(layer)))
        if problem:
            raise UnsupportedModelError(
                f"{name}.{part}: {type(module).__name__} ({type(weight).__name__}, {kind[-1]}) {problem}; use "
                f"{_mend(module)}"
            )


def _dtypes(layer: nn.Module) -> Iterator[torch.dtype]:
    """Of a layer's stream, the likeliest first: that of its norms."""
    vectors = (p.dtype for p in layer.parameters() if p.dim() == 1 and p.is_floating_point() and p.itemsize > 1)
    yield from dict.fromkeys([*vectors, torch.bfloat16, torch.float32, torch.float16])


def _why_no_gradient(module: nn.Module, dtypes: list[torch.dtype]) -> str | None:
    """None where a linear layer's gradient is that of a product, or it cannot be run on rows by itself."""
    weight = next(module.parameters(), None)
    device = torch.device("cpu") if weight is None else weight.device
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, ROWS, int(module.in_features), generator=generator, device="cpu")  # type: ignore[arg-type]
    with quiet(module), torch.enable_grad():
        for dtype in dtypes:
            x = rows.to(device, dtype).requires_grad_()
            try:
                out = module(x)
                moved = (out - module(torch.zeros_like(x))).detach()
            except ImportError as error:
                return f"does not run, with lemo_fx or without it: {in_a_line(error)}"
            except Exception:
                continue
            if not out.requires_grad:
                return f"gives its input no gradient{WRONGLY}"
            try:
                (gradient,) = torch.autograd.grad(out, x, moved, allow_unused=True)
            except (RuntimeError, NotImplementedError) as error:
                return f"gives its input no gradient ({in_a_line(error)}){WRONGLY}"
            if gradient is None:
                return f"gives its input no gradient{WRONGLY}"
            # <W'y, x> = <y, Wx> for y = Wx.
            size, found = float(moved.double().square().sum()), float((gradient.double() * x.detach().double()).sum())
            return None if abs(found - size) <= CLOSE * size else f"gives its input a wrong gradient{WRONGLY}"
    return None


def _mend(module: nn.Module) -> str:
    weight = module._parameters.get("weight")
    if weight is not None and is_packed(weight):
        return MENDS["torchao"]
    if hasattr(module, "quantization_scheme"):
        return MENDS["compressed_tensors"]
    return MENDS.get(type(module).__name__, "a base in bfloat16, or in bitsandbytes' 4 bits")
