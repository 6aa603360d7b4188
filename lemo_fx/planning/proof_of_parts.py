"""Prove that a model can be called with parts of a sequence: what surrounds its layers does the same to a part alone.

The model runs once on a few tokens of two documents, once on a padded batch, and on the parts of both, with layers that
only note what they are handed. The streams and position embeddings of the parts must be those of the whole, what tells
a part of the whole (`runtime.sequence.tell`) must reach every layer, the masks made of that must be the model's, and
the parts' losses must add up. No ranks and no exchange take part; what is computed within the layers is proven by
`lemo_fx.proof`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lemo_fx.graph.anatomy import Anatomy, is_softmax_attention, longest_context, text_config, window_of
from lemo_fx.graph.capture import argument_names, by_name
from lemo_fx.graph.probe import FAR, eager, in_a_line, quiet, rope_kept
from lemo_fx.kernels.block_scores.reference import allows
from lemo_fx.kernels.private import tree_leaves
from lemo_fx.runtime.parts import SequenceGroup, is_told, shard
from lemo_fx.runtime.sequence import mask_of

TOKENS = 12
"""Of a part of the probe."""
NEAR = 1e-3
"""Relative distance of two computations of the same."""

Calls = list[dict[str, Any]]


def prove_parts(anatomy: Anatomy, size: int) -> str:
    """Why so many ranks cannot share a model's sequences, in words; empty where they can."""
    runner, layers = anatomy.head, [layer for _, layer in anatomy.layers]
    assert runner is not None
    for batch in probes(runner, size):
        try:
            with quiet(runner), eager(runner), torch.no_grad(), rope_kept(runner):
                whole, loss = _noted(runner, layers, {**batch, "use_cache": False})
                groups = [SequenceGroup("", rank, size) for rank in range(size)]
                parts = [shard(batch, group, size) for group in groups]
                calls = [_noted(runner, layers, part) for part in parts]
        except Exception as error:
            return f"it does not run on parts of a sequence: {in_a_line(error)}"
        found = _differs(layers, whole, [call for call, _ in calls], parts)
        total = sum(share for _, share in calls)
        if not found and not abs(total - loss) <= NEAR * abs(loss):
            found = f"the parts' losses add up to {total:.4f}, and the whole sequence's is {loss:.4f}"
        if found:
            return found
    return ""


def probes(runner: nn.Module, size: int) -> list[dict[str, torch.Tensor]]:
    """Two batches [2, S]: two documents, one at the begin of the positions and one at the end; padding at the end."""
    config: Any = runner.config
    device = next(p.device for p in runner.parameters())
    length = TOKENS * size
    ids = torch.randint(
        0, text_config(config).vocab_size, (2, length), generator=torch.Generator().manual_seed(0), device="cpu"
    )
    longest = max(longest_context(config) or FAR, length)
    near = torch.arange(TOKENS, device="cpu")
    far = torch.arange(longest - (length - TOKENS), longest, device="cpu")
    padded = torch.ones_like(ids)
    padded[1, -TOKENS // 2 :] = 0
    labels = ids.masked_fill(padded == 0, -100)
    batches = [
        {"input_ids": ids, "labels": ids, "position_ids": torch.cat([near, far])[None]},
        {"input_ids": ids, "labels": labels, "attention_mask": padded},
    ]
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]


@contextmanager
def _noting(layers: Sequence[nn.Module], calls: Calls) -> Iterator[None]:
    """Layers that hand their stream on and note the arguments of their call, by name."""
    names = [argument_names(layer) for layer in layers]
    own = [vars(layer).get("forward") for layer in layers]

    def note(number: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            given = by_name(names[number], args, kwargs)
            calls.append(given)
            return given[names[number][0]]

        return forward

    try:
        for number, layer in enumerate(layers):
            vars(layer)["forward"] = note(number)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            vars(layer).pop("forward")
            if forward is not None:
                vars(layer)["forward"] = forward


def _noted(runner: nn.Module, layers: Sequence[nn.Module], inputs: Mapping[str, Any]) -> tuple[Calls, float]:
    """(the layers' calls in their order, loss) of a forward."""
    calls: Calls = []
    with _noting(layers, calls):
        loss = runner(**inputs).loss
    return calls, float(loss)


def _differs(layers: Sequence[nn.Module], whole: Calls, parts: Sequence[Calls], batches: Sequence[dict]) -> str:
    """What a layer is handed for a part that it is not handed for the whole, in words; empty where nothing is."""
    length, told = batches[0]["input_ids"].shape[1], batches[0]["attention_mask"]
    for index, layer in enumerate(layers):
        for number, calls in enumerate(parts):
            mask = calls[index].get("attention_mask")
            if not (is_told(mask) and torch.equal(mask, told)):
                return f"layer {index} is not handed the attention_mask that the model was called with"
            here = slice(number * length, (number + 1) * length)
            for name in (argument_names(layer)[0], "position_embeddings", "position_ids"):
                one, other = (_tensors(call.get(name)) for call in (whole[index], calls[index]))
                if len(one) != len(other) or not all(map(_close, [value[:, here] for value in one], other)):
                    return f"{name} of layer {index} is another for a part than within the whole sequence"
        if not _same_mask(layer, whole[index].get("attention_mask"), told):
            return f"the mask of layer {index} is not one of causal order, documents, padding and a window"
    return ""


def _tensors(value: Any) -> list[torch.Tensor]:
    """Those of one entry a token, [1 or B, S, ...]."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor) and leaf.dim() > 1]


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    rows = max(len(one), len(other))
    one, other = (value.expand(rows, *value.shape[1:]) for value in (one, other))
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=NEAR, atol=NEAR)


def _same_mask(layer: nn.Module, mask: Any, told: torch.Tensor) -> bool:
    """Whether a layer's explicit mask [1 or B, 1, S, S] allows each token what `mask_of` allows it; padding aside."""
    if not (isinstance(mask, torch.Tensor) and mask.dim() == 4):
        return False
    documents = told[:, 0, 1] if told.shape[2] == 2 else None
    places = torch.arange(mask.shape[-1], device=mask.device)[None]
    windows = {window_of(module) for module in layer.modules() if is_softmax_attention(module)}
    expected = mask_of((places, documents), windows.pop() if windows else None, mask, additive=False)
    assert expected is not None
    real = told[:, 0, 0].bool() if told.shape[2] else torch.ones_like(places, dtype=torch.bool)
    return not bool(((allows(mask) != expected) & real[:, None, :, None]).any())
