"""What a model hands its decoder layers: recorded in a forward pass of a few tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from lemo_fx.errors import LemoError
from lemo_fx.graph.anatomy import MASKED_IMPLEMENTATIONS, causal_model, implementation_of, longest_context, text_config
from lemo_fx.graph.capture import NO_CACHE, argument_names, by_name, modes_kept, restored, uncompiled
from lemo_fx.kernels.float8_linear.as_it_comes import is_quantised

BATCH, LENGTH = 2, 23
"""Of the probe, [B, S]."""
PADDED, DOCUMENT = 3, 8
"""Tokens at the end of its second sample that are padding, and the token at which its second document starts."""
FAR = 2**17
"""Positions up to which the probe's are spread where the model names no limit."""
Calls = dict[nn.Module, dict[str, Any]]
"""By decoder layer, the arguments of its call by name."""


@dataclass(frozen=True)
class Probe:
    """What a model hands its decoder layers in a forward pass of a few tokens.

    Attributes:
        calls: under the model's own attention implementation.
        explicit: under eager attention, whose masks say everything.
        padded: whether the second sample has padding.
    """

    calls: Calls
    explicit: Calls
    padded: bool


@contextmanager
def eager(module: nn.Module) -> Iterator[None]:
    """Transformers' eager attention in a module, whose masks say everything."""
    found: list[Any] = [getattr(part, "config", None) for part in module.modules()]
    configs = list({id(c): c for c in found if hasattr(c, "_attn_implementation_internal")}.values())
    with restored(configs, "_attn_implementation_internal"):
        for config in configs:
            config._attn_implementation_internal = "eager"
        yield


def record(model: nn.Module, layers: Sequence[nn.Module]) -> list[Probe]:
    """Run the model on a few tokens without gradient, with padding and without; keep what its layers are handed.

    Raises:
        LemoError: the model does not run on plain token ids, naming why.
    """
    runner = causal_model(model) or model
    own = {implementation_of(module) for layer in layers for module in layer.modules()}
    masked = own <= {None, *MASKED_IMPLEMENTATIONS}
    probes = []
    try:
        for padded in (True, False):
            inputs = probe_inputs(runner, masked, padded)
            calls = _recorded(runner, layers, inputs)
            with eager(runner):
                explicit = _recorded(runner, layers, inputs)
            probes.append(Probe(calls, explicit, padded))
    except Exception as error:
        raise LemoError(in_a_line(error)) from error
    return probes


def in_a_line(error: Exception) -> str:
    """An error's type and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _recorded(runner: nn.Module, layers: Sequence[nn.Module], inputs: Mapping[str, Any]) -> Calls:
    """By layer, the arguments of its first call, by name."""
    calls: Calls = {}

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = by_name(argument_names(layer), args, kwargs)
        calls.setdefault(layer, {name: NO_CACHE.get(name, value) for name, value in given.items()})

    with ExitStack() as hooks, quiet(runner), rope_kept(runner), torch.no_grad():
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(keep, with_kwargs=True))
        runner(**inputs)
    return calls


@contextmanager
def rope_kept(runner: nn.Module) -> Iterator[None]:
    """A RoPE that follows the length, and has grown to that of a probe, is what it was after a with block."""
    scaled = [m for m in runner.modules() if "inv_freq" in m._buffers]
    states = [(m, dict(vars(m)), dict(m._buffers)) for m in scaled]
    try:
        yield
    finally:
        for module, attributes, buffers in states:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def probe_inputs(runner: nn.Module, masked: bool, padded: bool) -> dict[str, Any]:
    """Token ids, positions up to the longest, and a mask, without which these would be taken for documents'."""
    accepted = inspect.signature(runner.forward).parameters
    device = next(p.device for p in runner.parameters())
    generator = torch.Generator().manual_seed(0)
    config: Any = runner.config
    ids = torch.randint(0, text_config(config).vocab_size, (BATCH, LENGTH), generator=generator, device="cpu")
    longest = max(longest_context(config) or FAR, LENGTH)
    # Attention that reads documents off restarting positions must see consecutive ones: at both ends of the range.
    spread = torch.linspace(0, longest - 1, LENGTH, device="cpu").long()
    line = torch.arange(LENGTH, device="cpu")
    rows = [spread, spread] if masked else [line, line + longest - LENGTH]
    mask = torch.ones_like(ids)
    if padded:
        mask[1, -PADDED:] = 0
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": torch.stack(rows),
        "use_cache": False,
    }
    more = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    given = {name: value for name, value in inputs.items() if name in accepted or more}
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}


@contextmanager
def quiet(module: nn.Module, float32: bool = False) -> Iterator[None]:
    """Nothing random, compiled or rounded to TF32; nor, where `float32` says so, by the autocast around it.

    Quantised modules keep their training mode, since bitsandbytes repacks a weight for good when evaluated.
    """
    kind = next((p.device.type for p in module.parameters()), "cpu")
    rounding = torch.autocast(kind, enabled=False) if float32 else nullcontext()
    with modes_kept(module), torch.random.fork_rng(devices=[]), uncompiled(), _without_tf32(), rounding:
        for part in module.modules():
            part.training = part.training and is_quantised(part)
        yield


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Float32 matmuls in float32; afterwards what was set before, through the same one of torch's two interfaces.

    Each of them raises an error when it reads what was set through the other.
    """
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        backends: Any = torch.backends
        devices = [backends.cuda.matmul, backends.mkldnn.matmul]
        with restored(devices, "fp32_precision"):
            for device in devices:
                device.fp32_precision = "ieee"
            yield
        return
    if old == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(old)


def with_weights(module: nn.Module, weights: Mapping[str, torch.Tensor], function: Callable[[], Any]) -> Any:
    """What a function returns while parameters and buffers of a module are these, by name."""
    return functional_call(_Within(module, function), {f"module.{name}": w for name, w in weights.items()}, ())


class _Within(nn.Module):
    """Calls a function while `functional_call` has swapped a module's weights."""

    def __init__(self, module: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self) -> Any:
        """What the function returns."""
        return self.function()
