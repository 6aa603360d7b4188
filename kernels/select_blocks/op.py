"""The ops that choose blocks: schema, fake, and one choice per step.

A choice made in a forward pass is remembered under (site, address of the layer's input). A recompute inside a backward
pass gets that choice back and never ranks again: recomputed scores may differ in the last bit, and a different choice
under a fixed count would be silently wrong gradients.
"""

import logging
from collections import OrderedDict
from dataclasses import dataclass, field

import torch

from lemo_fx.errors import SelectionError
from lemo_fx.kernels.select_blocks import reference

logger = logging.getLogger(__name__)

REMEMBERED = 64
"""Forward passes per site whose choice is remembered until their backward."""


@dataclass
class SiteRecord:
    """What the last forward passes through one site did."""

    choices: OrderedDict[int, torch.Tensor] = field(default_factory=OrderedDict)
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


def _choose(make, scores, stream, site, batch, length) -> torch.Tensor:
    record = record_of(site)
    if _in_backward():
        known = record.choices.get(stream.data_ptr())
        if known is None and len(record.choices) == 1:
            (known,) = record.choices.values()
        if known is None or known.shape[0] != batch or int(known[0, -1]) >= length:
            raise SelectionError(
                "a recompute asks for a choice of blocks that its forward pass did not record; more than "
                f"{REMEMBERED} forward passes of one layer may be waiting for their backward"
            )
        return known.clone()
    _note_nan(record, scores)
    tokens = make()
    record.choices[stream.data_ptr()] = tokens.clone()
    record.choices.move_to_end(stream.data_ptr())
    while len(record.choices) > REMEMBERED:
        record.choices.popitem(last=False)
    record.kept_tokens, record.total_tokens = tokens.shape[1], length
    return tokens


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
        stream: [B, S, H] the layer's input; only its shape and address are used.
        site: [1] the site's identity tensor.
    """
    length = stream.shape[1]

    def make() -> torch.Tensor:
        keep = (keep_numerator, keep_denominator)
        return reference.select_blocks(scores, valid, labelled, length, block_size, keep)

    return _choose(make, scores, stream, site, scores.shape[0], length)


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

    return _choose(make, scores, stream, site, scores.shape[0], length)


@select_by_threshold.register_fake
def _(scores, valid, labelled, stream, site, block_size, threshold):
    kept = torch.library.get_ctx().new_dynamic_size()
    return scores.new_empty(scores.shape[0], kept, dtype=torch.int64)
