"""The modules that score the token blocks of a site: measured, predicted or random.

Like all modules that a rewritten layer carries, they hold per-layer settings and frozen weights as non-persistent
buffers, never parameters or linears, so that they move with the model, stay out of its state_dict, and no adapter takes
them for a target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lemo_fx.config import SiteKind
from lemo_fx.errors import CaptureError, LemoError
from lemo_fx.graph.capture import argument_names, build_module, by_name, capture, module_of, remove_dead_nodes
from lemo_fx.graph.left_out import matters_when_absent
from lemo_fx.graph.sites import holds_matrix
from lemo_fx.kernels.block_scores import reference as scoring
from lemo_fx.kernels.block_scores.op import block_scores, random_scores
from lemo_fx.runtime import kept, network
from lemo_fx.runtime.select import check_parts
from lemo_fx.runtime.step import Step
from lemo_fx.runtime.twin import twin_of

PROBE = "lemo_fx_probe"


def _probe(module: nn.Module, query, key, value, attention_mask, scaling=None, lemo_documents=None, **kwargs):
    """An attention function in transformers' registry that returns block scores where the weights would be."""
    scaling = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    scores = block_scores(query, key, attention_mask, lemo_documents, scaling, module.lemo_block_size)
    batch, heads, length, _ = query.shape
    return value.new_zeros(()).expand(batch, length, heads, value.shape[-1]), scores


ALL_ATTENTION_FUNCTIONS.register(PROBE, _probe)


def _without_dropout(module: nn.Module, *args: Any, run: Callable | None = None, **kwargs: Any) -> Any:
    """`module(...)`, or `run(module, ...)`, with its dropouts (an adapter's, say) off: scoring draws no random number.

    Compiled code keeps them on, since switching them is no part of a graph; a recompute is not affected either way.
    """
    dropouts = []
    if not torch.compiler.is_compiling():
        dropouts = [m for m in module.modules() if isinstance(m, nn.Dropout) and m.training and m.p > 0]
    for dropout in dropouts:
        dropout.training = False
    try:
        return module(*args, **kwargs) if run is None else run(module, *args, **kwargs)
    finally:
        for dropout in dropouts:
            dropout.training = True


class AttentionScore(nn.Module):
    """Block informativeness from the layer's own Q and K (LeMo section 4.1): projections, norms and RoPE included.

    Called exactly as the attention module is. It runs a twin that shares all of the attention's submodules but
    dispatches to `_probe`; nothing of the model is modified.
    """

    note = ""

    def __init__(self, attention: nn.Module, block_size: int) -> None:
        super().__init__()
        self.attention_config: Any = attention.config
        # In a tuple, so that the twin is not registered and its weights are not listed twice.
        self.twin = (twin_of(attention, PROBE, lemo_block_size=block_size, training=False),)
        self.names = argument_names(attention)
        self.block_size = block_size

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Arguments of the attention module -> scores [B, n]."""
        kwargs = by_name(self.names, args, kwargs)
        mask = kwargs.get("attention_mask")
        hidden = kwargs[self.names[0]]
        if isinstance(mask, torch.Tensor):
            kept.check_mask(mask, hidden.shape[1])
        if isinstance(mask, kept.BlockMask):
            kwargs["attention_mask"] = kept.square_mask(mask, hidden)
        elif not isinstance(mask, torch.Tensor) or mask.dim() != 4:
            kwargs["attention_mask"] = None
            documents = None
            if self.attention_config._attn_implementation not in kept.MASKED_IMPLEMENTATIONS:
                documents = kept.told_documents(hidden, kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q"))
            if mask is not None:
                zeros = torch.zeros_like(mask, dtype=torch.int64) if documents is None else documents
                documents = torch.where(mask.bool(), zeros, -1)
            kwargs["lemo_documents"] = documents
        scores = _without_dropout(self.twin[0], **kwargs)[1]
        if not isinstance(scores, torch.Tensor) or scores.dim() != 2:
            raise LemoError(
                f"{type(self.twin[0]).__name__} does not dispatch to transformers' attention interface with its "
                "present settings, so its Q and K cannot be measured; use score='random', or predictors"
            )
        return scores


class ActivationScore(nn.Module):
    """Block informativeness for an MLP from the activations that enter its down projection (LeMo section 4.1).

    Where the MLP has no single such activation (a mixture of experts, a forward that cannot be captured or has optional
    arguments that change it), the magnitude of its output stands in; `note` says so.
    """

    def __init__(self, mlp: nn.Module, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self.mlp = (mlp,)
        self.activation, self.note = _activation_of(mlp)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the MLP is called with, x [B, S, H] (or [B, S, F], of a bare down projection) -> scores [B, n]."""
        activation = _without_dropout(self.mlp[0], x, *args, run=self.activation, **kwargs)
        # Experts work on flat rows [B S, F].
        return scoring.activation_scores(activation.reshape(*x.shape[:2], -1), self.block_size)


def _activation_of(mlp: nn.Module) -> tuple[Callable[..., torch.Tensor], str]:
    if _is_projection(mlp):
        return _own_input, ""
    try:
        graph = capture(mlp)
    except CaptureError:
        graph = None
    # A graph is for calls with every argument, and this module may be called with fewer.
    if graph is None or matters_when_absent(mlp, graph) or (down := _down_projection(graph)) is None:
        return _output, "scored by the magnitude of its output: it has no single intermediate activation"
    graph.output_node().args = (down.args[0],)
    remove_dead_nodes(graph)
    built = build_module(mlp, graph, "Activation")
    # One function per distinct code: a compiler guards on it, and layers of one kind must not look different.
    return _activations.setdefault((type(mlp), built.code), type(built).forward), ""


