"""`Decoder`: the light decoder of MAE, for encoders of the visible patches alone. SPEC "Visible tokens only"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sgmim_fast import ops
from sgmim_fast.fused.unmodified import BIASED, Check, Own
from sgmim_fast.fused.vit_blocks import ViTBlock
from sgmim_fast.positions import sincos_positions
from sgmim_fast.visible_encoder import VisibleEncoder, VisibleTokens


class Decoder(nn.Module):
    """Predicts what an image has at its masked cells from the tokens of its visible ones, as MAE's decoder (arXiv
    2111.06377): a linear layer to its width, a mask token in the place of every masked cell, positions, timm's blocks,
    norm. The head behind it is `SGMIM.image_head`. It is dropped after pre-training.

    Args:
        encoder: of the visible patches alone, `create_encoder(name, visible_only=True)`.
        depth: blocks; 8 as published, 2 costs a fourth of that.
        width: of its tokens, a multiple of 4 and of `heads`.
        heads: attention heads.
        positions: "sincos", fixed, as published; "learned", which only images of the encoder's own size have.

    Attributes:
        num_features: the width.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """

    def __init__(
        self, encoder: nn.Module, depth: int = 8, width: int = 512, heads: int = 16, *, positions: str = "sincos"
    ):
        super().__init__()
        if not isinstance(encoder, VisibleEncoder):
            raise TypeError(
                f"encoder is a {type(encoder).__name__}; expected one of create_encoder(timm_name, visible_only=True)"
            )
        if depth < 1:
            raise ValueError(f"depth is {depth}; expected at least 1 block")
        if width < 1 or heads < 1 or width % heads:
            raise ValueError(f"heads is {heads} for a width of {width}; expected a divisor of the width")
        if positions not in ("sincos", "learned"):
            raise ValueError(f"positions is {positions!r}; expected 'sincos' or 'learned'")
        self.num_features, self.prefix_tokens = width, encoder.prefix_tokens
        self.grid, self.grad_checkpointing = tuple(encoder.model.patch_embed.grid_size), False
        self.learned = positions == "learned"
        self.embed = nn.Linear(encoder.num_features, width)
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, width), std=0.02))
        if self.learned:
            count = self.prefix_tokens + self.grid[0] * self.grid[1]
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, count, width), std=0.02))
        else:
            table = sincos_positions(self.grid, width, self.prefix_tokens)[None]
            self.register_buffer("pos_embed", table.to(torch.get_default_dtype()), persistent=False)
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)
        weight = encoder.model.patch_embed.proj.weight
        self.to(weight.device, weight.dtype)

    def forward(self, encoded: VisibleTokens, visible: Tensor, grid: tuple[int, int]) -> Tensor:
        """All cells' tokens, through the modules as they are.

        Args:
            encoded: what the encoder returned.
            visible: (n,) int64, the visible cells among the images * rows * columns, as of `SelectiveMask.visible`.
            grid: cells (rows, columns) of an image.

        Returns:
            (B, N, width), normalised.
        """
        y = self.embed(encoded.tokens) + self._of(visible, grid)
        return self._kept(self._everywhere, y, encoded.prefix, visible, grid)[:, self.prefix_tokens :]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the blocks are computed again in the backward, as of timm's. The encoder has its own switch."""
        self.grad_checkpointing = enable

    def _kept(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """`function(*args)`, whose activations are kept for the backward or not."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def _everywhere(self, y: Tensor, prefix: Tensor, visible: Tensor, grid: tuple[int, int]) -> Tensor:
        rows, place = self._rows(y, prefix, visible, grid)
        return self.norm(self.blocks(place(rows)))

    def masked(self, encoded: VisibleTokens, visible: Tensor, masked: Tensor, grid: tuple[int, int]) -> Tensor:
        """The masked cells' tokens alone, (masked cells, width), normalised: those the loss looks at, in the order of
        `masked`. The last block's MLP and the norm work on them only, the first block's norm and qkv on the tokens that
        all images share once. `visible`, `grid`: as of `forward`."""
        y = ops.norm_linear(encoded.tokens, self.embed.weight, self.embed.bias, residual=self._of(visible, grid))
        return self._kept(self._where_masked, y, encoded.prefix, visible, masked, grid)

    def _where_masked(
        self, y: Tensor, prefix: Tensor, visible: Tensor, masked: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        rows, place = self._rows(y, prefix, visible, grid)
        looked_at, last = self._places(masked, grid), len(self.blocks) - 1
        x = place(rows)
        for i, block in enumerate(self.blocks):
            halves = i in (0, last) and not _HALVES[i].why(self.blocks) and not block._as_timm(x)
            x = block.first_half(x, *((rows, place) if i == 0 else ())) if halves else block(x)
            if i == last:
                x = x.flatten(0, 1).index_select(0, looked_at)
            x = block.second_half(x) if halves else x
        return self.norm(x)

    def _rows(
        self, y: Tensor, prefix: Tensor, visible: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The rows that tokens of images have before the first block: those of the visible cells and of the prefix, and
        behind them P + N that masked cells have in every image; and what brings such rows to their places,
        (rows, C) -> (B, P + N, C)."""
        table, images = self._positions(grid), len(prefix)
        every, places = self.mask_token[0] + table, self._places(visible, grid)
        own = [y.to(every.dtype)]
        if self.prefix_tokens:
            first = torch.arange(images, device=y.device)[:, None] * len(table)
            places = torch.cat([places, (first + torch.arange(self.prefix_tokens, device=y.device)).flatten()])
            own.append((self.embed(prefix) + table[: self.prefix_tokens]).flatten(0, 1).to(every.dtype))

        def place(rows: Tensor) -> Tensor:
            own, every = rows.split([len(places), len(table)])
            x = every.expand(images, -1, -1).flatten(0, 1)
            return x.index_copy(0, places, own).unflatten(0, (images, -1))

        return torch.cat([*own, every]), place

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """(P + N, width)."""
        if tuple(grid) == self.grid:
            return self.pos_embed[0]
        if self.learned:
            raise ValueError(
                f"images have {grid[0]}x{grid[1]} cells, and the decoder learned positions of {self.grid[0]}x"
                f"{self.grid[1]}; expected those, or positions='sincos'"
            )
        return sincos_positions(grid, self.num_features, self.prefix_tokens, self.pos_embed.device).to(self.pos_embed)

    def _of(self, cells: Tensor, grid: tuple[int, int]) -> Tensor:
        """Positions (n, width) of these cells."""
        return F.embedding(cells % (grid[0] * grid[1]) + self.prefix_tokens, self._positions(grid))

    def _places(self, cells: Tensor, grid: tuple[int, int]) -> Tensor:
        """Where cells are among the tokens of all images, each of which begins with the prefix."""
        return cells if not self.prefix_tokens else cells + (cells // (grid[0] * grid[1]) + 1) * self.prefix_tokens


def init_linear(linear: nn.Linear) -> None:
    """As MAE does."""
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)


_CHILDREN = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
# What `masked` bypasses of the first block and the last one: the call of the block, not of its halves
_HALVES = tuple(
    Check(**{str(i): Own(ViTBlock, methods=("first_half", "second_half"), **dict.fromkeys(_CHILDREN))})
    for i in range(32)
)


def _own(depth: int) -> Check:
    children = dict.fromkeys(map(str, range(depth)))
    blocks = Own(nn.Sequential, methods=("__iter__", "__len__"), **children)
    methods = ("masked", "_kept", "_where_masked", "_rows", "_positions", "_of", "_places")
    own = Own(Decoder, tensors=("mask_token", "pos_embed"), methods=methods, embed=BIASED, blocks=blocks, norm=None)
    return Check(decoder=own)


_OWN = tuple(_own(i + 1) for i in range(len(_HALVES)))  # and of a model's decoder, whose blocks are called


def changed(model: nn.Module) -> str:
    """Why the decoder of an `SGMIM` has to be called; "" if `masked` may stand in for it."""
    depth = len(model.decoder.blocks)
    return _OWN[depth - 1].why(model) if depth <= len(_OWN) else f"a decoder of {depth} blocks"
