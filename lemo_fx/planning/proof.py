"""Prove a rewrite by running it: each distinct rewritten layer beside the original on a small probe.

What the analysis concludes from a graph may be wrong: an attention that counts its own rows, an argument whose absence
changes what is computed. So the model runs once on a few tokens, what its layers are handed is recorded, and then, for
each distinct layer, without touching the model:

- every token kept: values and gradients are the original layer's (`skip`, `stand_in`);
- some tokens kept, others at each site: values and gradients are those of the original graph with attention masked to
  the kept keys and the branch zeroed at dropped tokens. For `exact` the values are the original layer's everywhere, and
  the gradients those of the masked graph.
Both with padding, and without (values alone), where layers are often handed no mask.

The expected values come from the captured graph run node by node (`graph.oracle`) under transformers' eager attention,
with explicit masks; no pass, kernel or generated code takes part. Not proven: the rounding of float8, other recompute
policies, what a compiler makes of a graph, layers that FSDP2 has sharded. Quantised weights are proven within their
rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.distributed.fsdp import FSDPModule

from lemo_fx.errors import LemoError
from lemo_fx.graph.anatomy import config_in_words, implementation_of
from lemo_fx.graph.oracle import Untouched
from lemo_fx.graph.probe import Probe, record
from lemo_fx.graph.watch import Watched, watch
from lemo_fx.passes.rewrite import LayerRewrite
from lemo_fx.planning.trial import Fault, OriginalFails, Trial


class Proofs:
    """The proofs of one model's layers. The model runs when the first layer is met that is like none proven before.

    Args:
        layers: all its decoder layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.model, self.layers = model, layers
        self.probes: list[Probe] | None = None
        self._watched: tuple[nn.Module, Watched] | None = None
        self.obstacle = ""
        if any(isinstance(layer, FSDPModule) for layer in layers):
            self.obstacle = "its layers are sharded; transform before fully_shard to have them proven"
        self.key = (type(model), config_in_words(getattr(model, "config", None)))

    def fault(self, rewrite: LayerRewrite, captured: Untouched) -> Fault | None:
        """As `prove`; None, too, where it cannot be proven (`obstacle` says why)."""
        probes = self._recorded(rewrite.layer)
        if not probes:
            return None
        key = (*self.key, *signature(rewrite))
        if key not in _known:
            try:
                _known[key] = prove(rewrite, captured, probes)
            except OriginalFails as error:
                self.obstacle = f"a layer does not run by itself: {error}"
                return None
        return _known[key]

    def usual(self, layer: nn.Module) -> Mapping[str, Any]:
        """The arguments by name of a layer's call without padding; empty where the model cannot be run."""
        probes = self._recorded(layer)
        return probes[-1].calls[layer] if probes else {}

    def watched(self, layer: nn.Module) -> Watched:
        """What the modules of a layer do in a call without padding."""
        if self._watched is None or self._watched[0] is not layer:
            self._watched = layer, watch(layer, self.usual(layer))
        return self._watched[1]

    def _recorded(self, layer: nn.Module) -> Sequence[Probe]:
        """What the model hands its layers, this one among them; nothing where there is an obstacle."""
        if self.probes is None and not self.obstacle:
            try:
                self.probes = record(self.model, self.layers)
            except LemoError as error:
                self.obstacle = f"it does not run on plain token ids: {error}"
        if self.obstacle or self.probes is None:
            return ()
        if not all(layer in calls for probe in self.probes for calls in (probe.calls, probe.explicit)):
            self.obstacle = "some layers are not called in a forward pass of plain token ids"
            return ()
        return self.probes


_known: dict[tuple[Any, ...], Fault | None] = {}
"""What was proven in this process: models of one kind need it once."""


def signature(rewrite: LayerRewrite) -> tuple[Any, ...]:
    """Equal for layers of which one proof is enough: the same code on modules of like kinds, settings and shapes."""
    graphs = [rewrite.graph, *rewrite.functions.values()]
    called = [n.target for graph in graphs for n in graph.nodes if n.op == "call_function"]
    modules = [
        (name, type(m), type(m).forward, vars(m).get("forward"), _settings(m))
        for name, m in rewrite.layer.named_modules()
    ]
    weights = [
        (name, type(p.data), p.shape, p.dtype, p.device.type, p.requires_grad)
        for name, p in rewrite.layer.named_parameters()
    ]
    parts = [(name, type(part), getattr(part, "note", "")) for name, part in rewrite.modules.items()]
    presence = tuple(rewrite.presence.items())
    return (presence, *(str(graph) for graph in graphs), *called, *modules, *weights, *parts)


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """What a module's numbers, switches and words are, but for its place in the model."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | bool | None)}
    places = ("layer_idx", "layer_index", "layer_id")
    return (implementation_of(module), *sorted((k, repr(v)) for k, v in plain.items() if k not in places))


def prove(rewrite: LayerRewrite, captured: Untouched, probes: Sequence[Probe]) -> Fault | None:
    """Run a rewritten layer beside the original; None where they agree.

    Args:
        rewrite: of a layer, after all passes.
        captured: the graph of that layer's forward before any pass, its sites in the order of `rewrite.sites`.
    """
    built: list[fx.GraphModule] = []
    for probe in probes:
        call = probe.calls[rewrite.layer]
        if any((call.get(name) is not None) != given for name, given in rewrite.presence.items()):
            continue
        # Kernels for half precision refuse float32, and some have no backward (flex_attention on the CPU).
        for float32, gradients in itertools.product((True, False), (True, False) if probe.padded else (False,)):
            try:
                fault = Trial(rewrite, captured, probe, float32, gradients, built).run()
                break
            except OriginalFails as error:
                reason = error
        else:
            raise reason
        if fault is not None:
            return fault
    return None
