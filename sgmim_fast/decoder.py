"""`Decoder`: the light decoder of MAE, for encoders of visible patches only. SPEC "Visible tokens only"."""

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
from sgmim_fast.fused.unmodified import BIASED, INACTIVE_DROP_PATH, MLP, NORM, Check, Own
from sgmim_fast.fused.vit_blocks import LAYER_SCALE, VIT_ATTENTION, ViTBlock
from sgmim_fast.positions import sincos_positions
from sgmim_fast.visible_encoder import VisibleEncoder, VisibleTokens


class Decoder(nn.Module):
    """MAE's decoder (arXiv 2111.06377), which predicts the masked cells of an image from the tokens of visible ones.

    A linear layer maps visible tokens to the decoder's width, a mask token is put at every masked cell, positions are
    added, and timm's blocks and a norm follow. `SGMIM.image_head` is the prediction head. The decoder is not kept after
    pre-training.

    Args:
        encoder: an encoder of visible patches, `create_encoder(name, visible_only=True)`.
        depth: number of blocks. MAE has 8; 2 cost a fourth of that.
        width: width of the tokens, a multiple of 4 and of `heads`.
        heads: number of attention heads.
        positions: "sincos", fixed, as in MAE; or "learned", which restricts images to the encoder's own size.

    Attributes:
        num_features: the width.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, its value and what is expected.
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
        """Computes the tokens of all cells, by calling every module.

        Args:
            encoded: the output of the encoder.
            visible: (n,) int64, indices of visible cells in images * rows * columns, as in `SelectiveMask.visible`.
            grid: number of cells (rows, columns) of an image.

        Returns:
            (B, N, width), after the norm.
        """
        y = self.embed(encoded.tokens) + self._positions_of(visible, grid)
        return self._checkpointed(self._all_cells, y, encoded.prefix, visible, grid)[:, self.prefix_tokens :]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enables or disables checkpointing of the blocks, like timm's method. The encoder has a switch of its own."""
        self.grad_checkpointing = enable

    def _checkpointed(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Computes `function(*args)`, with checkpointing if it is enabled."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def _all_cells(self, y: Tensor, prefix: Tensor, visible: Tensor, grid: tuple[int, int]) -> Tensor:
        rows, place = self._rows(y, prefix, visible, grid)
        return self.norm(self.blocks(place(rows)))

    def masked(self, encoded: VisibleTokens, visible: Tensor, masked: Tensor, grid: tuple[int, int]) -> Tensor:
        """Computes the tokens of masked cells only, which the loss needs: (masked cells, width), after the norm, in the
        order of `masked`. The last block's MLP and the norm process these tokens only. The first block's norm and qkv
        process the tokens of masked cells, which are the same in all images, only once. See `forward` for the rest."""
        y = ops.norm_linear(
            encoded.tokens, self.embed.weight, self.embed.bias, residual=self._positions_of(visible, grid)
        )
        return self._checkpointed(self._masked_cells, y, encoded.prefix, visible, masked, grid)

    def _masked_cells(
        self, y: Tensor, prefix: Tensor, visible: Tensor, masked: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        rows, place = self._rows(y, prefix, visible, grid)
        masked_tokens, last = self._token_indices(masked, grid), len(self.blocks) - 1
        x = place(rows)
        for i, block in enumerate(self.blocks):
            halves = i in (0, last) and type(block) is ViTBlock and not block._as_timm(x)
            x = block.first_half(x, *((rows, place) if i == 0 else ())) if halves else block(x)
            if i == last:
                x = x.flatten(0, 1).index_select(0, masked_tokens)
            x = block.second_half(x) if halves else x
        return self.norm(x)

    def _rows(
        self, y: Tensor, prefix: Tensor, visible: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Returns the distinct rows that are input to the first block, and a function that places rows in the images.

        The rows are those of visible cells, of prefix tokens, and P + N rows that masked cells have in every image. The
        function maps (rows, C) -> (B, P + N, C)."""
        table, images = self._positions(grid), len(prefix)
        every, places = self.mask_token[0] + table, self._token_indices(visible, grid)
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
        """Returns the positions of prefix tokens and cells, (P + N, width)."""
        if tuple(grid) == self.grid:
            return self.pos_embed[0]
        if self.learned:
            raise ValueError(
                f"images have {grid[0]}x{grid[1]} cells, and the decoder learned positions of {self.grid[0]}x"
                f"{self.grid[1]}; expected those, or positions='sincos'"
            )
        return sincos_positions(grid, self.num_features, self.prefix_tokens, self.pos_embed.device).to(self.pos_embed)

    def _positions_of(self, cells: Tensor, grid: tuple[int, int]) -> Tensor:
        """Returns the positions (n, width) of the given cells."""
        return F.embedding(cells % (grid[0] * grid[1]) + self.prefix_tokens, self._positions(grid))

    def _token_indices(self, cells: Tensor, grid: tuple[int, int]) -> Tensor:
        """Converts indices of cells to indices of tokens in all images, each of which begins with the prefix."""
        return cells if not self.prefix_tokens else cells + (cells // (grid[0] * grid[1]) + 1) * self.prefix_tokens


def init_linear(linear: nn.Linear) -> None:
    """Initialises a linear layer as MAE does."""
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)


# `masked` calls the last block's MLP and the norm for some tokens only, and `sgmim_fast.visible` calls `masked` for one
# piece of the batch after the other. So no module may depend on other tokens or images.
_BLOCK = Own(
    Block,
    ViTBlock,
    methods=("first_half", "second_half"),
    norm1=NORM,
    attn=VIT_ATTENTION,
    ls1=LAYER_SCALE,
    drop_path1=INACTIVE_DROP_PATH,
    norm2=NORM,
    mlp=MLP,
    ls2=LAYER_SCALE,
    drop_path2=INACTIVE_DROP_PATH,
)
_BLOCKS = tuple(Check(**{str(i): _BLOCK}) for i in range(32))


def _own(depth: int) -> Check:
    children = dict.fromkeys(map(str, range(depth)))
    blocks = Own(nn.Sequential, methods=("__iter__", "__len__"), **children)
    methods = ("masked", "_checkpointed", "_masked_cells", "_rows", "_positions", "_positions_of", "_token_indices")
    own = Own(Decoder, tensors=("mask_token", "pos_embed"), methods=methods, embed=BIASED, blocks=blocks, norm=NORM)
    return Check(decoder=own)


_OWN = tuple(_own(i + 1) for i in range(len(_BLOCKS)))


def changed(model: nn.Module) -> str:
    """Returns the reason to call the decoder of an `SGMIM`; "" if `masked` may replace the call."""
    blocks = model.decoder.blocks
    depth = len(blocks)
    if depth > len(_OWN):
        return f"the decoder has {depth} blocks; expected at most {len(_OWN)}"
    if why := _OWN[depth - 1].why(model):
        return why
    for check in _BLOCKS[:depth]:
        if why := check.why(blocks):
            return f"decoder.blocks.{why}"
    return ""
