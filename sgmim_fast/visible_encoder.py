"""Encoders of visible patches only, as in MAE: `create_encoder(name, visible_only=True)`. SPEC "Visible tokens only".

The stem embeds the visible patches, which keep the positions that they have in the whole image. timm's own blocks and
norm process them together with the class and register tokens. The paper, which builds on SimMIM, does not do this.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgmim_fast.fused.stem import stem_fits, visible_stem
from sgmim_fast.masking import SelectiveMask, search
from sgmim_fast.positions import sincos_positions


class VisibleTokens(NamedTuple):
    """The output of a `VisibleEncoder` for a batch."""

    tokens: Tensor  # (n, C), packed: the visible patches' tokens, in the order of the mask's `visible` rows
    prefix: Tensor  # (B, P, C): class, distillation and register tokens; P may be 0


class VisibleEncoder:
    """Mixin that turns a `MaskedEncoder` into an encoder of visible patches only. It precedes it among the bases.

    It has the attributes of `MaskedEncoder`, with `mask_token` None, and the following.

    Attributes:
        prefix_tokens: number P of class, distillation and register tokens.
        visible_only: True.
    """

    visible_only = True
    model: nn.Module
    visible_stem: bool

    @property
    def prefix_tokens(self) -> int:
        return self.model.num_prefix_tokens

    def forward(self, x: Tensor, mask: Tensor | SelectiveMask | None = None) -> Tensor | VisibleTokens:
        """Encodes the visible patches.

        Args:
            x: (B, in_chans, H, W) images, floating point.
            mask: (B, H/p, W/p), bool or 0/1 numbers, 1 = masked (not visible to the encoder), or a `SelectiveMask` on a
                grid that divides this one. Images may have different numbers of visible patches; images with the same
                number are encoded together. A mask tensor is searched for its rows, which synchronises on a GPU.
                None: nothing is masked.

        Returns:
            VisibleTokens; without a mask (B, N, C), bitwise the result of `model.forward_features` without the prefix.

        Raises:
            TypeError: `x` is not floating point.
            ValueError: a shape or device is wrong, or a mask tensor has values other than 0 and 1.
        """
        if mask is None:
            return super().forward(x)
        self._check(x, mask)
        stem = self.model.patch_embed
        grid = stem.dynamic_feat_size(x.shape[2:])
        drawn = mask.on(grid) if isinstance(mask, SelectiveMask) else search(mask, *grid)
        prefix, cells = self.prefix_tokens, drawn.visible.index % (grid[0] * grid[1])
        table, rotary = self._positions(grid)
        positions = F.embedding(cells + prefix, table)
        if self.visible_stem and stem_fits(self, x):
            tokens = visible_stem(stem, x, drawn.visible.index, positions)
        else:
            tokens = stem(x).reshape(-1, table.shape[1]).index_select(0, drawn.visible.index) + positions
        first = table[:prefix]
        counts = drawn.visible_counts()
        if len(set(counts)) == 1:
            y = self._images(tokens.unflatten(0, (len(x), counts[0])), cells.view(len(x), counts[0]), first, rotary)
            return VisibleTokens(y[:, prefix:].flatten(0, 1), y[:, :prefix].contiguous())  # copies, so y can be freed
        own, of, done = tokens.split(counts), cells.split(counts), [tokens] * len(x)
        for _, same in groupby(sorted(range(len(x)), key=counts.__getitem__), key=counts.__getitem__):
            images = list(same)
            same_cells = torch.stack([of[i] for i in images])
            y = self._images(torch.stack([own[i] for i in images]), same_cells, first, rotary)
            for i, image in zip(images, y, strict=True):
                done[i] = image
        return VisibleTokens(torch.cat([y[prefix:] for y in done]), torch.stack([y[:prefix] for y in done]))

    def _images(self, tokens: Tensor, cells: Tensor, prefix: Tensor, rotary: Tensor | None) -> Tensor:
        """Encodes b images with V visible patches each. `tokens` (b, V, D) have positions and belong to the patches
        `cells` (b, V); the prefix tokens (P, D) are prepended -> (b, P + V, C)."""
        x = torch.cat([prefix.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], 1) if len(prefix) else tokens
        return self._encode(self.model.pos_drop(x), cells, rotary) if x.shape[1] else x

    def _encode(self, x: Tensor, cells: Tensor, rotary: Tensor | None) -> Tensor:
        """Computes blocks and norm, (b, P + V, D) -> (b, P + V, C). x includes absolute positions; `rotary` has the
        rotary positions of all patches, of which those of the patches `cells` (b, V) are used."""
        raise NotImplementedError

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Returns (P + N, D), the prefix tokens with their positions followed by the positions of all patches, and the
        patches' rotary positions in timm's format. Called once per forward, so that random augmentations of rotary
        positions, which timm draws, are the same for the whole batch."""
        raise NotImplementedError

    def _embedded_zeros(self, grid: tuple[int, int]) -> Any:
        """Returns timm's `_pos_embed` of zero tokens: prefix tokens and positions, without dropout."""
        model, weight = self.model, self.model.patch_embed.proj.weight
        shape = grid if model.dynamic_img_size else (grid[0] * grid[1],)
        drop, training = model.pos_drop, model.pos_drop.training
        if training and getattr(drop, "p", 0):  # dropout applies to the tokens with positions, later
            drop.eval()
        embedded = model._pos_embed(weight.new_zeros(1, *shape, weight.shape[0]))
        if drop.training != training:
            drop.train(training)
        return embedded


def fix_positions(model: nn.Module) -> None:
    """Replaces the positions of a timm model by sines and cosines that are not trained, as in MAE. In place.

    Raises:
        ValueError: the model has no absolute positions.
    """
    table = getattr(model, "pos_embed", None)
    if table is None:
        raise ValueError(f"positions is 'sincos', but {type(model).__name__} has no absolute positions here")
    grid = model.patch_embed.grid_size
    prefix = table.shape[1] - grid[0] * grid[1]
    with torch.no_grad():
        table.copy_(sincos_positions(grid, table.shape[2], prefix))
    table.requires_grad_(False)
