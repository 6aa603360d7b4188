"""One sequence over several ranks: each holds a part of the tokens, and attention swaps tokens for heads (Ulysses,
arXiv 2309.14509).

Outside attention a rank's layers see their part [B, L, H] alone. Around the attention kernel an all-to-all gives every
rank all tokens of some heads, and another one brings the result back. Kept rows travel the same way: every rank keeps
as many blocks of its part as the others, so that shapes are equal, and kept queries among kept keys stay in causal
order. What attention must know of the whole sequence comes as the call's `attention_mask`, see `tell`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lemo_fx.errors import UnsupportedModelError
from lemo_fx.graph.anatomy import window_of
from lemo_fx.runtime.parts import SequenceGroup, is_told, process_group
from lemo_fx.runtime.twin import function_of, twin_of

EXCHANGE = "lemo_fx_exchange"
"""Name in transformers' registry of the attention that swaps tokens for heads."""

IMPLEMENTATIONS = ("sdpa", "eager")
"""What may compute the attention between the two exchanges."""

LAYER_TYPES = ("full_attention", "sliding_attention")
"""Transformers' kinds of attention whose masks are known here."""

CARRIED = frozenset({"position_ids", "shift_labels", "num_items_in_batch"})
"""Tensors of one entry a token, or none, that a model's call brings as far as its attention, which does not read them.
Any other may be one of an entry a head, of which a rank would need some."""


@torch.library.custom_op("lemo_fx::all_to_all", mutates_args=())
def all_to_all(parts: torch.Tensor, group: str) -> torch.Tensor:
    """[P, ...] of which entry r goes to rank r -> [P, ...] of which entry r came from rank r."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=process_group(group))
    return received


@all_to_all.register_fake
def _(parts, group):
    return torch.empty_like(parts, memory_format=torch.contiguous_format)


def _keep_group(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.group = inputs[1]


all_to_all.register_autograd(lambda ctx, gradient: (all_to_all(gradient, ctx.group), None), setup_context=_keep_group)


def to_heads(states: Sequence[torch.Tensor], group: SequenceGroup) -> Sequence[torch.Tensor]:
    """[B, heads, L, D] of a rank's tokens -> [B, heads / P, P L, D]: every token, the rank's share of the heads.

    Queries, keys and values travel together where they are of one width: exchanges that do not wait for one another
    might begin in another order on every rank.
    """
    if len({(one.shape[-1], one.dtype) for one in states}) > 1:
        return [shared for one in states for shared in to_heads([one], group)]
    # [P, B, L, heads / P, D]: with one sample, what arrives lies in the order of the sequence.
    shares = [one.unflatten(1, (group.size, -1)).permute(1, 0, 3, 2, 4) for one in states]
    received = all_to_all(torch.cat(shares, dim=3), group.name).transpose(0, 1).flatten(1, 2).transpose(1, 2)
    return received.split([share.shape[3] for share in shares], dim=1)


def to_tokens(states: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """[B, P L, heads / P, D] -> [B, L, heads, D]: `to_heads` undone, in the layout that attention functions return."""
    parts = states.unflatten(1, (group.size, -1)).transpose(0, 1)
    return all_to_all(parts, group.name).permute(1, 2, 0, 3, 4).flatten(2, 3)


def gather(tokens: torch.Tensor, length: int, group: SequenceGroup) -> torch.Tensor:
    """[B, K], each rank's tokens by their places in its part of L tokens -> [B, P K], by their places in the whole."""
    # What a rank adds must not make its program another: compiled, exchanges would begin in another order.
    first = torch.arange(group.size, device=tokens.device)[:, None, None] * length
    received = all_to_all(tokens.expand(group.size, *tokens.shape), group.name)
    return (received + first).transpose(0, 1).flatten(1)


