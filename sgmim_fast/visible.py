"""The two losses of SG-MIM on visible tokens only, computed by ops on packed rows. SPEC "The exact shortcut".

Used for masks of whole cells. `model` is an `SGMIM`. `sgmim_fast.dense` computes the same losses on all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from sgmim_fast import ops
from sgmim_fast.early_gradients import early_gradients, fits
from sgmim_fast.fused.block import gemm_dtype
from sgmim_fast.masking import SelectiveMask
from sgmim_fast.visible_encoder import VisibleTokens


def image_loss(model: nn.Module, features: Tensor | VisibleTokens, images: Tensor, mask: SelectiveMask) -> Tensor:
    """Computes the image loss, at masked cells, from encoder features (B, N, C), or from those of visible cells if
    there is a decoder."""
    rows = mask.masked.index
    count = rows.shape[0] * model.encoder_stride**2
    if model.decoder is None:
        scale = 1 / (count + 1e-5) / model.in_chans
        return _distance(model, features.flatten(0, 1), images, rows, packed=False, scale=scale)
    scale = 1 / max(count, 1) / model.in_chans  # MAE's mean
    decoded = model.decoder, model.image_head
    if model.decoder.grad_checkpointing or not fits(decoded, gemm_dtype(features.tokens)):
        tokens = model.decoder.masked(features, mask.visible.index, rows, tuple(mask.mask.shape[1:]))
        return _distance(model, tokens, images, rows, packed=True, scale=scale)
    losses = [partial(_decoded, model, mask, piece, scale=scale) for piece in _pieces(model, mask)]
    return early_gradients(losses, [features.tokens, features.prefix, images], decoded)


def _distance(model: nn.Module, tokens: Tensor, images: Tensor, rows: Tensor, *, packed: bool, scale: float) -> Tensor:
    head, op = model.image_head, ops.linear_l2 if model.loss == "l2" else ops.linear_l1
    options = {"normalized": model.target == "normalized_patch", "packed": packed, "scale": scale}
    return op(tokens, head.weight, head.bias, images, rows, cell=model.encoder_stride, **options)


class _Piece(NamedTuple):
    """A piece of a batch: its images, and their rows in the lists of visible and masked cells."""

    images: slice
    visible: slice
    masked: slice


MIN_TOKENS = {"cpu": 1536, "cuda": 16384}  # smallest piece of a batch; with fewer tokens gemms and launches cost more
UNSPLIT_SHARE = 0.4  # a batch is not split if activations need at most this share of an encoder's with mask tokens


def _pieces(model: nn.Module, mask: SelectiveMask) -> Iterator[_Piece]:
    """Yields the pieces of a batch that are decoded one after the other, so that only one needs memory at a time."""
    batch, cells = len(mask.mask), mask.mask.shape[1] * mask.mask.shape[2]
    encoder, decoder = (len(part.blocks) * part.num_features for part in (model.encoder.model, model.decoder))
    unsplit = mask.visible.index.shape[0] * encoder + batch * cells * decoder <= UNSPLIT_SHARE * batch * cells * encoder
    min_tokens = MIN_TOKENS.get(mask.mask.device.type, MIN_TOKENS["cuda"])
    pieces = 1 if unsplit else min(max(batch * cells // min_tokens, 1), batch)
    if pieces == 1:  # avoids visible_counts, which may synchronise
        yield _Piece(slice(0, batch), slice(None), slice(None))
        return
    before, counts = 0, mask.visible_counts()
    for piece in range(pieces):
        first, last = (batch * i // pieces for i in (piece, piece + 1))
        seen = before + sum(counts[first:last])
        yield _Piece(slice(first, last), slice(before, seen), slice(first * cells - before, last * cells - seen))
        before = seen


def _decoded(
    model: nn.Module,
    mask: SelectiveMask,
    piece: _Piece,
    tokens: Tensor,
    prefix: Tensor,
    images: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Computes the image loss of a piece of the batch."""
    grid = mask.mask.shape[1], mask.mask.shape[2]
    before = piece.images.start * grid[0] * grid[1]
    visible, masked = mask.visible.index[piece.visible] - before, mask.masked.index[piece.masked] - before
    encoded = VisibleTokens(tokens[piece.visible], prefix[piece.images])
    decoded = model.decoder.masked(encoded, visible, masked, grid)
    return _distance(model, decoded, images[piece.images], masked, packed=True, scale=scale)


def structure_loss(
    model: nn.Module, features: Tensor | VisibleTokens, structure: Tensor, mask: SelectiveMask, valid: Tensor | None
) -> Tensor:
    """Computes the structure loss, at visible cells, from features (see `image_loss`) and a map (B, S, H, W) that is 0
    where it is not valid."""
    head, stride, rows = model.structure_head, model.encoder_stride, mask.visible.index
    context = model.structure_encoder.visible(structure, mask.shown)
    if model.decoder is None:
        guided = model.guidance.visible(features.flatten(0, 1), context, mask.visible, mask.shown)
    else:
        cells = mask.mask.shape[1] * mask.mask.shape[2]
        guided = model.guidance.visible(features.tokens, context, mask.visible, mask.shown, cells)
    scale = 1 / model.structure_channels
    if valid is None:
        scale /= rows.shape[0] * stride**2 + 1e-5
    loss = ops.linear_l1(guided, head.weight, head.bias, structure, rows, cell=stride, valid=valid, scale=scale)
    if valid is None:
        return loss
    counted = ops.gather_patches(valid, rows, cell=stride, patch=stride).sum().to(loss.dtype)
    return loss / (counted / model.structure_channels + 1e-5)
