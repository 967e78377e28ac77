"""Heads for dense prediction: DPT, UPerNet, and the deconvolutions of the MIM depth protocol.

DPT and UPerNet are the decoders of segmentation_models_pytorch, on the maps of `encoder.Features`.
"""

from __future__ import annotations

import itertools
import math

import torch
from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder, DPTSegmentationHead
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from sgmim_fast.errors import UserError, by
from sgmim_fast.finetune.encoder import Features


class DenseModel(nn.Module):
    """An encoder and a head for dense prediction. Use `create_model` to create one.

    Attributes:
        features: encoder, which returns feature maps.
        head: module that maps the feature maps to (B, outputs, h, w).
        multiple: image sides must be multiples of this; `inference.predict` pads images.
        fixed_size: (height, width) if the encoder accepts no other size, else None.
        frozen: whether the encoder is frozen; see `freeze`.
    """

    def __init__(self, features: Features, head: nn.Module, multiple: int) -> None:
        super().__init__()
        self.features = features
        self.head = head
        self.multiple = multiple
        self.fixed_size = features.fixed_size
        self.frozen = False

    def forward(self, images: Tensor) -> Tensor:
        """Computes logits, or the input of `to_depth`, (B, outputs, H, W), from normalised images (B, 3, H, W).

        Raises:
            ValueError: H or W is not a multiple of `multiple`, or differs from `fixed_size`.
        """
        size = tuple(images.shape[2:])
        if self.fixed_size is not None and size != self.fixed_size:
            raise ValueError(f"images must be {by(self.fixed_size)} pixels for {self.features.name}, got {by(size)}")
        if any(side % self.multiple for side in size):
            raise ValueError(f"images must have sides of multiples of {self.multiple} pixels, got {by(size)}")
        out = self.head(self.features(images))
        if out.shape[2:] != size:
            out = F.interpolate(out, size, mode="bilinear", align_corners=False)
        return out

    def freeze(self) -> None:
        """Freezes the encoder: it gets no gradients, and stays in evaluation mode (no stochastic depth)."""
        self.frozen = True
        self.features.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> DenseModel:
        super().train(mode)
        if self.frozen:
            self.features.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.features.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {f"features.{name}" for name in self.features.no_weight_decay()}


def create_model(features: Features, head: str = "dpt", outputs: int = 1, *, channels: int | None = None) -> DenseModel:
    """Creates a model from an encoder and one of three heads.

    All heads accept the maps of stages (each stride is twice the one before) and the maps of a ViT (equal strides):

    - "deconv": the head of the MIM depth protocol (arXiv 2205.13543), on the last map alone; see `Deconvolutions`.
    - "upernet": UPerNet with mmsegmentation's width of 512 and its dropout of 0.1 before the classifier, without the
      auxiliary head. The maps of a ViT are first resized to a pyramid, as in BEiT's segmentation protocol; see
      `Pyramid`. Training needs batches of at least 2, because of a batch norm after pooling to 1x1.
    - "dpt": DPT with 256 fusion channels. As in segmentation_models_pytorch, depth and segmentation use the same kind
      of head. Class tokens, which masked image modelling does not train, are ignored (readout "ignore").

    All heads have batch norms. With few images per process use `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, as
    mmsegmentation does.

    Args:
        features: encoder.
        head: "deconv", "dpt" or "upernet".
        outputs: number of output channels: 1 for depth, the number of classes for segmentation.
        channels: width of the head. None: the width above; for "deconv", an eighth of the last map's channels.

    Raises:
        UserError: the head is unknown, it does not support the encoder's strides, or the encoder's image size is not a
            multiple of the size that both need.
    """
    heads = {"dpt": _dpt, "upernet": _upernet, "deconv": _deconv}
    if head not in heads:
        raise UserError(f"head is {head!r}; expected {', '.join(heads)}")
    module, multiple = heads[head](features, outputs, channels)
    if any(side % multiple for side in features.img_size):
        raise UserError(
            f"img_size is {by(features.img_size)}; expected multiples of {multiple} for {features.name} and the head "
            f"{head}"
        )
    return DenseModel(features, module, multiple)


def to_depth(raw: Tensor, min_depth: float, max_depth: float) -> Tensor:
    """Converts the model's output to depth in metres, float32: min_depth + (max_depth - min_depth) * sigmoid(raw).

    With min_depth = 0 this is the MIM depth protocol's sigmoid(raw) * max_depth. With min_depth = 1 mm the two differ
    by at most 1 mm, and the logarithm in the loss has a finite value and gradient everywhere.
    """
    return min_depth + (max_depth - min_depth) * torch.sigmoid(raw.float())