def gather_tokens(values: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """[B, L], a value of each token of the rank's part -> [B, P L], of the whole sequence, on every rank.

    The gradient is the sum of all ranks', to be averaged over them, as `whole_loss`'s is.
    """
    if values.dtype == torch.bool:
        return gather_tokens(values.to(torch.uint8), group).bool()
    return all_to_all(values.expand(group.size, *values.shape), group.name).transpose(0, 1).flatten(1)


def own_mask(exchange: ExchangedAttention, mask: Any) -> Any:
    """What the choice of a rank's blocks reads in the place of a mask: [B, L] bool, or None without padding."""
    if not is_told(mask):
        return mask
    group = exchange.group
    return None if mask.shape[2] == 0 else mask[:, 0, 0].chunk(group.size, dim=1)[group.rank].bool()


Told = tuple[torch.Tensor | None, torch.Tensor | None]
"""What the exchanged attention knows of its rows: [B, P K] their places in the sequence, or None where they are all of
it; [B, P K] their documents, -1 of padding, or None where causal order is enough."""


def _with_some_heads(attention: nn.Module, group: SequenceGroup) -> dict[int, nn.Module]:
    groups: Any = getattr(attention, "num_key_value_groups", 1)
    made = {}
    for copies in range(1, group.size + 1):
        if group.size % copies == 0 and groups % copies == 0:
            made[copies] = copy.copy(attention)
            vars(made[copies])["num_key_value_groups"] = groups // copies
    return made


class ExchangedAttention(nn.Module):
    """An attention of a layer, computed between two exchanges.

    It runs a twin that shares all of the attention's submodules but dispatches to `_exchanged`; nothing of the model is
    modified. Called without being told of a whole sequence it computes what the attention does.

    Attributes:
        function: computes the attention between the two exchanges.
        window: tokens to which a sliding window looks back, its own included; None where there is none.
        additive: whether its mask is added to the scores, and has to be given.
        local: what the function takes for the attention, by how many copies there are of a head of keys and values.

    Raises:
        UnsupportedModelError: the attention cannot be shared out.
    """

    def __init__(self, attention: nn.Module, group: SequenceGroup) -> None:
        super().__init__()
        own: Any = attention.config
        implementation = own._attn_implementation
        if implementation not in IMPLEMENTATIONS:
            raise UnsupportedModelError(
                f"{type(attention).__name__} runs {implementation!r}: where ranks share a sequence, its attention is "
                "computed by attn_implementation='sdpa' or 'eager'"
            )
        self.group, self.function = group, function_of(attention)
        self.window, self.additive = window_of(attention), implementation == "eager"
        self.local = _with_some_heads(attention, group)
        # In what a proof is known by: another number of ranks may be one that cannot share the heads.
        self.note = f"of {group.size} ranks"
        # In tuples, so that neither is registered and its weights are not listed twice.
        self.original = (attention,)
        self.twin = (twin_of(attention, EXCHANGE, lemo_exchange=self, training=True),)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments of the attention module, and `lemo_told` from `told` -> what it returns."""
        return self.twin[0](*args, **kwargs)


def told(exchange: ExchangedAttention, mask: Any, tokens: torch.Tensor | None, length: int) -> Told | None:
    """What an exchanged attention must know of its rows; None in a call that was not told of a whole sequence.

    Args:
        tokens: [B, K] this rank's rows; None where they are all of its part.
        length: L.
    """
    if not is_told(mask):
        return None
    group = exchange.group
    documents = mask[:, 0, 1] if mask.shape[2] == 2 else None
    windowed = exchange.window is not None and length * group.size > exchange.window
    if documents is None and not windowed and not exchange.additive:
        return None, None
    if tokens is None:
        return torch.arange(length * group.size, device=mask.device)[None], documents
    places = gather(tokens, length, group)
    return places, None if documents is None else documents.expand(places.shape[0], -1).gather(1, places)


def mask_of(known: Told, window: int | None, query: torch.Tensor, additive: bool) -> torch.Tensor | None:
    """[1 or B, 1, rows, rows]: which row may attend to which; None for plain causal order.

    Args:
        window: tokens to which a sliding window looks back, its own included.
        additive: as numbers to be added to the scores, of the query's dtype, instead of bool.
    """
    places, documents = known
    if places is None:
        return None
    queries, keys = places[:, :, None], places[:, None, :]
    allowed = keys <= queries
    if window is not None:
        allowed &= keys > queries - window
    if documents is not None:
        # As by a mask of transformers: nobody looks at padding, which sees what is real before it.
        of_queries, of_keys = documents[:, :, None], documents[:, None, :]
        allowed = allowed & (of_keys >= 0) & ((of_queries == of_keys) | (of_queries < 0))
    if additive:
        allowed = torch.where(allowed, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    return allowed[:, None]


def _exchanged(module, query, key, value, attention_mask, scaling=None, dropout=0.0, lemo_told=None, **kwargs):
    """An attention function in transformers' registry: the layer's own, between two exchanges."""
    known: ExchangedAttention = module.lemo_exchange
    group, function = known.group, known.function
    dropout = dropout if known.original[0].training else 0.0
    unknown = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name not in CARRIED]
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} hands its attention function {', '.join(unknown)}, of which is not known what a "
            "rank with some of the heads needs"
        )
    heads = query.shape[1]
    if heads % group.size:
        raise UnsupportedModelError(
            f"{type(module).__name__} has {heads} heads, which {group.size} ranks cannot share: use a number of ranks "
            f"that divides {heads}"
        )
    if kwargs.get("sliding_window") not in (None, known.window):
        raise UnsupportedModelError(
            f"{type(module).__name__} attends within a window of {kwargs['sliding_window']} tokens, but says "
            f"{known.window} of itself"
        )
    # Where ranks outnumber the heads of keys and values, several get the same one.
    copies = group.size // math.gcd(group.size, key.shape[1])
    if copies not in known.local:
        raise UnsupportedModelError(
            f"{type(module).__name__} has {key.shape[1]} heads of keys for {heads} of queries, but does not say so "
            f"(num_key_value_groups): use a number of ranks that divides {key.shape[1]}"
        )
    if lemo_told is None:
        return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if copies > 1:
        key, value = (states.repeat_interleave(copies, dim=1) for states in (key, value))
    query, key, value = to_heads((query, key, value), group)
    mask = mask_of(lemo_told, known.window, query, known.additive)
    out, _ = function(known.local[copies], query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    return to_tokens(out, group), None


ALL_ATTENTION_FUNCTIONS.register(EXCHANGE, _exchanged)


class _WholeLoss(torch.autograd.Function):
    """The sum of all ranks' losses on every rank, whose gradient is to be averaged over them."""

    @staticmethod
    def forward(ctx: Any, share: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
        ctx.size = group.size
        total = share.detach().clone()
        dist.all_reduce(total, group=group.process_group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.size, None


def whole_loss(share: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """A rank's share of the loss [] -> the loss of the whole sequence on every rank.

    The gradient is P times that of the rank's share, so that its average over the ranks, as DDP and FSDP2 take it, is
    the whole loss's.
    """
    return _WholeLoss.apply(share, group)
