"""Triton kernel for streaming block scores: S x S is never stored, nothing is summed atomically."""

import torch
import triton
import triton.language as tl


@triton.jit
def _fwd_kernel(
    Q, K, DOCUMENTS, OUT,
    stride_qb, stride_qh, stride_qs, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_db,
    length, blocks, scaling,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    BLOCK: tl.constexpr, PADDED: tl.constexpr, PER_TILE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per tile of PER_TILE key blocks: adds up, over the query blocks that see it, each block's maximum.

    Rows of a tile are PER_TILE blocks of PADDED rows, of which the first BLOCK are real.
    """
    TILE: tl.constexpr = PER_TILE * PADDED
    tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    within = tl.arange(0, TILE) % PADDED
    block_of = tl.arange(0, TILE) // PADDED
    d = tl.arange(0, PADDED_D)
    key_at = (tile * PER_TILE + block_of) * BLOCK + within
    key_real = (within < BLOCK) & (key_at < length)
    key_at = key_at.to(tl.int64)
    if HAS_DOCUMENTS:
        key_document = tl.load(DOCUMENTS + batch * stride_db + key_at, mask=key_real, other=-1)
    total = tl.zeros([PER_TILE], tl.float32)
    # A maximum drops NaN; a sum does not. The selection keeps a block whose score is NaN, and says so.
    poison = tl.zeros([TILE], tl.float32)
    for query_tile in range(tile, tl.cdiv(blocks, PER_TILE)):
        query_at = (query_tile * PER_TILE + block_of) * BLOCK + within
        query_real = (within < BLOCK) & (query_at < length)
        query_at = query_at.to(tl.int64)
        positive = tl.zeros([TILE, TILE], tl.float32)
        for head in range(HEADS):
            q = tl.load(
                Q + batch * stride_qb + head * stride_qh + query_at[:, None] * stride_qs + d[None, :] * stride_qd,
                mask=query_real[:, None] & (d[None, :] < D), other=0.0,
            )  # fmt: skip
            k = tl.load(
                K + batch * stride_kb + (head // GROUP) * stride_kh
                + key_at[None, :] * stride_ks + d[:, None] * stride_kd,
                mask=key_real[None, :] & (d[:, None] < D), other=0.0,
            )  # fmt: skip
            scores = tl.dot(q, k, input_precision=PRECISION) * scaling
            positive += tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL)
        allowed = (query_at[:, None] >= key_at[None, :]) & query_real[:, None] & key_real[None, :]
        if HAS_DOCUMENTS:
            query_document = tl.load(DOCUMENTS + batch * stride_db + query_at, mask=query_real, other=-1)
            allowed = allowed & (query_document[:, None] == key_document[None, :]) & (key_document[None, :] >= 0)
        positive = tl.where(allowed, positive / HEADS, 0.0)
        poison += tl.sum(positive, axis=0) * 0.0
        best = tl.max(tl.reshape(positive, [PER_TILE, PADDED, TILE]), axis=1)
        best = tl.max(tl.reshape(best, [PER_TILE, PER_TILE, PADDED]), axis=2)
        total += tl.sum(best, axis=0)
    total += tl.sum(tl.reshape(poison, [PER_TILE, PADDED]), axis=1)
    block = tile * PER_TILE + tl.arange(0, PER_TILE)
    tl.store(OUT + batch * blocks + block, total, mask=block < blocks)


def block_scores(
    query: torch.Tensor, key: torch.Tensor, documents: torch.Tensor | None, scaling: float, block_size: int
) -> torch.Tensor:
    """As `reference.block_scores` for causal order (within documents, if given); any strides, memory linear in S."""
    batch, heads, length, width = query.shape
    blocks = triton.cdiv(length, block_size)
    out = torch.empty(batch, blocks, dtype=torch.float32, device=query.device)
    padded = max(16, triton.next_power_of_2(block_size))
    per_tile = max(1, 128 // padded)
    if documents is not None:
        documents = documents.expand(batch, length)
    _fwd_kernel[(triton.cdiv(blocks, per_tile), batch)](
        query, key, documents, out,
        *query.stride(), *key.stride(), 0 if documents is None else documents.stride(0),
        length, blocks, scaling,
        HEADS=heads, GROUP=heads // key.shape[1], D=width, PADDED_D=max(16, triton.next_power_of_2(width)),
        BLOCK=block_size, PADDED=padded, PER_TILE=per_tile,
        HAS_DOCUMENTS=documents is not None, PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=8, num_stages=2 if query.dtype != torch.float32 else 1,
    )  # fmt: skip
    return out