class Deconvolutions(nn.Module):
    """The head of the MIM depth protocol, on the last map (B, C, h, w).

    It consists of three deconvolutions with 32 filters (kernel and stride 2, batch norm, ReLU), a 3x3 convolution to
    C / 8 channels (batch norm, ReLU), bilinear upsampling to the resolution of the images, and two 3x3 convolutions
    with a ReLU between them. Convolutions are initialised with a standard deviation of 0.001. For SwinV2 of stride 32
    this is the published head (SwinTransformer/MIM-Depth-Estimation, models/model.py, `--num_deconv 3 --num_filters 32
    32 32 --deconv_kernels 2 2 2`; C / 8 is its `embed_dim`), except that it begins with the LayerNorm that the
    published encoder applies to the map. Smaller strides need less upsampling.
    """

    def __init__(self, in_channels: int, stride: int, outputs: int, channels: int, filters: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [LayerNorm2d(in_channels, eps=1e-5)]
        width = in_channels
        for _ in range(3):
            layers += [nn.ConvTranspose2d(width, filters, 2, 2, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
            width = filters
        layers += [nn.Conv2d(width, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        self.decoder = nn.Sequential(*layers)
        self.scale = stride / 8
        self.last = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, outputs, 3, padding=1)
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, std=0.001)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = self.decoder(maps[-1])
        size = [round(side * self.scale) for side in x.shape[2:]]
        while 2 * x.shape[2] <= size[0]:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        if list(x.shape[2:]) != size:  # the stride is not a power of two
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        return self.last(x)


class Pyramid(nn.Module):
    """Resizes four maps of equal stride, as a ViT has them, to 4, 2, 1 and 1/2 times their resolution.

    As in BEiT's segmentation protocol (mmsegmentation's `Feature2Pyramid`), the first map goes through two
    deconvolutions (kernel and stride 2, batch norm and GELU between them), the second through one, the third is
    unchanged, and the last goes through 2x2 max pooling.
    """

    def __init__(self, channels: list[int]) -> None:
        super().__init__()

        def double(width: int) -> nn.Module:
            return nn.ConvTranspose2d(width, width, 2, 2)

        first, second = channels[:2]
        self.scales = nn.ModuleList(
            [
                nn.Sequential(double(first), nn.BatchNorm2d(first), nn.GELU(), double(first)),
                double(second),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [scale(x) for scale, x in zip(self.scales, maps, strict=True)]


class _UPerNet(nn.Module):
    def __init__(self, features: Features, outputs: int, channels: int) -> None:
        super().__init__()
        self.pyramid = Pyramid(features.channels) if features.uniform else nn.Identity()
        # The decoder ignores the first two entries, which are for maps of stride 1 and 2.
        self.decoder = UPerNetDecoder([0, 0, *features.channels], len(features.channels) + 1, channels)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), SegmentationHead(channels, outputs, kernel_size=1))
        initialize_decoder(self.decoder)
        initialize_head(self.classify)

    def forward(self, maps: list[Tensor]) -> Tensor:
        if self.training and maps[0].shape[0] == 1:
            raise ValueError("upernet cannot be trained with one image in a batch; it needs at least 2 in each process")
        skipped = [maps[0]] * 2
        return self.classify(self.decoder([*skipped, *self.pyramid(maps)]))


class _DPT(nn.Module):
    def __init__(self, features: Features, outputs: int, channels: int) -> None:
        super().__init__()
        count = len(features.channels)
        # Nominal strides, by the shape of the pyramid: a ViT with patches of 14 pixels is treated as one of 16, and the
        # output is resized.
        strides = [16] * count if features.uniform else [4 * 2**level for level in range(count)]
        self.decoder = DPTDecoder(
            features.channels,
            strides,
            encoder_has_prefix_tokens=False,
            readout="ignore",
            intermediate_channels=(256, 512, 1024, 1024)[:count],
            fusion_channels=channels,
        )
        self.classify = DPTSegmentationHead(channels, outputs)
        initialize_decoder(self.decoder)
        initialize_head(self.classify)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.classify(self.decoder(maps, [None] * len(maps)))


def _dpt(features: Features, outputs: int, channels: int | None) -> tuple[nn.Module, int]:
    _require_pyramid(features, "dpt")
    return _DPT(features, outputs, channels or 256), _half_of_uniform(features)


def _upernet(features: Features, outputs: int, channels: int | None) -> tuple[nn.Module, int]:
    _require_pyramid(features, "upernet")
    return _UPerNet(features, outputs, channels or 512), _half_of_uniform(features)


def _deconv(features: Features, outputs: int, channels: int | None) -> tuple[nn.Module, int]:
    width, stride = features.channels[-1], features.strides[-1]
    if stride < 8:
        raise UserError(
            f"the head deconv cannot use {features.name}: its last map has stride {stride}; expected 8 or more"
        )
    return Deconvolutions(width, stride, outputs, channels or max(1, width // 8)), math.lcm(*features.strides)


def _half_of_uniform(features: Features) -> int:
    """Returns the stride of the coarsest map, which is doubled for a ViT. Image sides must be multiples of it."""
    return features.strides[-1] * (2 if features.uniform else 1)


def _require_pyramid(features: Features, head: str) -> None:
    strides = features.strides
    doubling = len(strides) >= 3 and all(b == 2 * a for a, b in itertools.pairwise(strides))
    if not doubling and not (features.uniform and len(strides) == 4):
        raise UserError(
            f"the head {head} cannot use {features.name}: its maps have strides {', '.join(map(str, strides))}; "
            "expected three or four that double, such as 4, 8, 16, 32, or four of one stride, such as 16, 16, 16, 16"
        )
