"""Prove a segmented head by running it: its loss and gradients beside the original's, on hidden states made up here.

The decoder is taken out for the time of it, so that only the head runs. Calls differ in the optional arguments that the
loss may depend on; where a call with an argument (or without it) differs, such calls keep the original head.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from lemo_fx.graph.anatomy import Anatomy, config_in_words
from lemo_fx.graph.capture import graph_module
from lemo_fx.graph.probe import PADDED, in_a_line, probe_inputs, quiet, with_weights
from lemo_fx.runtime.head import SegmentedLoss

LARGEST = 2**28
"""Elements of the output projection up to which a head is proven in float32."""
OPTIONAL = ("attention_mask", "position_ids", "num_items_in_batch")
SHARE, ROUNDED = 2e-3, 3e-2
"""How far loss and gradients may be apart, of the largest, in float32 and in half precision."""


def prove_head(anatomy: Anatomy, graph: fx.Graph, functions: dict[str, fx.Graph], segmented: SegmentedLoss) -> str:
    """Why a head's graph must not, after `segment_loss`, take the original's place; empty where it may."""
    head = anatomy.head
    assert head is not None
    base = next(
        (
            str(n.target)
            for n in graph.nodes
            if n.op == "call_module" and any(m is anatomy.decoder for m in head.get_submodule(str(n.target)).modules())
        ),
        None,
    )
    if base is None:
        return ""
    key = _key(head, graph, functions, segmented.presence)
    if key not in _known:
        try:
            trial = _Trial(head, base, segmented)
        except Exception:
            # The layers' proof says that the model does not run on plain token ids.
            return ""
        _known[key] = trial.fault(graph, functions)
    return _known[key]


_known: dict[tuple[Any, ...], str] = {}
"""What was proven in this process: models of one kind need it once."""


def _key(
    head: nn.Module, graph: fx.Graph, functions: Mapping[str, fx.Graph], presence: Mapping[str, bool]
) -> tuple[Any, ...]:
    projection: Any = head.get_output_embeddings()  # type: ignore[operator]
    weights = [(name, p.shape, p.dtype, p.device.type, p.requires_grad) for name, p in projection.named_parameters()]
    called = [n.target for n in graph.nodes if n.op == "call_function"]
    codes = [str(g) for g in (graph, *functions.values())]
    forward = type(head).forward
    return (
        type(head),
        forward,
        config_in_words(head.config),
        type(projection),
        *weights,
        *called,
        *codes,
        *presence.items(),
    )


class _Trial:
    """A head's weights in float32 and made-up hidden states, the same for the original and the segmented head."""

    def __init__(self, head: nn.Module, base: str, segmented: SegmentedLoss) -> None:
        self.head, self.base, self.segmented = head, base, segmented
        self.accepted = inspect.signature(head.forward).parameters
        self.inputs = probe_inputs(head, masked=True, padded=True)
        outputs: list[Any] = []
        hook = head.get_submodule(base).register_forward_hook(lambda module, args, output: outputs.append(output))
        with hook, quiet(head), torch.no_grad():
            head(**self.inputs)
        self.output = outputs[0]
        generator = torch.Generator().manual_seed(3)
        ids = self.inputs["input_ids"]
        labels = torch.randint(0, int(ids.max()) + 1, ids.shape, generator=generator, device="cpu").to(ids.device)
        labels[0, :PADDED], labels[1, -PADDED:] = -100, -100
        self.labels = labels
        hidden = self.output[0]
        self.hidden = torch.randn(hidden.shape, generator=generator, device="cpu").to(hidden.device)
        within = {name for name, _ in head.get_submodule(base).named_parameters(f"{base}")}
        own = {name: p for name, p in head.named_parameters() if name not in within}
        plain = all(p.is_floating_point() and type(p.data) is torch.Tensor for p in own.values())
        small = sum(p.numel() for p in own.values()) <= LARGEST
        dtype = torch.float32 if plain and small else hidden.dtype
        self.share = SHARE if dtype == torch.float32 else ROUNDED
        self.hidden = self.hidden.to(dtype)
        self.weights = {n: p.detach().to(dtype).requires_grad_(p.requires_grad) for n, p in own.items() if plain}

    def arguments(self, optional: tuple[str, ...]) -> dict[str, Any] | None:
        """A call with these optional arguments and no others; None where the graph is not for such calls."""
        takes_more = any(p.kind is p.VAR_KEYWORD for p in self.accepted.values())
        values = {**self.inputs, "num_items_in_batch": torch.tensor(7, device=self.labels.device)}
        if any(name not in values or not (takes_more or name in self.accepted) for name in optional):
            return None
        given = {"input_ids": self.inputs["input_ids"], "labels": self.labels, **{n: values[n] for n in optional}}
        fits = all((name in given) == wanted for name, wanted in self.segmented.presence.items())
        return given if fits else None

    def fault(self, graph: fx.Graph, functions: dict[str, fx.Graph]) -> str:
        """How the segmented head differs, in words; empty where it does not."""
        hidden = self.hidden.clone().requires_grad_()
        with quiet(self.head, hidden.dtype == torch.float32), self._decoder_replaced(hidden):
            return with_weights(self.head, self.weights, lambda: self._differs(graph, functions, hidden))

    # Inside, the head's own modules hold the swapped weights.

    def _differs(self, graph: fx.Graph, functions: dict[str, fx.Graph], hidden: torch.Tensor) -> str:
        module = graph_module(self.head, graph, functions)
        sliced = self.segmented.slices_itself or "logits_to_keep" not in self.accepted
        every = {} if sliced else {"logits_to_keep": slice(0, None)}
        for optional in ((), *((name,) for name in OPTIONAL)):
            given = self.arguments(optional)
            if given is None:
                continue
            words = f"with {optional[0]} it" if optional else "it"
            try:
                expected = self.run(functools.partial(type(self.head).forward, self.head), given, hidden)
            except Exception:
                # Not a call that the original takes.
                continue
            try:
                found = self.run(module, {**given, **every}, hidden)
            except Exception as error:
                return f"{words} fails on a probe: {in_a_line(error)}"
            for one, other in zip(expected, found, strict=True):
                gap = float((one - other).abs().max()) / (float(one.abs().max()) or 1.0)
                if not gap <= self.share:
                    return f"{words} would change the loss or its gradients, on a probe by {gap:.2g} of the largest"
        return ""

    def run(self, forward: Callable[..., Any], given: Mapping[str, Any], hidden: torch.Tensor) -> list[torch.Tensor]:
        """[loss, gradient of the hidden states, gradients of the head's trainable weights]."""
        weights = [weight for weight in self.weights.values() if weight.requires_grad]
        with torch.enable_grad():
            loss = forward(**given).loss
            gradients = torch.autograd.grad(loss, [hidden, *weights], allow_unused=True)
        zero = hidden.new_zeros(())
        return [loss.detach(), *(zero if gradient is None else gradient for gradient in gradients)]

    @contextmanager
    def _decoder_replaced(self, hidden: torch.Tensor) -> Iterator[None]:
        path, _, name = self.base.rpartition(".")
        parent = self.head.get_submodule(path)
        decoder = parent._modules[name]
        output = self.output
        fields = {**output, next(iter(output)): hidden} if isinstance(output, Mapping) else None
        parent._modules[name] = _Returns((hidden, *output[1:]) if fields is None else type(output)(**fields))
        try:
            yield
        finally:
            parent._modules[name] = decoder


class _Returns(nn.Module):
    """In the place of the decoder: the hidden states that were made up."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same for any call."""
        return self.output
