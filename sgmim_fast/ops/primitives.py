"""What a backend is: a small set of primitives, over which every composite op is written once.

`Primitives` declares them. A backend implements them as functions of a module, named in `backends.MODULES`:
`ops._plain` (plain PyTorch, the truth of the others), `ops.cpu.primitives`, `kernels.primitives`. What a backend fuses
it hides inside of a primitive: the GELU behind a gemm is the gemm's epilogue in one, and a pass over its result in
another.

Shapes: n rows, I and O columns before and after a linear layer, C channels. *Storage* is the dtype that gemms are done
and activations kept in. Vectors (norms' weights, biases) may have any floating-point dtype. *Partial sums* are what a
backend has of a sum over rows when its kernels are done, (parts, ...) or all of it, which only `finish` reads.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sgmim_fast.ops import gemm


class Norm(NamedTuple):
    """Rows to normalise."""

    x: Tensor  # (n, C)
    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    rows: Tensor | None = None  # (m,) which rows of x; None: all
    residual: Tensor | None = None  # (m, C), added to what is normalised


class NormGradient(NamedTuple):
    """The backward of a `Norm`."""

    dy: Tensor  # (m, C) in storage, of the normalised rows; may be overwritten, unless `keep`
    x: Tensor
    statistics: Tensor
    weight: Tensor
    bias: Tensor
    rows: Tensor | None = None
    more: Tensor | None = None  # (m, C) in storage, added to dy
    residual: Tensor | None = None  # (m, C), added to dx
    again: bool = True  # whether the normalised rows are wanted once more
    wanted: bool = True  # whether dx is
    sum_residual: bool = False  # whether the residual's sum over rows is wanted
    sum_dx: bool = False  # whether that of dx and residual is
    keep: bool = False


class NormGradients(NamedTuple):
    """What the backward of a norm gives; what was not asked for is None, or not to be used."""

    dx: Tensor  # + residual, like x: where there are rows, 0 in the others
    y: Tensor | None  # (m, C) in storage: what the forward gave
    weight: Any  # partial sums over rows, (C,), as the following
    bias: Any
    residual: Any = None
    dx_sum: Any = None


class Windows(NamedTuple):
    """The arguments of `ops.window_attention` but for qkv."""

    bias: Tensor | None
    index: Tensor | None
    logit_scale: Tensor | None
    pad: Tensor | None
    heads: int
    window: list[int]
    shift: list[int]


class Packed(NamedTuple):
    """Which rows an attention of packed tokens is between, see `ops.relational_guidance`."""

    visible: Tensor
    visible_offsets: Tensor
    shown: Tensor
    shown_offsets: Tensor
    cells: int  # of an image
    heads: int
    keep: bool  # whether the hidden cells take part


class Request(NamedTuple):
    """What an op asks of a backend, which may say no."""

    dtypes: tuple[torch.dtype, ...]
    widths: tuple[int, ...] = ()  # of rows that are normalised or written by one program
    embedding: tuple[int, int, int] | None = None  # width and pixels of an embedded patch, mergings
    window: tuple[int, int] | None = None  # tokens of a window, channels of a head


class Primitives(Protocol):
    """The functions of a backend's module."""

    LOOKS_AT_INDICES: bool  # whether the kernels raise for indices that point outside, or clamp them

    def takes(self, request: Request) -> tuple[bool, str]:
        """Whether the backend can, and the reason where it cannot."""

    def weights_in(self, dtype: torch.dtype, *weights: Tensor | None, last: bool = False) -> list[Tensor | None]:
        """Weights and biases as gemms of activations in `dtype` read them, see `ops.weights`; a backend whose gemms
        read wider ones gives them as they are. last: nobody of this step reads them after this."""

    def batches_wgrads(self) -> bool:
        """Whether `wgrads` of several layers at once is faster than one after the other, which needs less memory."""

    def linears(self, xs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """fprop of several layers: x (n, I) . weight (O, I)^T, all in storage."""

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """fprop: x . weight^T + bias + residual (n, O) in `dtype`, that of x if None; the residual is not rounded."""

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """fprop: the pre-activation x . weight^T + bias, and GELU of it (the exact one), (n, O) in storage."""

    def linear_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor,
        rows: Tensor,
        norm: tuple[Tensor, Tensor, float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """fprop and the norm (weight, bias, eps) behind it: t = x . weight^T + bias + residual[rows], its norm y, both
        (n, O) in storage, and y's statistics."""

    def dgrads(self, dys: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """dgrad of several layers: dy (n, O) . weight (O, I), all in storage."""

    def dgrad(self, dy: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        """dgrad of one layer, to which what its input gets elsewhere is added: dy (n, O) . weight (O, I), in storage,
        + residual (n, I), in the wider dtype of the two; the residual is not rounded."""

    def dgrad_gelu(self, dy: Tensor, weight: Tensor, pre_activation: Tensor) -> tuple[Tensor, Tensor, Any]:
        """dgrad through a layer and the GELU before it, of `pre_activation` (n, I): the gradient of that, GELU of it
        once more, and the partial sums over rows of the former."""

    def wgrads(self, dys: Sequence[Tensor], xs: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """wgrad of several layers: dy (n, O)^T . x (n, I) from storage, in the dtype of each or that of its sum."""

    def layer_norms(self, norms: Sequence[Norm], eps: float, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """The normalised rows + residual of each, (m, C) in `dtype`, and statistics (2, m): mean and
        1 / sqrt(var + eps)."""

    def layer_norms_backward(self, gradients: Sequence[NormGradient]) -> list[NormGradients]:
        """Gradients of norms, all of which ask for the same sums."""

    def column_sums(self, xs: Sequence[Tensor]) -> list[Any]:
        """Partial sums over the rows of each (n, C)."""

    def finish(self, sums: Sequence[Any], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """Partial sums' results, in these dtypes; no two share memory."""

    def guidance_attention(self, q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
        """Attention of each image's visible rows q (visible, C) over its shown keys, of k and v (shown + 1, C), and the
        last key for all its hidden cells: (visible, C), and the logsumexp of the logits, (2, visible, heads), in two
        parts: the largest logit, and the rest. In one number the backward's softmax would not sum to 1: the last place
        of logits in the hundreds is 1e-5."""

    def guidance_attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, packed: Packed
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""

    def window_attention(self, qkv: Tensor, w: Windows) -> Tensor:
        """See `ops.window_attention`."""

    def window_attention_backward(
        self, grad: Tensor, qkv: Tensor, w: Windows, wanted: Container[str]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Gradient of qkv, and partial sums of those of "bias", "logit_scale" and "pad" that are wanted, and of
        "qkv_bias", which was added to qkv and is `pad`, where there is any: over all tokens, and those outside."""

    def position_bias(self, a: Any) -> tuple[Tensor, Tensor]:
        """The table of `ops.position_bias` of arguments `a`, and its derivative by the logits, both (entries, heads)
        in `a.dtype`."""

    def position_bias_backward(self, grad: Tensor, slope: Tensor, a: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of fc1_weight, fc1_bias and fc2_weight; `slope` is what `position_bias` gave."""

    def embed(self, cells: Any, weight: Tensor | None, eps: float) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The first mergings of `ops.structure_embed`, as many as `embedded` says, with all that comes before them.

        Returns their tokens, the tokens that each but the first has read, and statistics (2, rows): of the embedded
        patches, then of each merging. `cells`: a `structure_embed.Cells`. weight: the first merging's in storage.
        """

    def embedded(self, cells: Any) -> int:
        """How many mergings `embed` does."""

    def embed_backward(
        self, dx: Tensor, cells: Any, weight: Tensor | None, inputs: list[Tensor], statistics: list[Tensor],
        gradients: Gradients,
    ) -> Tensor | None:  # fmt: skip
        """Gives the gradients of the parameters that `embed` reads, and returns that of the patches of "structure", if
        it is wanted."""

    def place_tokens(
        self, tokens: Tensor, visible: Tensor, token: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float,
        rows: int, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(rows, D) in `dtype`: the tokens (n, D), normalised, in the rows `visible`, and `token` (D,) in all others;
        and the norm's statistics."""

    def place_tokens_backward(
        self, dout: Tensor, tokens: Tensor | None, statistics: Tensor | None, visible: Tensor,
        norm: tuple[Tensor, Tensor] | None, dtype: torch.dtype,
    ) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
        """Gradient of the tokens in `dtype`, and the partial sums for "mask_token", "bias" (of that gradient) and the
        norm's "norm_weight" and "norm_bias"."""

    def linear_l1(self, a: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The scaled sum of `ops.linear_l1` of arguments `a`, and the signs of the differences, (n, O) int8; of
        `ops.linear_l2` the differences themselves, in the weight's dtype."""

    def linear_l1_backward(
        self, grad: Tensor, a: Any, weight: Tensor, differences: Tensor, gradients: Gradients
    ) -> None:
        """Gives the gradients of "x", "weight" and "bias" that are wanted."""


class Gradients:
    """What a composition's backward gives, by the names of the arguments; what nobody wants is not computed.

    wgrads may wait until all are known, and sums over rows do, if that is faster.
    """

    def __init__(self, primitives: Primitives, wanted: dict[str, Tensor]):
        self._p, self.wanted = primitives, wanted
        self._found: dict[str, Tensor] = {}
        self._sums: dict[str, Any] = {}
        self._waiting: dict[str, tuple[Tensor, Tensor]] = {}
        self._scaled: tuple[Tensor, str, Tensor, str, Tensor | None] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.wanted

    def __setitem__(self, name: str, gradient: Tensor | None) -> None:
        if name in self.wanted:
            self._found[name] = gradient

    def weight(self, name: str, dy: Tensor, x: Tensor | None) -> None:
        """Of a linear layer's weight: dy (n, O)^T . x (n, I)."""
        if name in self.wanted:
            if self._p.batches_wgrads():
                self._waiting[name] = dy, x
            else:
                (self._found[name],) = self._p.wgrads([dy], [x], [self.wanted[name].dtype])

    def sums(self, sums: dict[str, Any]) -> None:
        """Partial sums over rows."""
        self._sums |= {name: total for name, total in sums.items() if name in self.wanted}

    def norm(self, weight: str, bias: str, norm: NormGradients) -> None:
        """Of a norm's two."""
        self.sums({weight: norm.weight, bias: norm.bias})

    def scaled(self, scale: Tensor | None, weight: str, w: Tensor, bias: str, b: Tensor | None) -> None:
        """What will be given of a layer's weight and bias is that of scale * w and scale * b, see `scaled_weights`. The
        gradient of "layer_scale" follows from both."""
        if scale is None:
            return
        self._scaled = scale, weight, w, bias, b
        if "layer_scale" in self.wanted:
            self.wanted = self.wanted | {weight: w} | ({} if b is None else {bias: b})

    def _unscale(self) -> None:
        """d(scale * w) to dw and dscale."""
        scale, weight, w, bias, b = self._scaled
        dweight, dbias = self._found.get(weight), self._found.get(bias)
        if "layer_scale" in self.wanted:
            total = torch.bmm(dweight.unsqueeze(1), w.to(dweight.dtype).unsqueeze(2)).flatten()
            self._found["layer_scale"] = total if b is None else total.addcmul_(dbias, b)
        if dweight is not None:
            self._found[weight] = dweight * scale[:, None]
        if dbias is not None:
            self._found[bias] = dbias * scale

    def _multiply(self) -> None:
        if self._waiting:
            dys, xs = zip(*self._waiting.values(), strict=True)
            dtypes = [self.wanted[name].dtype for name in self._waiting]
            self._found |= zip(self._waiting, self._p.wgrads(dys, xs, dtypes), strict=True)
            self._waiting.clear()

    def finished(self) -> dict[str, Tensor]:
        """All of them, each as its argument is, contiguous."""
        self._multiply()
        if self._sums:
            dtypes = [self.wanted[name].dtype for name in self._sums]
            self._found |= zip(self._sums, self._p.finish(list(self._sums.values()), dtypes), strict=True)
        if self._scaled is not None:
            self._unscale()
        for name, gradient in self._found.items():
            like = self.wanted[name]
            if gradient.dtype != like.dtype:
                gradient = gradient.to(like.dtype)
            gradient = gradient.contiguous()
            self._found[name] = gradient if gradient.shape == like.shape else gradient.view(like.shape)
        return self._found


def absent(like: Tensor) -> Tensor:
    """Stands in a backward's results for a gradient nobody asked for; results must be tensors, and must not alias."""
    return like.new_empty(0)


def storage_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What gemms are done and activations kept in, where `dtype` or else that of `x` is asked for."""
    return gemm.compute_dtype(dtype or x.dtype, x.device)


def result_dtype(
    x: Tensor, residual: Tensor | None, dtype: torch.dtype | None, scale: Tensor | None = None
) -> torch.dtype:
    """As of scale * (a layer's result in `dtype`, or else that of x) + residual in PyTorch."""
    wanted = dtype or x.dtype
    for other in (scale, residual):
        wanted = wanted if other is None else torch.promote_types(wanted, other.dtype)
    return wanted


def scaled_weights(
    p: Primitives, scale: Tensor | None, dtype: torch.dtype, weight: Tensor, *bias: Tensor | None, last: bool = False
) -> list[Tensor | None]:
    """`weights_in` of a layer whose result is multiplied by `scale` (O,), layer scale: of scale * weight and bias."""
    if scale is None:
        return p.weights_in(dtype, weight, *bias, last=last)
    factors = (scale[:, None], scale)  # one launch each: cast as they are written
    return [
        None
        if t is None
        else torch.mul(t, by, out=torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format))
        for t, by in zip((weight, *bias), factors, strict=False)
    ]


def unflattened(rows: Tensor, like: Tensor) -> Tensor:
    """Rows (n, O) in the shape of `like`, (..., C): (..., O). The result of an op must be no view to autograd, or
    nobody could change it in place."""
    return torch.ops.aten._unsafe_view.default(rows, (*like.shape[:-1], rows.shape[1]))


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and statistics are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalized(
    p: Primitives, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """What a layer behind a norm reads, in `dtype`, and the statistics; without a norm x itself, and nothing."""
    if weight is None:
        return x.to(dtype).contiguous(), []
    ((y, statistics),) = p.layer_norms([Norm(x, weight, bias)], eps, dtype)
    return y, [statistics]


def normalized_backward(
    p: Primitives, dy: Tensor | None, x: Tensor, statistics: list[Tensor], a: Any, gradients: Gradients,
    dtype: torch.dtype, *, again: bool, residual: Tensor | None = None, residual_bias: str = "",
) -> Tensor | None:  # fmt: skip
    """Gives the gradients of "x" and of the norm's two, and returns what the layer read, if `again`.

    residual: what is added to the gradient of x in the norm's backward; without a norm `first_dgrad` has added it.
    residual_bias: the vector whose gradient is the sum of the residual's rows.
    """
    if a.norm_weight is None:
        if dy is not None:
            gradients["x"] = dy
        return x.to(dtype).contiguous() if again else None
    norm = NormGradient(dy, x, *statistics, a.norm_weight, a.norm_bias, residual=residual, again=again)
    summed = residual is not None and residual_bias in gradients
    (found,) = p.layer_norms_backward([norm._replace(sum_residual=summed)])
    gradients["x"] = found.dx
    gradients.norm("norm_weight", "norm_bias", found)
    if summed:
        gradients.sums({residual_bias: found.residual})
    return found.y


def before(p: Primitives, a: Any, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """What the first layer of a half of a block reads, and the norm's statistics, if there is one before it.

    `a`: arguments with norm_weight, norm_bias, eps, residual, post_norm and dtype; `rows`: its x. Then `behind` is what
    ends the half, and `behind_backward` and `before_backward` are their backwards.
    """
    return normalized(p, rows, None if a.post_norm else a.norm_weight, a.norm_bias, a.eps, dtype)


def behind(
    p: Primitives, a: Any, rows: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """The last layer, the norm if it comes after it, and the residual; statistics and argument of that norm."""
    added = rows if a.residual else None
    dtype = result_dtype(rows, added, a.dtype, a.layer_scale)
    if not a.post_norm or a.norm_weight is None:
        return p.linear(x, weight, bias, residual=added, dtype=dtype), []
    t = p.linear(x, weight, bias)
    ((out, statistics),) = p.layer_norms([Norm(t, a.norm_weight, a.norm_bias, residual=added)], a.eps, dtype)
    return out, [statistics, t]


def behind_backward(
    p: Primitives, a: Any, saved: list[Tensor], grad: Tensor, dtype: torch.dtype, bias: str, gradients: Gradients
) -> tuple[Tensor, Tensor | None]:
    """From the gradient of the half's result that of the last layer's, in `dtype`, and what x gets itself, unrounded.
    Gives the gradient of the layer's `bias`, unless the backward of a norm before it can, and of a norm behind it."""
    added, grad = grad, grad.to(dtype).contiguous()
    if torch.promote_types(dtype, added.dtype) == dtype:
        added = grad
    if a.post_norm and a.norm_weight is not None:
        statistics, t = saved
        norm = NormGradient(grad, t, statistics, a.norm_weight, a.norm_bias, again=False, sum_dx=True, keep=True)
        (found,) = p.layer_norms_backward([norm])
        gradients.norm("norm_weight", "norm_bias", found)
        gradients.sums({bias: found.dx_sum})
        return found.dx, added if a.residual else None
    if bias in gradients and not (a.residual and a.norm_weight is not None):
        gradients.sums({bias: p.column_sums([grad])[0]})
    return grad, added if a.residual else None


def first_dgrad(
    p: Primitives, a: Any, dy: Tensor, weight: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """dgrad of the first layer of a half, and what is left to be added to the gradient of x: `added`, where there is a
    norm before the layer, whose backward adds it."""
    if added is None or (a.norm_weight is not None and not a.post_norm):
        return p.dgrads([dy], [weight])[0], added
    return p.dgrad(dy, weight, added), None


def before_backward(
    p: Primitives, a: Any, saved: list[Tensor], rows: Tensor, dy: Tensor | None, added: Tensor | None,
    weight: str, bias: str, gradients: Gradients, dtype: torch.dtype,
) -> Tensor | None:  # fmt: skip
    """Gives the gradient of "x" and of a norm before the first layer, and returns what that read, for its `weight`."""
    again = weight in gradients
    if a.post_norm:  # no norm here
        a = a._replace(norm_weight=None)
    return normalized_backward(p, dy, rows, saved, a, gradients, dtype, again=again, residual=added, residual_bias=bias)
