"""`SGMIM`: the model of the paper around any masked encoder, computed on visible tokens only."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from sgmim_fast import decoder, dense, visible
from sgmim_fast import guidance as branch
from sgmim_fast.decoder import Decoder, init_linear
from sgmim_fast.encoders import VISIBLE, image_size
from sgmim_fast.fused import unmodified
from sgmim_fast.fused.accelerate import accelerate as make_faster
from sgmim_fast.fused.block import linear_weights
from sgmim_fast.guidance import RelationalGuidance, StructureEncoder
from sgmim_fast.masking import DenseMask, SelectiveMask, aligned, resize, search, selective_mask, without_lists
from sgmim_fast.ops import target
from sgmim_fast.ops.weights import cast_together
from sgmim_fast.reference import Losses
from sgmim_fast.salience import salience_of
from sgmim_fast.standardized import check_standardized
from sgmim_fast.visible_encoder import VisibleTokens

TARGETS = ("pixels", "normalized_patch")
DISTANCES = ("l1", "l2")


class SGMIM(nn.Module):
    """Structured Knowledge Guided Masked Image Modeling (arXiv 2409.02513).

    The model masks an image and reconstructs it. A structure map of the same scene guides the encoder's features
    through a light branch, which reads the map where the image is masked and predicts it where the image is visible.
    Only the encoder is kept after pre-training.

    If the mask is aligned to the encoder's cells, everything behind the encoder is computed on visible tokens only, and
    losses and gradients equal those of the dense arithmetic (SPEC "The exact shortcut"). With any other mask the dense
    arithmetic itself is computed. The same holds for a step in which a head or a module of the branch has hooks, has
    been replaced, or has been changed in a way that the fused ops do not implement: the modules are then called as they
    are, on every token.

    Args:
        encoder: masked encoder with `forward(x, mask)` -> (B, N, C) or (B, C, h, w) and the attributes `num_features`,
            `in_chans` and `patch_size`. `create_encoder` makes one from a timm name; the classes of the published code
            can be passed as they are.
        encoder_stride: pixels along one output token, e.g. 32 for a Swin, the patch size for a ViT. None: the `stride`
            of an encoder made by `create_encoder`, and 32 for other encoders.
        guidance: whether there is a structure branch. False gives plain SimMIM.
        structure_channels: number of channels S of the structure map.
        hidden_context: "keep" (published) or "drop" the hidden structure cells in the attention.
        position_embedding: add learned positions to the queries and keys of the guidance. Hidden cells then differ from
            each other, so that the branch is computed densely. Requires an encoder with a known image size.
        accelerate: compute the encoder's timm blocks through fused ops, with parameters and state dict unchanged. This
            calls `sgmim_fast.accelerate` on `encoder`, in place. False leaves the encoder unchanged.
        decoder: `Decoder(encoder)`, for an encoder made by `create_encoder(..., visible_only=True)`. The image is then
            predicted from the tokens of visible patches, as in MAE, with the same guidance. This costs half to a third,
            and is not what the paper does. None: the encoder sees mask tokens; the image head predicts from its tokens.
        target: "pixels" (published), or "normalized_patch": the pixels of each cell minus their mean, divided by their
            standard deviation.
        loss: "l1" (published) or "l2" between predicted and target image. The structure loss is always L1.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, its value and what is expected.
    """

    def __init__(
        self,
        encoder: nn.Module,
        encoder_stride: int | None = None,
        *,
        guidance: bool = True,
        structure_channels: int = 1,
        hidden_context: str = "keep",
        position_embedding: bool = False,
        accelerate: bool = True,
        decoder: Decoder | None = None,
        target: str = "pixels",
        loss: str = "l1",
    ):
        super().__init__()
        _check_encoder(encoder)
        _check_decoder(encoder, decoder)
        for name, value, options in (("target", target, TARGETS), ("loss", loss, DISTANCES)):
            if value not in options:
                raise ValueError(f"{name} is {value!r}; expected {' or '.join(map(repr, options))}")
        self.target, self.loss = target, loss
        self.encoder = make_faster(encoder) if accelerate else encoder
        if encoder_stride is None:
            encoder_stride = _square(getattr(encoder, "stride", 32), "encoder.stride")
        self.encoder_stride = encoder_stride
        self.in_chans = encoder.in_chans
        self.patch_size = _square(encoder.patch_size, "encoder.patch_size")
        if encoder_stride < 1 or encoder_stride % self.patch_size:
            raise ValueError(
                f"encoder_stride is {encoder_stride}; expected a multiple of the encoder's patch size {self.patch_size}"
            )
        stride = _square(getattr(encoder, "stride", encoder_stride), "encoder.stride")
        if stride != encoder_stride:
            raise ValueError(f"encoder_stride is {encoder_stride}; expected {stride}, the stride of this encoder")
        if structure_channels < 1:
            raise ValueError(f"structure_channels is {structure_channels}; expected at least 1")
        self.structure_channels = structure_channels
        width, pixels = encoder.num_features, encoder_stride**2
        self.structure_encoder = self.guidance = self.structure_head = None
        self.decoder = decoder
        self.image_head = nn.Linear(width if decoder is None else decoder.num_features, self.in_chans * pixels)
        if decoder is not None:
            init_linear(self.image_head)
            if accelerate:
                make_faster(decoder)
        if guidance:
            self.structure_encoder = StructureEncoder(structure_channels, width, encoder_stride)
            cells = _cells(encoder, encoder_stride) if position_embedding else 0
            self.guidance = RelationalGuidance(width, hidden_context=hidden_context, cells=cells)
            self.structure_head = nn.Linear(width, structure_channels * pixels)

    def forward(
        self,
        images: Tensor,
        structure: Tensor | None = None,
        mask: Tensor | SelectiveMask | None = None,
        *positional: bool,
        return_losses: bool = False,
        structure_valid: Tensor | None = None,
    ) -> Tensor | Losses:
        """Computes the loss of a batch.

        Args:
            images: (B, in_chans, H, W), floating point, normalised; H and W are multiples of the encoder stride.
            structure: (B, S, H, W), floating point, standardised (`standardize_structure`); ignored without guidance.
                Raw and non-finite values raise an error, on a GPU by a device-side assertion that does not synchronise.
            mask: 1 = masked. A `SelectiveMask`, or a tensor (B, H / p, W / p) of bool or 0/1 numbers, where p is the
                encoder's patch size. A tensor is searched for its masked rows, which on a GPU synchronises once per
                call, and breaks the graph of torch.compile once.
            return_losses: return all three losses.
            structure_valid: (B, S, H, W) bool, True where the map is known. Unknown pixels are read as 0, the mean of a
                standardised map, and do not count in the loss. None: the map is known everywhere.

        Returns:
            The total loss, a scalar; with `return_losses`, `Losses(total, image, structure)`.

        Raises:
            TypeError, ValueError: an argument is invalid; the message names it, its value and what is expected.
        """
        if positional:
            return_losses = _positional_return_losses(positional, return_losses)
        self._check(images, structure, mask, structure_valid)
        cells = self._grid(images)
        if self.decoder is not None:
            mask = _with_row_lists(mask, cells)
        elif unmodified.transformed():
            mask = without_lists(mask)  # row lists would become constants of the traced graph
        elif isinstance(mask, Tensor):
            mask = search(mask, *cells)  # called once at the top level, so that it breaks a compiled graph only once
        else:
            mask = mask.on(cells) if aligned(mask.mask.shape[1:], cells) else without_lists(mask)
        structure = self._known(structure, structure_valid)
        if torch.compiler.is_compiling() or not target.on_gpu(images):
            losses = self._losses(images, structure, mask, structure_valid)
        else:
            with cast_together(self._linear_weights):
                losses = self._losses(images, structure, mask, structure_valid)
        return losses if return_losses else losses.total

    def _losses(
        self, images: Tensor, structure: Tensor | None, mask: SelectiveMask | DenseMask, valid: Tensor | None
    ) -> Losses:
        """Computes the paper's Figure 2. The arguments have been checked, and the mask is on the encoder's cells."""
        features = self._encode(images, mask)
        path = dense if isinstance(mask, DenseMask) or self._branch_changed(features) else visible
        image = path.image_loss(self, features, images, mask)
        if self.guidance is None:
            return Losses(image, image, torch.zeros_like(image))
        guided = path.structure_loss(self, features, structure, mask, valid)
        return Losses(image + guided, image, guided)

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        structure: Tensor | None = None,
        mask: Tensor | SelectiveMask | None = None,
        *,
        structure_valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the predictions of both heads at every pixel, for inspection. Dense, without gradients.

        The image head is trained where the image is masked, and the structure head where the image is visible. With a
        decoder there are no features at masked cells, so that the structure predicted there is meaningless. With
        target="normalized_patch" the predicted patches get the mean and standard deviation of the given image's own.

        Args:
            images, structure, mask, structure_valid: see `forward`.

        Returns:
            The image (B, in_chans, H, W), normalised as `images`, and the structure (B, S, H, W), standardised as
            `structure`, or None without guidance.

        Raises:
            TypeError, ValueError: see `forward`.
        """
        self._check(images, structure, mask, structure_valid)
        if self.decoder is not None:
            mask = _with_row_lists(mask, self._grid(images))
        else:
            if isinstance(mask, Tensor):
                search(mask, *self._grid(images))  # raises if a value is neither 0 nor 1
            mask = without_lists(mask)
        structure = self._known(structure, structure_valid)
        features = self._encode(images, mask)
        image = dense.predict(self.image_head, dense.decoded(self, features, mask), images, self.encoder_stride)
        if self.target == "normalized_patch":
            image = dense.denormalized(image, images, self.encoder_stride)
        if self.guidance is None:
            return image, None
        guided = dense.guide(self, features, structure, mask)
        return image, dense.predict(self.structure_head, guided, structure, self.encoder_stride)

    def _linear_weights(self) -> list[Tensor]:
        """Returns the weights of linear layers that the fused ops read in a forward."""
        branch = self.image_head, self.structure_encoder, self.guidance, self.structure_head
        return linear_weights(self, also=[part for part in branch if part is not None])

    def salience(self, images: Tensor) -> Tensor:
        """Returns the salience of each patch, (B, H / p, W / p) from 0 to 1, by the encoder's method `salience`.

        See `MaskedEncoder.salience`; an encoder of your own can define the method too.

        Raises:
            TypeError: the encoder has no method `salience`.
        """
        return salience_of(self.encoder, images)

    def draw_mask(self, images: Tensor, grid: int | tuple[int, int], **options: Any) -> SelectiveMask:
        """Draws masks for a batch of images by `selective_mask`, on the images' device.

        With masking="salience" it first computes the encoder's `salience` of the images, without gradients.

        Args:
            images: (B, in_chans, H, W), see `forward`.
            grid: number of mask units (rows, columns), or one number for a square grid.
            options: further arguments of `selective_mask`, such as `masking`, `ratio`, `generator`, `adaptive`.

        Returns:
            SelectiveMask, see `selective_mask`.

        Raises:
            TypeError, ValueError: see `selective_mask`; also if the encoder has no method `salience`.
        """
        _check_map("images", images, self.in_chans)
        if options.get("masking") == "salience":
            options["salience"] = self.salience(images)
        elif options.get("generator") is None and options.get("seed") is None:
            options.setdefault("device", images.device)
        return selective_mask(len(images), grid, **options)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[2] // self.encoder_stride, images.shape[3] // self.encoder_stride

    def _known(self, structure: Tensor | None, valid: Tensor | None) -> Tensor | None:
        """Returns the standardised map with unknown pixels set to 0, its mean; None without guidance."""
        if self.guidance is None:
            return None
        check_standardized(structure.detach(), valid)
        return structure if valid is None else torch.where(valid, structure, 0)

    def _branch_changed(self, features: Tensor | VisibleTokens) -> bool:
        """Whether heads and branch must be called as modules, on all tokens, instead of the fused ops; logs why."""
        tokens = features if isinstance(features, Tensor) else features.tokens
        why = unmodified.changed_call(tokens) or branch.changed(self)
        if self.decoder is not None and not why:
            why = decoder.changed(self)
        if why:
            unmodified.warn_once(
                f"the heads and the branch of SGMIM compute all tokens, through PyTorch's modules: {why}"
            )
        return bool(why)

    def _encode(self, images: Tensor, mask: SelectiveMask | DenseMask) -> Tensor | VisibleTokens:
        """Returns the features (B, N, C); with a decoder, those of the visible cells."""
        if self.decoder is not None:
            return self._encode_visible(images, mask)
        if isinstance(mask, DenseMask) or VISIBLE.why(self):
            mask = resize(mask.mask, images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        features = self.encoder(images, mask)
        tokens = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
        down, across = self._grid(images)
        expected = (images.shape[0], down * across, self.encoder.num_features)
        if tuple(tokens.shape) != expected:
            raise ValueError(
                f"encoder returned {tuple(features.shape)}; expected (B, N, C) = {expected} or (B, C, h, w) for "
                f"encoder_stride = {self.encoder_stride}"
            )
        return tokens

    def _encode_visible(self, images: Tensor, mask: SelectiveMask) -> VisibleTokens:
        encoded, expected = self.encoder(images, mask), (mask.visible.index.shape[0], self.encoder.num_features)
        if not isinstance(encoded, VisibleTokens) or tuple(encoded.tokens.shape) != expected:
            raise ValueError(f"encoder returned no VisibleTokens with tokens (visible cells, C) = {expected}")
        return encoded

    def _check(
        self,
        images: Tensor,
        structure: Tensor | None,
        mask: Tensor | SelectiveMask | None,
        structure_valid: Tensor | None,
    ) -> None:
        _check_map("images", images, self.in_chans)
        batch, _, height, width = images.shape
        if batch == 0:
            raise ValueError("images is an empty batch; expected at least one image")
        if height % self.encoder_stride or width % self.encoder_stride:
            raise ValueError(
                f"images has {height}x{width} pixels; expected multiples of the encoder stride {self.encoder_stride}"
            )
        if mask is None:
            hint = ", by name: mask=..." if self.guidance is None and structure is not None else ""
            raise TypeError(
                f"mask is missing; expected a tensor (B, H / p, W / p) or what selective_mask returned{hint}"
            )
        drawn = isinstance(mask, SelectiveMask)
        values = mask.mask if drawn else mask
        if not isinstance(values, Tensor):
            raise TypeError(
                f"mask is a {type(mask).__name__}; expected a tensor (B, H / p, W / p) or what selective_mask returned"
            )
        patches = (batch, height // self.patch_size, width // self.patch_size)
        if drawn:
            fits = values.shape[0] == batch and aligned(values.shape[1:], patches[1:])
            expected = f"{batch} masks on a grid that divides the encoder's {patches[1]}x{patches[2]} patches"
        else:
            fits, expected = tuple(values.shape) == patches, f"(B, H / p, W / p) = {patches}"
            expected += "; of what selective_mask returned pass all, not the field mask alone"
        if not fits:
            raise ValueError(f"mask has shape {tuple(values.shape)}; expected {expected}")
        if values.device != images.device:
            raise ValueError(f"mask is on {values.device}; expected {images.device}, where images is")
        if self.guidance is None:
            return
        if structure is None:
            raise TypeError("structure is missing; expected a map (B, S, H, W), or a model with guidance=False")
        _check_map("structure", structure, self.structure_channels)
        for name, tensor in (("structure", structure), ("structure_valid", structure_valid)):
            if tensor is None:
                continue
            if tensor.shape != (batch, self.structure_channels, height, width):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; expected (B, S, H, W) = "
                    f"{(batch, self.structure_channels, height, width)}, as images"
                )
            if tensor.device != images.device:
                raise ValueError(f"{name} is on {tensor.device}; expected {images.device}, where images is")
        if structure_valid is not None and structure_valid.dtype != torch.bool:
            raise TypeError(f"structure_valid has dtype {structure_valid.dtype}; expected torch.bool")

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides vectors. timm's optimizer factory calls this method."""
        names = getattr(self.encoder, "no_weight_decay", set)()
        positions = (
            {"guidance.pos_embed"} if self.guidance is not None and self.guidance.pos_embed is not None else set()
        )
        decoded = set() if self.decoder is None else {"decoder.mask_token", "decoder.pos_embed"}
        return {f"encoder.{name}" for name in names} | positions | decoded


def _positional_return_losses(positional: tuple[bool, ...], return_losses: bool) -> bool:
    """Returns `return_losses` given as the fourth positional argument, as 0.1 allowed, with a warning."""
    if len(positional) > 1 or return_losses:
        raise TypeError("forward takes images, structure and mask by position; return_losses and the rest by name")
    # stack levels up to the caller: this function, `forward`, two functions of nn.Module, the caller
    warnings.warn("return_losses by position will be refused; pass it by name", FutureWarning, stacklevel=5)
    return positional[0]


def _check_encoder(encoder: nn.Module) -> None:
    kind = type(encoder)
    missing = next((name for name in ("num_features", "in_chans", "patch_size") if not hasattr(encoder, name)), "")
    if kind.__module__.startswith("timm."):
        name = getattr(encoder, "pretrained_cfg", {}).get("architecture", "name")
        raise TypeError(
            f"encoder is timm's {kind.__name__}, which takes no mask; expected a masked encoder: "
            f"sgmim_fast.create_encoder({name!r}, ...), with the arguments of timm.create_model"
        )
    if missing:
        raise TypeError(
            f"encoder is a {kind.__name__} without {missing!r}; expected a masked encoder, of "
            "sgmim_fast.create_encoder(timm_name, ...) or your own with forward(x, mask)"
        )


def _check_decoder(encoder: nn.Module, decoder: nn.Module | None) -> None:
    if decoder is None:
        if getattr(encoder, "visible_only", False):
            raise ValueError(
                "decoder is missing: the encoder sees the visible patches alone, and predicts no masked ones; expected "
                "decoder=sgmim_fast.Decoder(encoder)"
            )
        return
    if not isinstance(decoder, Decoder):
        raise TypeError(f"decoder is a {type(decoder).__name__}; expected sgmim_fast.Decoder(encoder)")
    if not getattr(encoder, "visible_only", False):
        raise ValueError(
            f"decoder is given with a {type(encoder).__name__} that sees masked cells; expected an encoder of "
            "sgmim_fast.create_encoder(timm_name, visible_only=True)"
        )
    fits = decoder.embed.in_features, decoder.prefix_tokens
    if fits != (encoder.num_features, encoder.prefix_tokens):
        raise ValueError(
            f"decoder reads tokens of width {fits[0]} with {fits[1]} prefix tokens; expected those of this encoder, "
            f"{encoder.num_features} and {encoder.prefix_tokens}: sgmim_fast.Decoder(encoder)"
        )


def _with_row_lists(mask: Tensor | SelectiveMask, cells: tuple[int, int]) -> SelectiveMask:
    """Returns the mask with row lists, which an encoder of visible patches needs."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "torch.jit.trace would record this mask's visible patches as constants; expected an encoder that "
            "sees mask tokens, or torch.compile"
        )
    return search(mask, *cells) if isinstance(mask, Tensor) else mask.on(cells)


def _check_map(name: str, tensor: Tensor, channels: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor (B, {channels}, H, W)")
    if tensor.ndim != 4:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected (B, {channels}, H, W)")
    if tensor.shape[1] != channels:
        raise ValueError(f"{name} has {tensor.shape[1]} channels; expected {channels}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected a floating-point dtype, normalised")


def _square(size: int | tuple[int, ...], name: str) -> int:
    """Returns a size given as an int, or as a pair of equal ints, as one int."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"{name} is {size}; expected a square")
    return sides.pop()


def _cells(encoder: nn.Module, stride: int) -> int:
    """Returns the number of cells of an image, for learned positions."""
    size = image_size(encoder)
    if size is None:
        raise ValueError("position_embedding is True; expected an encoder with `img_size`, and this one has none")
    return (size[0] // stride) * (size[1] // stride)
