"""The module that selects the kept tokens of a site, by budget or by threshold."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lemo_fx.errors import InputError
from lemo_fx.kernels.private import may_vary
from lemo_fx.kernels.select_blocks import reference as selection
from lemo_fx.kernels.select_blocks.op import SiteRecord, select_blocks, select_by_threshold
from lemo_fx.runtime.kept import labelled_tokens, valid_tokens
from lemo_fx.runtime.step import Step

SHARES = 2**20
"""Denominator of a budget; fine enough that rounding the share down leaves a whole number of blocks what it is."""


def check_parts(stream: torch.Tensor, parts: int, block_size: int) -> None:
    """Raise InputError unless the stream [B, S, H] is this many equal parts of whole blocks."""
    if parts > 1 and stream.shape[1] % (parts * block_size):
        raise InputError(
            f"a sequence of {stream.shape[1]} tokens is not {parts} parts of whole blocks of {block_size}: pad its end "
            f"to a multiple of {parts * block_size} (sequence_parts)"
        )


class SelectBlocks(nn.Module):
    """The tokens of a site's kept blocks, by budget or by threshold.

    Args:
        keep: as `set_keep`; a threshold is set afterwards.
        step: labels of the running step, whose blocks survive when they are few.
        balance: rank blocks within windows of the sequence, see `selection.balanced`.
        varies: whether other layers keep other shares, so that a compiler need not find out by compiling one of them.
        parts: of the stream, from each of which as many blocks are chosen, see `LemoConfig.sequence_parts`.

    Attributes:
        record: what the last forward passes did here.
    """

    budget: torch.Tensor
    threshold: torch.Tensor | None

    def __init__(
        self,
        block_size: int,
        keep: float,
        step: Step,
        balance: bool = False,
        varies: bool = False,
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.balance = balance
        self.varies = varies
        self.parts = parts
        self.set_keep(keep)
        self.threshold = None
        self.step = step
        self.record = SiteRecord()

    def forward(self, scores: torch.Tensor, stream: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        """Scores [B, n], the layer's input [B, S, H] and mask -> tokens [B, K], ascending."""
        check_parts(stream, self.parts, self.block_size)
        scores = self._balanced(scores.detach())
        valid, labelled = valid_tokens(attention_mask, stream), labelled_tokens(self.step.labels, stream)
        given = (scores, valid, labelled, stream, self.record.site, self.block_size)
        if self.threshold is not None:
            return select_by_threshold(*given, self.threshold)
        return select_blocks(*given, self.keep, self.parts)

    def _balanced(self, scores: torch.Tensor) -> torch.Tensor:
        if not self.balance:
            return scores
        return selection.balanced(selection.by_part(scores, self.parts)).reshape(scores.shape)

    # A compiler takes a module's numbers for constants, and would compile every layer whose budget differs anew. Of
    # tensors it reads the values at run time, and finds out which sizes vary. No buffers: those move, are cast, and
    # count as fixed in size.

    def set_keep(self, keep: float) -> None:
        """Keep this share of the blocks, unless there is a threshold."""
        self.budget = torch.empty(0, max(2, int(keep * SHARES)), device="cpu")
        if self.varies:
            may_vary(self.budget, 1)

    @property
    def keep(self) -> tuple[int, int]:
        """The share of the blocks as a fraction."""
        return self.budget.shape[1], SHARES

    def set_threshold(self, threshold: float | None) -> None:
        """Keep the blocks whose score reaches this; None goes by the share again."""
        if threshold is not None:
            # Pinned blocks reach every threshold.
            threshold = min(threshold, selection.PINNED)
        self.threshold = None if threshold is None else torch.tensor(threshold, dtype=torch.float32, device="cpu")

    def choose(self, scores: torch.Tensor, stream: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """[B, S] bool: the tokens that these scores [B, n] would keep; nothing is recorded."""
        labelled = labelled_tokens(self.step.labels, stream)
        given = (self._balanced(scores), valid, labelled, stream.shape[1], self.block_size)
        if self.threshold is not None:
            tokens = selection.select_by_threshold(*given, self.threshold)
        else:
            tokens = selection.select_blocks(*given, self.keep, self.parts)
        kept = torch.zeros(stream.shape[:2], dtype=torch.bool, device=stream.device)
        return kept.scatter_(1, tokens, True)

    def nothing_kept(self) -> None:
        """Note that a step passed this site by; choices that wait for their backward stay."""
        self.record.kept_tokens = self.record.total_tokens = 0
