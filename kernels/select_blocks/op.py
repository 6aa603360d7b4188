"""The ops that choose blocks: schema, fake, and one choice per step.

A choice made in a forward pass is remembered by site together with a digest of the layer's input. A recompute inside a
backward pass gets the choice of the nearest digest back and never ranks again: recomputed scores may differ in the last
bit, and a different choice under a fixed count would be silently wrong gradients. Addresses would not do: a recomputed
input may lie elsewhere, or where an earlier step's input lay.
"""

import logging
from collections import deque
from dataclasses import dataclass, field

import torch

from lemo_fx.errors import SelectionError
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


@dataclass
class SiteRecord:
    """What the last forward passes through one site did."""

    choices: deque[Choice] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    kept_tokens: int = 0
    total_tokens: int = 0
    nan_seen: torch.Tensor | None = None
    nan_warned: bool = False


_records: dict[int, SiteRecord] = {}


def record_of(site: torch.Tensor) -> SiteRecord:
    """The record of the site whose identity tensor this is."""
    return _records.setdefault(site.data_ptr(), SiteRecord())


def forget(site: torch.Tensor) -> None:
    """Drop a site's record."""
    _records.pop(site.data_ptr(), None)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _choose(make, scores, stream, site, block_size) -> torch.Tensor:
    record, length = record_of(site), stream.shape[1]
    digest = stream.detach()[:, ::block_size, :16].float().mean(1)
    if _in_backward():
        return _recall(record, digest, length, block_size)
    _note_nan(record, scores)
    tokens = make()
    blocks = (tokens[:, ::block_size] // block_size).int()
    record.choices.append(Choice(blocks, length, tokens.shape[1], digest))
    record.kept_tokens, record.total_tokens = tokens.shape[1], length
    return tokens


def _recall(record: SiteRecord, digest: torch.Tensor, length: int, block_size: int) -> torch.Tensor:
    """The tokens that the forward pass of this input chose; the latest such pass, without a host synchronisation."""
    known = [c for c in record.choices if c.length == length and c.digest.shape == digest.shape]
    if not known:
        raise SelectionError(_FORGOTTEN)
    digests = torch.stack([c.digest for c in known])
    # NaN and infinities (a diverging model) must not turn into a missing choice.
    distance = (digests - digest).abs().mean((1, 2)).nan_to_num(nan=0.0)
    near = ~(distance > NEAR * digest.abs().mean() + torch.finfo(torch.float32).tiny)
    latest = torch.arange(len(known), device=digest.device)
    best = torch.where(distance == distance.min(), latest, -1).max()
    if len({c.kept for c in known}) == 1 and digest.device.type != "cpu":
        torch._assert_async(near[best], _FORGOTTEN)
        blocks, kept = torch.stack([c.blocks for c in known]).index_select(0, best[None])[0], known[0].kept
    elif bool(near[best]):
        blocks, kept = known[int(best)].blocks, known[int(best)].kept
    else:
        raise SelectionError(_FORGOTTEN)
    tokens = blocks.long()[:, :, None] * block_size + torch.arange(block_size, device=blocks.device)
    return tokens.flatten(1)[:, :kept].contiguous()


_FORGOTTEN = (
    "a recompute asks for a choice of blocks that its forward pass did not record; more than "
    f"{REMEMBERED} forward passes of one layer may be waiting for their backward"
)


def _note_nan(record: SiteRecord, scores: torch.Tensor) -> None:
    """On the CPU warn at once; on an accelerator only mark, since looking would synchronise (`report` looks)."""
    if record.nan_warned:
        return
    record.nan_seen = scores.isnan().any()
    if scores.device.type == "cpu" and bool(record.nan_seen):
        record.nan_warned = True
        logger.warning("NaN among the block scores of a site: the blocks concerned are kept. Is the model diverging?")


@torch.library.custom_op("lemo_fx::select_blocks", mutates_args=())
def select_blocks(
    scores: torch.Tensor,
    valid: torch.Tensor | None,
    labelled: torch.Tensor | None,
    stream: torch.Tensor,
    site: torch.Tensor,
    block_size: int,
    keep_numerator: int,
    keep_denominator: int,
) -> torch.Tensor:
    """Tokens kept under a fixed budget, see `reference.select_blocks`.

    Args:
        stream: [B, S, H] the layer's input; gives the length, and is told from other inputs by a digest.
        site: [1] the site's identity tensor.
    """
    length = stream.shape[1]

    def make() -> torch.Tensor:
        keep = (keep_numerator, keep_denominator)
        return reference.select_blocks(scores, valid, labelled, length, block_size, keep)

    return _choose(make, scores, stream, site, block_size)


@select_blocks.register_fake
def _(scores, valid, labelled, stream, site, block_size, keep_numerator, keep_denominator):
    blocks, length = scores.shape[1], stream.shape[1]
    count = torch.sym_min(
        torch.sym_max((blocks * keep_numerator + keep_denominator - 1) // keep_denominator, 2), blocks
    )
    kept = count * block_size - (blocks * block_size - length)
    return scores.new_empty(scores.shape[0], kept, dtype=torch.int64)


@torch.library.custom_op("lemo_fx::select_by_threshold", mutates_args=())
def select_by_threshold(
    scores: torch.Tensor,
    valid: torch.Tensor | None,
    labelled: torch.Tensor | None,
    stream: torch.Tensor,
    site: torch.Tensor,
    block_size: int,
    threshold: float,
) -> torch.Tensor:
    """Tokens of every block over a threshold, see `reference.select_by_threshold`; the count depends on the data."""
    length = stream.shape[1]

    def make() -> torch.Tensor:
        return reference.select_by_threshold(scores, valid, labelled, length, block_size, threshold)

    return _choose(make, scores, stream, site, block_size)


@select_by_threshold.register_fake
def _(scores, valid, labelled, stream, site, block_size, threshold):
    kept = torch.library.get_ctx().new_dynamic_size()
    return scores.new_empty(scores.shape[0], kept, dtype=torch.int64)
