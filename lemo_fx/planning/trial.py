"""One proof of one layer: the runs of the rewritten and of the original layer that are compared, and how."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lemo_fx.errors import LemoError
from lemo_fx.graph.capture import graph_module
from lemo_fx.graph.oracle import Changes, Oracle, Untouched
from lemo_fx.graph.probe import BATCH, DOCUMENT, LENGTH, PADDED, Probe, eager, in_a_line, quiet, with_weights
from lemo_fx.kernels.private import tree_leaves, tree_map
from lemo_fx.passes.rewrite import LayerRewrite, site_and_role
from lemo_fx.runtime.scores import RandomScore
from lemo_fx.runtime.select import SelectBlocks
from lemo_fx.runtime.stand_in import StandIn

KEPT = {"attention": 13, "mlp": 9}
"""Tokens that a site keeps, by its kind: different ones, so that sites cannot be mistaken for one another."""
LARGEST = 10**9
"""Parameters of a layer up to which it is proven in float32; larger ones in their own precision."""


FULL, ROUNDED = (2e-3, 1e-5), (6e-2, 2e-2)
"""How far two runs of one computation may be apart: a share of the largest expected value (of the update that a layer
makes; of each gradient), and of the largest gradient of all, for gradients that cancel to nearly nothing."""


@dataclass(frozen=True)
class Fault:
    """A rewritten layer that does not compute what it should.

    Attributes:
        site: at which it shows, by name; None where it is the layer as a whole.
        what: how, in words.
    """

    site: str | None
    what: str


class OriginalFails(LemoError):
    """The original layer itself cannot be run on a probe: nothing can be said of the rewritten one."""


class Trial:
    """One layer's proof: its weights in float32 for the time of it, its inputs, and the runs that are compared."""

    def __init__(
        self,
        rewrite: LayerRewrite,
        captured: Untouched,
        probe: Probe,
        float32: bool,
        gradients: bool,
        built: list[fx.GraphModule],
    ) -> None:
        self.built = built
        self.rewrite, self.captured = rewrite, captured
        layer = rewrite.layer
        plain = all(
            p.is_floating_point() and p.itemsize > 1 and type(p.data) is torch.Tensor for p in layer.parameters()
        )
        self.float32 = float32 and plain and sum(p.numel() for p in layer.parameters()) <= LARGEST
        self.share, self.floor = FULL if self.float32 else ROUNDED
        self.given, explicit = self._cast(probe.calls[layer]), self._cast(probe.explicit[layer])
        if probe.padded and all(_is_square(given.get("attention_mask")) for given in (self.given, explicit)):
            self.given, explicit = self._restricted(self.given), self._restricted(explicit)
        # Where no attention loses keys, the original's own implementation says what it computes.
        self.attends = any(s.treatment and s.site.kind == "attention" for s in rewrite.sites)
        self.explicit = explicit if self.attends else self.given
        self.entry = str(rewrite.entry.target)
        stream = self.given[self.entry]
        generator = torch.Generator().manual_seed(1)
        self.stream = torch.randn(stream.shape, generator=generator, device="cpu").to(stream.device, stream.dtype)
        self.cotangent = torch.randn(stream.shape, generator=generator, device="cpu").to(stream.device, stream.dtype)
        self.padded, self.gradients = probe.padded, gradients
        if probe.padded:
            self.cotangent[1, -PADDED:] = 0
        self.tokens: dict[str, torch.Tensor] = {}
        self.parameters: list[torch.Tensor] = []

    def _cast(self, value: Any) -> Any:
        def cast(leaf: Any) -> Any:
            half = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
            return leaf.float() if half and self.float32 else leaf

        return tree_map(cast, value) if not isinstance(value, Mapping) else {k: self._cast(v) for k, v in value.items()}

    @staticmethod
    def _restricted(given: dict[str, Any]) -> dict[str, Any]:
        """The square mask cut into two documents, so that kept tokens are not merely in causal order."""
        mask = given["attention_mask"]
        document = torch.arange(LENGTH, device=mask.device) >= DOCUMENT
        other = document[:, None] != document[None, :]
        lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return {**given, "attention_mask": mask.masked_fill(other, lowest)}

    def run(self) -> Fault | None:
        """The first fault; None where all runs agree."""
        layer = self.rewrite.layer
        swapped: dict[str, torch.Tensor] = {}
        for name, parameter in layer.named_parameters():
            if parameter.is_floating_point() and type(parameter.data) is torch.Tensor:
                value = parameter.detach().float() if self.float32 else parameter.detach()
                swapped[name] = value.requires_grad_(parameter.requires_grad)
        for name, buffer in layer.named_buffers():
            if self.float32 and buffer.is_floating_point():
                swapped[name] = buffer.float()
        self.parameters = [value for value in swapped.values() if value.requires_grad]
        with quiet(layer, self.float32):
            return with_weights(layer, swapped, self._compare)

    # Inside, the layer's own modules hold the swapped weights.

    def _compare(self) -> Fault | None:
        layer = self.rewrite.layer
        try:
            original = self._values_and_gradients(functools.partial(type(layer).forward, layer), self.given)
        except Exception as error:
            raise OriginalFails(in_a_line(error)) from error
        try:
            return self._rewritten_differs(original)
        except Exception as error:
            return Fault(None, f"on a probe of {LENGTH} tokens it fails: {in_a_line(error)}")

    def _rewritten_differs(self, original: Any) -> Fault | None:
        untouched = self._values_and_gradients(self._captured(Changes(self._masks({}))), self.explicit)
        fault = self._fault(None, original, untouched, "captured as a graph,")
        if fault is not None:
            return fault
        module = self._rewritten()
        treatments = {s.treatment for s in self.rewrite.sites}
        if "exact" not in treatments:
            self._keep({s.name: LENGTH for s in self.rewrite.sites})
            fault = self._fault(None, original, self._run(module, checkpointed=False), "with every token kept")
            if fault is not None or treatments == {None}:
                return fault
        fault = self._with_dropped(module, None, {s.name: KEPT[s.site.kind] for s in self.rewrite.sites})
        return self._located(module, fault) if fault else None

    def _with_dropped(self, module: nn.Module, site: str | None, counts: Mapping[str, int]) -> Fault | None:
        self._keep(counts)
        return self._fault(site, self._expected(), self._run(module, checkpointed=True), "with some tokens dropped")

    def _located(self, module: nn.Module, fault: Fault) -> Fault:
        """The fault of the first site that shows it while all others keep every token."""
        for planned in self.rewrite.sites:
            if not planned.treatment:
                continue
            counts = {s.name: LENGTH for s in self.rewrite.sites} | {planned.name: KEPT[planned.site.kind]}
            alone = self._with_dropped(module, planned.name, counts)
            if alone is not None:
                return alone
        return fault

    def _rewritten(self) -> fx.GraphModule:
        """The rewritten graph as a module, its selections replaced by fixed ones.

        Built once for all probes, unless it holds weights itself, which are others in every trial.
        """
        rewrite = self.rewrite
        if self.built:
            for part in self.built[0].modules():
                if isinstance(part, _Fixed):
                    part.trial = (self,)
            return self.built[0]
        parts: dict[str, nn.Module] = {}
        for name, part in rewrite.modules.items():
            if isinstance(part, SelectBlocks):
                parts[name] = _Fixed(self, site_and_role(name)[0])
            elif isinstance(part, RandomScore | StandIn):
                parts[name] = _Zeros()
            else:
                parts[name] = part.to(self.stream.device)
        values = {"training": False, "gradient_checkpointing": False, **parts}
        module = graph_module(rewrite.layer, rewrite.graph, rewrite.functions, values)
        outlined = [module.get_submodule(name) for name in rewrite.functions]
        for part in (module, *outlined):
            part.training = False
        if not any(part._parameters or part._buffers for part in (module, *outlined)):
            self.built.append(module)
        return module

    def _keep(self, counts: Mapping[str, int]) -> None:
        generator = torch.Generator().manual_seed(2)
        for name, count in counts.items():
            # No padding: an implementation may do what it likes with a query that sees no key.
            real = LENGTH if count == LENGTH else LENGTH - PADDED
            rows = [torch.randperm(real, generator=generator, device="cpu")[:count].sort().values for _ in range(BATCH)]
            self.tokens[name] = torch.stack(rows).to(self.stream.device)
        for planned in self.rewrite.sites:
            if planned.score == "shared":
                self.tokens[planned.name] = self.tokens["attention"]

    def _run(self, module: nn.Module, checkpointed: bool) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        module.gradient_checkpointing = checkpointed  # type: ignore[assignment]
        return self._values_and_gradients(module, self.given)

    def _values_and_gradients(
        self, forward: Callable[..., Any], given: Mapping[str, Any]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """(tensors that a layer returns; gradients of its stream and trainable weights, on the padded probe)."""
        stream = self.stream.clone().requires_grad_(self.gradients)
        with torch.set_grad_enabled(self.gradients):
            out = forward(**{**given, self.entry: stream})
            values = [v for v in tree_leaves(out) if isinstance(v, torch.Tensor) and v.is_floating_point()]
            if not self.gradients:
                return values, []
            total = sum((v * self.cotangent).sum() for v in values if v.shape == self.cotangent.shape)
        gradients = torch.autograd.grad(total, [stream, *self.parameters], allow_unused=True)  # type: ignore[arg-type]
        return [v.detach() for v in values], list(gradients)

    def _expected(self) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """What the captured graph computes with attention masked to kept keys, and the branches' dropped rows zeroed.

        For `exact`, values are those of the branch on every token, and only the gradient is that. With every key,
        attention is not masked, and its gradient leaves by its input at kept tokens.
        """
        pairs = list(zip(self.captured.sites, self.rewrite.sites, strict=True))
        planned = {site.branch: s for site, s in pairs if s.treatment}
        keys = {site.branch: self._kept(s.name) for site, s in pairs if s.treatment}
        whole: dict[fx.Node, torch.Tensor] = {}

        def values_only(branch: fx.Node, value: torch.Tensor) -> torch.Tensor:
            if branch in planned and planned[branch].treatment != "exact":
                return torch.where(keys[branch][..., None], value, 0)
            whole[branch] = value
            return value

        def treat(branch: fx.Node, value: torch.Tensor) -> torch.Tensor:
            if branch not in planned:
                return value
            mask = keys[branch][..., None]
            if planned[branch].treatment == "exact":
                return whole[branch] + torch.where(mask, value - value.detach(), 0)
            return torch.where(mask, value, 0)

        with torch.no_grad():
            inexact = {branch: kept for branch, kept in keys.items() if planned[branch].treatment != "exact"}
            changes = Changes(self._masks(inexact), values_only)
            self._captured(changes)(**{**self.explicit, self.entry: self.stream})
        unmasked = {site.mixer: keys[site.branch] for site, s in pairs if s.every_key}
        masked = {site.branch: keys[site.branch] for site, s in pairs if s.treatment and not s.every_key}
        changes = Changes(self._masks(masked), treat, unmasked)
        return self._values_and_gradients(self._captured(changes), self.explicit)

    def _captured(self, changes: Changes) -> Callable[..., Any]:
        """The captured graph as a function of the layer's arguments by name."""
        layer = self.rewrite.layer

        def run(**given: Any) -> Any:
            with eager(layer) if self.attends else nullcontext():
                return Oracle(layer, self.captured, given, changes).run()

        return run

    def _kept(self, name: str) -> torch.Tensor:
        mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool, device=self.stream.device)
        return mask.scatter_(1, self.tokens[name], True)

    def _masks(self, keys: Mapping[fx.Node, torch.Tensor]) -> dict[fx.Node, torch.Tensor]:
        """The layer's explicit mask [B, 1, S, S], additive, by attention call: of all keys, or of a branch's [B, S]."""
        mask = self.explicit.get("attention_mask")
        lowest = torch.finfo(self.stream.dtype).min
        square = _is_square(mask)
        if not isinstance(mask, torch.Tensor) or not square:
            mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=self.stream.device).tril()
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, lowest).to(self.stream.dtype)
        every = torch.ones(BATCH, LENGTH, dtype=torch.bool, device=self.stream.device)
        return {
            site.mixer: mask.masked_fill(~keys.get(site.branch, every)[:, None, None, :], lowest)
            for site, planned in zip(self.captured.sites, self.rewrite.sites, strict=True)
            # A layer that the model hands no square mask may have an attention that takes none, as may one that is not
            # causal.
            if site.kind == "attention" and (planned.treatment or (square and self._is_causal(site.mixer)))
        }

    def _is_causal(self, mixer: fx.Node) -> bool:
        return bool(getattr(self.rewrite.layer.get_submodule(str(mixer.target)), "is_causal", False))

    def _fault(self, site: str | None, expected: Any, found: Any, words: str) -> Fault | None:
        (values, gradients), (other_values, other_gradients) = expected, found
        if [v.shape for v in values] != [v.shape for v in other_values]:
            return Fault(site, f"{words} it returns tensors of other shapes")
        for one, other in zip(values, other_values, strict=True):
            if self.padded and one.shape[:2] == (BATCH, LENGTH):
                # What becomes of padding does not matter, and differs between implementations.
                one[1, -PADDED:] = other[1, -PADDED:]
            base = self.stream if one.shape == self.stream.shape else torch.zeros_like(one)
            gap = float((one - other).abs().max()) / (float((one - base).abs().max()) or 1.0)
            if not gap <= self.share:
                return Fault(site, f"{words} its values are off by {gap:.2g} of the largest update")
        if not gradients:
            return None
        zero = self.stream.new_zeros(())
        pairs = [
            (zero if one is None else one, zero if other is None else other)
            for one, other in zip(gradients, other_gradients, strict=True)
        ]
        largest = max(float(one.abs().max()) for one, _ in pairs)
        for one, other in pairs:
            size, gap = float(one.abs().max()), float((one - other).abs().max())
            if not gap <= self.share * size + self.floor * largest:
                return Fault(
                    site, f"{words} its gradients are off by {gap / (size or largest or 1.0):.2g} of the largest"
                )
        return None


def _is_square(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and mask.dim() == 4


class _Fixed(nn.Module):
    """In the place of a selection: the tokens that the trial has chosen for a site."""

    def __init__(self, trial: Trial, site: str) -> None:
        super().__init__()
        self.trial = (trial,)
        self.site = site

    def forward(self, scores: torch.Tensor, stream: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        """Tokens [B, K]."""
        return self.trial[0].tokens[self.site]


class _Zeros(nn.Module):
    """In the place of random scores, which no selection reads here, and of a stand-in, as under `skip`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zeros like x."""
        return torch.zeros_like(x)
