"""What a probe keeps of a branch: second moments, from which its stand-in is solved, and streams to train on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lemo_fx.config import SiteKind
from lemo_fx.files import writing


class BranchStatistics(nn.Module):
    """A probe: sums up second moments of a branch's input and output, and writes scored streams to files.

    Memory is that of two [H, H] matrices, whatever the length of the sequences. The files get every token of the stream
    in half precision, scaled to unit mean square, and the true scores; both padded to the longest sequence.

    Args:
        path: of the files, without their endings; written to where the probe is given scores.
        longest: tokens of the longest sequence; per_score: tokens that one score is for.
        kind: of the site, where a predictor is to be trained for it.
    """

    def __init__(
        self, hidden: int, device: torch.device, path: Path, longest: int, per_score: int, kind: SiteKind | None
    ) -> None:
        super().__init__()
        self.stream_file, self.score_file = stream_files(path)
        self.longest, self.per_score, self.kind = longest, per_score, kind
        self.count = 0
        self.sums = [torch.zeros(hidden, dtype=torch.float64, device=device) for _ in range(2)]
        self.products = [torch.zeros(hidden, hidden, dtype=torch.float32, device=device) for _ in range(2)]
        self.square = torch.zeros((), dtype=torch.float64, device=device)
        for file in stream_files(path):
            file.unlink(missing_ok=True)

    def forward(
        self,
        source: torch.Tensor,
        output: torch.Tensor,
        stream: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
    ) -> None:
        """Note one forward pass: source [B, S, H] the branch's normed input, output [B, S, H] what it adds.

        Args:
            stream: [1, S, H] the residual stream that the branch reads; scores: [1, n] true informativeness.
        """
        if stream is not None and scores is not None:
            tokens = stream[0].float()
            tokens = tokens * torch.rsqrt(tokens.square().mean(-1, keepdim=True) + 1e-6)
            _append(self.stream_file, tokens.half().cpu(), self.longest)
            _append(self.score_file, scores[0].float().cpu(), -(-self.longest // self.per_score))
        x, y = source.detach().flatten(0, -2).float(), output.detach().flatten(0, -2).float()
        self.count += x.shape[0]
        self.sums[0] += x.sum(0)
        self.sums[1] += y.sum(0)
        self.products[0].addmm_(x.T, x)
        self.products[1].addmm_(x.T, y)
        self.square += y.square().sum()

    def solve(self, rank: int, ridge: float) -> tuple[dict[str, torch.Tensor], float]:
        """Reduced-rank ridge regression of output on source.

        Args:
            rank: of the map.
            ridge: added to the diagonal, as a share of its mean.

        Returns:
            ({"down" [H, r], "up" [r, H], "bias" [H]}, share of the output's variance that it explains).
        """
        mean_x, mean_y = (s / self.count for s in self.sums)
        xx = self.products[0].double() / self.count - torch.outer(mean_x, mean_x)
        xy = self.products[1].double() / self.count - torch.outer(mean_x, mean_y)
        hidden = xx.shape[0]
        xx_ridged = xx + ridge * xx.diagonal().mean() * torch.eye(hidden, dtype=xx.dtype, device=xx.device)
        full = torch.linalg.solve(xx_ridged, xy)
        # The best map of a given rank projects the fitted values on their leading directions.
        directions = torch.linalg.eigh(full.T @ xx @ full).eigenvectors[:, -min(rank, hidden) :]
        down, up = full @ directions, directions.T
        low = down @ up
        variance = self.square / self.count - mean_y.square().sum()
        missed = variance - 2 * (low * xy).sum() + (low * (xx @ low)).sum()
        explained = 1 - float(missed / variance.clamp_min(1e-30))
        parts = {"down": down, "up": up, "bias": mean_y - mean_x @ low}
        return {name: value.float().contiguous().cpu() for name, value in parts.items()}, explained


def stream_files(path: Path) -> tuple[Path, Path]:
    """Files of a site's streams and of their scores."""
    return path.with_name(path.name + ".stream"), path.with_name(path.name + ".scores")


def _append(path: Path, values: torch.Tensor, rows: int) -> None:
    """Write values, followed by zeros up to a number of rows."""
    padded = values.new_zeros(rows, *values.shape[1:])
    padded[: len(values)] = values
    # Not ndarray.tofile, which says nothing when the last bytes find no room.
    with writing(path), path.open("ab") as file:
        file.write(padded.numpy().data)