def _down_projection(graph: fx.Graph) -> fx.Node | None:
    """The one projection through which all that an MLP computes goes to its output; None where there is none."""
    projections = [n for n in graph.nodes if n.op == "call_module" and _is_projection(module_of(graph, n))]
    if not projections or not isinstance(projections[-1].args[0] if projections[-1].args else None, fx.Node):
        return None
    down = projections[-1]
    reached, waiting = {down}, [graph.output_node()]
    while waiting:
        node = waiting.pop()
        # Shapes are no way for values.
        if node in reached or node.target in (getattr, "size"):
            continue
        if node.op == "placeholder" or (node.op == "call_module" and holds_matrix(module_of(graph, node))):
            return None
        reached.add(node)
        waiting.extend(node.all_input_nodes)
    return down


def _is_projection(module: nn.Module) -> bool:
    """Whether a module is one weight matrix: a linear layer, plain, quantised or with adapters."""
    weight = getattr(module, "weight", None)
    return (isinstance(weight, torch.Tensor) and weight.dim() == 2) or hasattr(module, "in_features")


_activations: dict[tuple[type[nn.Module], str], Callable] = {}


def _own_input(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x


def _output(mlp: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    out = mlp(*args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def measured_score(mixer: nn.Module, kind: SiteKind, block_size: int) -> AttentionScore | ActivationScore:
    """The measured score of a site, by the kind of what it mixes or activates."""
    return (AttentionScore if kind == "attention" else ActivationScore)(mixer, block_size)


class Predictor(nn.Module):
    """The weights of one site's pattern predictor (LeMo section 4.2), see `lemo_fx.runtime.network`.

    Args:
        weights: by name; layers of one kind have equal shapes, hence one compilation.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self.names = tuple(weights)
        for name, value in weights.items():
            self.register_buffer(name, value, persistent=False)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """By name."""
        return {name: getattr(self, name) for name in self.names}

    @property
    def bytes(self) -> int:
        """Size of the weights."""
        return sum(weight.nbytes for weight in self.weights.values())


class PredictedScore(Predictor):
    """Block informativeness for an attention from a trained predictor."""

    def forward(
        self,
        stream: torch.Tensor,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        others: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """The residual stream [B, S, H] that the branch reads, and the layer's mask -> scores [B, n] float32.

        Args:
            position_ids, others: the layer's arguments of this name and its further keyword arguments, given where its
                attention learns of documents from them instead of from the mask.
        """
        stream = stream.detach()
        valid = kept.valid_tokens(attention_mask, stream)
        others = others or {}
        positions = others.get("position_ids") if position_ids is None else position_ids
        documents = None
        if positions is not None or others:
            documents = kept.told_documents(stream, positions, others.get("cu_seq_lens_q"))
        pairs = kept.block_pairs(attention_mask, documents, stream, self.block_size)
        # Half precision would tie scores that differ: a sum over query blocks needs more digits than its terms.
        with torch.autocast(stream.device.type, enabled=False):
            second = network.network(self.weights, stream)[1]
            return network.block_scores(self.weights, second, valid, self.block_size, pairs)


class Candidates(Predictor):
    """The few tokens of each block among which a trained predictor expects the largest MLP score.

    `ActivationScore` then measures those alone: the blocks' true scores wherever the winner is among them.
    """

    @property
    def count(self) -> int:
        """Candidates of a block, c."""
        return network.candidate_count(self.block_size)

    def forward(self, stream: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        """The residual stream [B, S, H] that the branch reads, and the layer's mask -> tokens [B, n c], ascending."""
        stream = stream.detach()
        valid = kept.valid_tokens(attention_mask, stream)
        with torch.autocast(stream.device.type, enabled=False):
            return network.candidates(self.weights, stream, self.block_size, valid)


class RandomScore(nn.Module):
    """Uniform scores hashed from the layer's input: choosing costs nothing and reads no random state.

    Args:
        salt: identifies the site.
        parts, first: of the sequence that the input is, see `random_scores`.
    """

    def __init__(self, salt: int, block_size: int, parts: int = 1, first: int = 0) -> None:
        super().__init__()
        self.block_size = block_size
        self.parts, self.first = parts, first
        self.register_buffer("salt", torch.tensor([salt], device="cpu"), persistent=False)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """[B, S, H] -> [B, n]."""
        check_parts(stream, self.parts, self.block_size)
        return random_scores(stream.detach(), self.salt, self.block_size, self.parts, self.first)


class StepScore(RandomScore):
    """Random scores that the first site of a step draws and all others take."""

    def __init__(self, block_size: int, step: Step, parts: int = 1, first: int = 0) -> None:
        super().__init__(0, block_size, parts, first)
        self.step = step

    def draw(self, stream: torch.Tensor) -> torch.Tensor:
        """[B, S, H] -> [B, n] of the step, drawn now if nothing of this shape was since it began."""
        scores = self.step.scores
        if scores is None or scores.shape != (stream.shape[0], -(-stream.shape[1] // self.block_size)):
            scores = self.step.scores = super().forward(stream)
        return scores

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """[B, S, H] -> [B, n], the same for all sites of the step."""
        # Branch on `drawn`, not on whether there are scores: Dynamo would guard on that, and compile the first layer
        # separately.
        drawn = self.step.scores if self.step.drawn else None
        return (self.draw(stream) if drawn is None else drawn).to(stream.device)
