"""Choosing blocks, and one choice per step: schema and fake of `lemo_fx::remember` and `lemo_fx::select_by_threshold`.

A choice made in a forward pass is remembered by site together with a digest of the layer's input. A recompute inside a
backward pass gets the choice of the nearest digest back and never ranks again: recomputed scores may differ in the last
bit, and a different choice under a fixed count would be silently wrong gradients. Addresses would not do: a recomputed
input may lie elsewhere, or where an earlier step's input lay.
"""

import itertools
import logging
import weakref
from collections import deque
from dataclasses import dataclass, field

import torch

from lemo_fx.errors import SelectionError
from lemo_fx.kernels.private import assert_on_device, in_backward, promise
from lemo_fx.kernels.select_blocks import reference

logger = logging.getLogger(__name__)

REMEMBERED = 64
"""Forward passes per site whose choice is remembered until their backward."""

NEAR = 0.05
"""Relative distance up to which two digests are taken for the same input, computed twice."""


@dataclass(frozen=True)
class Choice:
    """One remembered choice: kept blocks [B, n] int32, their number of tokens, and the digest [B, 16] of the input."""

    blocks: torch.Tensor
    length: int
    kept: int
    digest: torch.Tensor


@dataclass(eq=False)
class SiteRecord:
    """What the last forward passes through one site did. A copied site begins a record of its own.

    Attributes:
        site: [1] its number, by which the ops find it: on the CPU, where it is read without waiting for a device.
    """

    site: torch.Tensor = field(init=False)
    choices: deque[Choice] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    kept_tokens: int = 0
    total_tokens: int = 0
    nan_seen: torch.Tensor | None = None
    nan_warned: bool = False

    def __post_init__(self) -> None:
        number = next(_numbers)
        self.site = torch.tensor([number], device="cpu")
        _records[number] = self

    def __reduce__(self) -> tuple[type["SiteRecord"], tuple[()]]:
        return SiteRecord, ()


_numbers = itertools.count()
_records: weakref.WeakValueDictionary[int, SiteRecord] = weakref.WeakValueDictionary()
"""By number, for the ops, which are handed nothing but tensors; a record lives as long as the module that holds it."""


def _record_of(site: torch.Tensor) -> SiteRecord:
    # As a list, since asking a tensor for its only number counts as waiting for a device.
    record = _records.get(site.tolist()[0])
    if record is None:
        raise SelectionError("a backward needs the choice of a layer that is rewritten no more: revert between steps")
    return record


def _digest(stream: torch.Tensor) -> torch.Tensor:
    """[B, S, H] -> [B, 16]: tells one layer input from another, if only by a token or by their order.

    The embeddings of two answers to one question may differ in no more.
    """
    length = stream.shape[1]
    weights = 0.5 + torch.arange(length, device=stream.device)[:, None] / length
    return (stream.detach()[..., :16].float() * weights).mean(1)


def _remember(
    record: SiteRecord, tokens: torch.Tensor, digest: torch.Tensor, length: int, block_size: int
) -> torch.Tensor:
    blocks = (tokens[:, ::block_size] // block_size).int()
    record.choices.append(Choice(blocks, length, tokens.shape[1], digest))
    record.kept_tokens, record.total_tokens = tokens.shape[1], length
    return tokens


def _recall(record: SiteRecord, digest: torch.Tensor, length: int, block_size: int) -> torch.Tensor:
    """The tokens that the forward pass of this input chose; the latest such pass, without a host synchronisation."""
    known = [c for c in record.choices if c.length == length and c.digest.shape == digest.shape]
    # A model may have moved since.
    known = [c for c in known if c.digest.device == digest.device]
    if not known:
        raise SelectionError(_FORGOTTEN)
    digests = torch.stack([c.digest for c in known])
    # NaN and infinities (a diverging model) must not turn into a missing choice, nor hide which choice it was.
    same = (digests == digest) | (digests.isnan() & digest.isnan())
    distance = torch.where(same, 0.0, (digests - digest).abs()).mean((1, 2))
    near = ~(distance > NEAR * digest.abs().mean() + torch.finfo(torch.float32).tiny)
    distance = distance.nan_to_num(nan=torch.inf)
    latest = torch.arange(len(known), device=digest.device)
    best = torch.where(distance == distance.min(), latest, -1).max()
    if len({c.kept for c in known}) == 1 and digest.device.type != "cpu":
        assert_on_device(near[best], _FORGOTTEN)
        blocks, kept = torch.stack([c.blocks for c in known]).index_select(0, best[None])[0], known[0].kept
    else:
        # Counts that differ, of a threshold, are read on the host.
        found = int(torch.where(near[best], best, -1))
        if found < 0:
            raise SelectionError(_FORGOTTEN)
        blocks, kept = known[found].blocks, known[found].kept
    tokens = blocks.long()[:, :, None] * block_size + torch.arange(block_size, device=blocks.device)
    return tokens.flatten(1)[:, :kept].contiguous()


_FORGOTTEN = (
    "a recompute asks for a choice of blocks that its forward pass did not record; more than "
    f"{REMEMBERED} forward passes of one layer may be waiting for their backward"
)


def _note_nan(record: SiteRecord, nan: torch.Tensor) -> None:
    """On the CPU warn at once; on an accelerator only mark, since looking would synchronise (`report` looks)."""
    if record.nan_warned:
        return
    record.nan_seen = nan
    if nan.device.type == "cpu" and bool(nan):
        record.nan_warned = True
        logger.warning("NaN among the block scores of a site: the blocks concerned are kept. Is the model diverging?")


# What is written down in Python would not be written down when a CUDA graph is replayed.
@torch.library.custom_op("lemo_fx::remember", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def remember(
    tokens: torch.Tensor, digest: torch.Tensor, nan: torch.Tensor, site: torch.Tensor, length: int, block_size: int
) -> torch.Tensor:
    """A forward's choice [B, K] as it was given; in a recompute, what the forward of this input was given.

    Args:
        digest: [B, 16] of the layer's input; nan: [] bool, whether a score is NaN.
        site: of its `SiteRecord`.
        length: S.
    """
    record = _record_of(site)
    if in_backward():
        return _recall(record, digest, length, block_size)
    # A compiler may use the memory of what it passes here again.
    _note_nan(record, nan.clone())
    return _remember(record, tokens.clone(), digest.clone(), length, block_size)


@remember.register_fake
def _(tokens, digest, nan, site, length, block_size):
    return torch.empty_like(tokens)


def select_blocks(
    scores: torch.Tensor,
    valid: torch.Tensor | None,
    labelled: torch.Tensor | None,
    stream: torch.Tensor,
    site: torch.Tensor,
    block_size: int,
    keep: tuple[int, int],
    parts: int = 1,
) -> torch.Tensor:
    """Tokens kept under a fixed budget, see `reference.select_blocks`; the same again in a recompute.

    Plain torch but for the memory: some fifty small kernels, which a compiler makes a few.

    Args:
        stream: [B, S, H] the layer's input; gives the length, and is told from other inputs by a digest.
        site: of its `SiteRecord`.
    """
    length = stream.shape[1]
    tokens = reference.select_blocks(scores, valid, labelled, length, block_size, keep, parts)
    return remember(tokens, _digest(stream), scores.isnan().any(), site, length, block_size)


@torch.library.custom_op("lemo_fx::select_by_threshold", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def select_by_threshold(
    scores: torch.Tensor,
    valid: torch.Tensor | None,
    labelled: torch.Tensor | None,
    stream: torch.Tensor,
    site: torch.Tensor,
    block_size: int,
    threshold: torch.Tensor,
) -> torch.Tensor:
    """Tokens of every block that reaches a threshold [], see `reference.select_by_threshold`.

    The count depends on the data: a compiler leaves that size open, so one compilation does for every count.
    """
    record, length, digest = _record_of(site), stream.shape[1], _digest(stream)
    if in_backward():
        return _recall(record, digest, length, block_size)
    _note_nan(record, scores.isnan().any())
    tokens = reference.select_by_threshold(scores, valid, labelled, length, block_size, threshold)
    return _remember(record, tokens, digest, length, block_size)


@select_by_threshold.register_fake
def _(scores, valid, labelled, stream, site, block_size, threshold):
    # More than one, or a compiler could not tell a kept sequence from the single token of a decoding step.
    kept = torch.library.get_ctx().new_dynamic_size(min=2)
    promise(kept <= stream.shape[1])
    return scores.new_empty(scores.shape[0], kept, dtype=torch.int64)
