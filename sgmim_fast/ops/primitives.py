"""The interface of a backend: a small set of primitives, over which every composite op is written once.

`Primitives` declares them. A backend implements them as functions of a module named in `backends.MODULES`: `ops._plain`
(plain PyTorch, against which the others are tested), `ops.cpu.primitives`, `kernels.primitives`. Each backend decides
what to fuse inside of a primitive: the GELU after a gemm is the gemm's epilogue in one, and a separate pass over its
result in another.

Shapes: n or m rows, I and O features before and after a linear layer, C channels. *Storage* is the dtype in which gemms
are computed and activations kept. Vectors (weights and biases of norms, biases of layers) may have any floating-point
dtype. *Partial sums* are a sum over rows that a backend's kernels may have left unfinished, (parts, ...); only `finish`
reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sgmim_fast.ops import gemm


class Norm(NamedTuple):
    """Rows to normalise, optionally gathered from x and added to a residual."""

    x: Tensor  # (n, C)
    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    rows: Tensor | None = None  # (m,) indices into the rows of x; None: all rows
    residual: Tensor | None = None  # (m, C), added to the normalised rows


class NormGradient(NamedTuple):
    """The backward of a `Norm`: its inputs and which results to compute."""

    dy: Tensor  # (m, C) in storage, gradient of the normalised rows; may be overwritten, unless `keep_dy`
    x: Tensor
    statistics: Tensor
    weight: Tensor
    bias: Tensor
    rows: Tensor | None = None
    dy2: Tensor | None = None  # (m, C) in storage, a second gradient that is added to dy
    residual: Tensor | None = None  # (m, C), added to dx
    recompute: bool = True  # whether to recompute and return the normalised rows
    need_dx: bool = True  # whether to compute dx
    sum_residual: bool = False  # whether to sum the residual over rows
    sum_dx: bool = False  # whether to sum dx + residual over rows
    keep_dy: bool = False


class NormGradients(NamedTuple):
    """The results of a norm's backward. A result that was not requested is None, or unspecified."""

    dx: Tensor  # dx + residual, shaped as x; with `rows`, 0 in the other rows
    y: Tensor | None  # (m, C) in storage: the normalised rows
    weight: Any  # partial sums over rows, (C,), as all that follow
    bias: Any
    residual: Any = None
    dx_sum: Any = None


class Windows(NamedTuple):
    """The arguments of `ops.window_attention` other than qkv."""

    bias: Tensor | None
    index: Tensor | None
    logit_scale: Tensor | None
    pad: Tensor | None
    heads: int
    window: list[int]
    shift: list[int]


class Packed(NamedTuple):
    """The rows of queries and keys in an attention of packed tokens, see `ops.relational_guidance`."""

    visible: Tensor
    visible_offsets: Tensor
    shown: Tensor
    shown_offsets: Tensor
    cells: int  # per image
    heads: int
    keep: bool  # whether the hidden cells take part in the attention


class Request(NamedTuple):
    """The properties of a call by which a backend decides whether it can run it."""

    dtypes: tuple[torch.dtype, ...]
    widths: tuple[int, ...] = ()  # of the rows that one program normalises or writes
    embedding: tuple[int, int, int] | None = None  # width and pixels of an embedded patch, number of mergings
    window: tuple[int, int] | None = None  # tokens of a window, channels of a head


class Primitives(Protocol):
    """The functions that a backend's module defines."""

    CHECKS_INDICES: bool  # whether the kernels themselves raise for indices out of range, or clamp them

    def takes(self, request: Request) -> tuple[bool, str]:
        """Whether the backend can run the request, and the reason if it cannot."""

    def weights_in(self, dtype: torch.dtype, *weights: Tensor | None, last: bool = False) -> list[Tensor | None]:
        """Returns weights and biases as gemms of activations in `dtype` read them, see `ops.weights`.

        A backend whose gemms read weights of another dtype may return them as they are. last: whether nothing reads
        them later in this step.
        """

    def batches_wgrads(self) -> bool:
        """Whether one `wgrads` of several layers is faster than one per layer, which needs less memory."""

    def linears(self, xs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """fprop of several layers: x (n, I) . weight (O, I)^T, all in storage."""

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        residual: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """fprop: (x . weight^T + bias) * scale + residual (n, O) in `dtype`, by default x's. scale: (O,), layer scale;
        neither it nor the residual is rounded to x's dtype."""

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """fprop: the pre-activation x . weight^T + bias, and its exact GELU, both (n, O) in storage."""

    def linear_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor,
        rows: Tensor,
        norm: tuple[Tensor, Tensor, float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """fprop and a norm (weight, bias, eps) of its result: returns t = x . weight^T + bias + residual[rows], its
        norm y, both (n, O) in storage, and the norm's statistics."""

    def dgrads(self, dys: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """dgrad of several layers: dy (n, O) . weight (O, I), all in storage."""

    def dgrad(self, dy: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        """dgrad of one layer: dy (n, O) . weight (O, I), in storage, + residual (n, I), another gradient of the layer's
        input, which is not rounded; in the wider dtype of dy and residual."""

    def dgrad_gelu(self, dy: Tensor, weight: Tensor, pre_activation: Tensor) -> tuple[Tensor, Tensor, Any]:
        """dgrad through a layer and the GELU before it: returns the gradient of `pre_activation` (n, I), GELU of
        `pre_activation`, and partial sums of that gradient over rows."""

    def wgrads(self, dys: Sequence[Tensor], xs: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """wgrad of several layers: dy (n, O)^T . x (n, I) from storage, in `dtypes`, or the accumulator dtype."""

    def layer_scale_backward(
        self, scale: Tensor, weight: Tensor, dweight: Tensor, bias: Tensor | None, dbias: Tensor | None
    ) -> Tensor:
        """From the gradients of scale * weight (O, I) and scale * bias (O,), computes those of weight and bias in
        place, and returns that of the scale (O,)."""

    def layer_norms(self, norms: Sequence[Norm], eps: float, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Returns the normalised rows + residual of each, (m, C) in `dtype`, and statistics (2, m): mean and
        1 / sqrt(var + eps)."""

    def layer_norms_backward(self, gradients: Sequence[NormGradient]) -> list[NormGradients]:
        """Returns the gradients of several norms, all of which request the same sums."""

    def column_sums(self, xs: Sequence[Tensor]) -> list[Any]:
        """Returns partial sums over the rows of each x (n, C)."""

    def finish(self, sums: Sequence[Any], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """Returns the finished sums in these dtypes; no two results share memory."""

    def guidance_attention(self, q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
        """Attention of each image's visible rows of q (visible, C) over its shown keys, with k and v (shown + 1, C).
        The last key stands for all hidden cells of the image.

        Returns the result (visible, C), and the logsumexp of the logits (2, visible, heads) in two parts, the largest
        logit and the rest. As one number it would be too coarse for the backward's softmax to sum to 1: the last place
        of logits in the hundreds is 1e-5."""

    def guidance_attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, packed: Packed
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of q, k and v."""

    def window_attention(self, qkv: Tensor, w: Windows) -> Tensor:
        """See `ops.window_attention`."""

    def window_attention_backward(
        self, grad: Tensor, qkv: Tensor, w: Windows, wanted: Container[str], out: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns the gradient of qkv, and partial sums of the gradients of "bias", "logit_scale" and "pad" as far as
        `wanted`, and of "qkv_bias", the bias that was added to qkv and is also `pad` where windows stick out: a sum
        over all tokens, including those outside the grid. out: if given, the attention's result is written to it."""

    def position_bias(self, a: Any) -> tuple[Tensor, Tensor]:
        """Returns the table of `ops.position_bias` and its derivative by the logits, both (entries, heads) in
        `a.dtype`."""

    def position_bias_backward(self, grad: Tensor, slope: Tensor, a: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of fc1_weight, fc1_bias and fc2_weight. slope: the derivative from `position_bias`."""

    def embed(self, cells: Any, weight: Tensor | None, eps: float) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Computes the structure encoder of `ops.structure_embed` up to the merging that `embedded` returns.

        Returns the tokens, the inputs of all its mergings but the first, and the statistics (2, rows) of the embedded
        patches and of each merging. cells: a `structure_embed.Cells`. weight: the first merging's, in storage.
        """

    def embedded(self, cells: Any) -> int:
        """Returns the number of mergings that `embed` computes."""

    def embed_backward(
        self, dx: Tensor, cells: Any, weight: Tensor | None, inputs: list[Tensor], statistics: list[Tensor],
        gradients: Gradients,
    ) -> Tensor | None:  # fmt: skip
        """Stores the gradients of the parameters that `embed` reads in `gradients`, and returns the gradient of the
        patches of "structure", if it is wanted."""

    def place_tokens(
        self, tokens: Tensor, visible: Tensor, token: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float,
        rows: int, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Returns (rows, D) in `dtype` with the tokens (n, D), normalised if there is a norm, in the rows `visible` and
        `token` (D,) in the others; and the norm's statistics."""

    def place_tokens_backward(
        self, dout: Tensor, tokens: Tensor | None, statistics: Tensor | None, visible: Tensor,
        norm: tuple[Tensor, Tensor] | None, dtype: torch.dtype,
    ) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
        """Returns the gradient of the tokens in `dtype`, and partial sums for "mask_token", "bias" (the sum of the
        tokens' gradient), "norm_weight" and "norm_bias"."""

    def linear_l1(self, a: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the scaled sum of `ops.linear_l1` of the arguments `a`, and the signs of the differences, (n, O)
        int8; for `ops.linear_l2` the differences themselves, in the weight's dtype."""

    def linear_l1_backward(
        self, grad: Tensor, a: Any, weight: Tensor, differences: Tensor, gradients: Gradients
    ) -> None:
        """Stores the gradients of "x", "weight" and "bias" that are wanted in `gradients`."""


class Gradients:
    """Collects the gradients of a composition's backward by the arguments' names; unwanted ones are not computed.

    Sums over rows are finished together at the end, and wgrads are computed there too if batching them is faster.
    """

    def __init__(self, primitives: Primitives, wanted: dict[str, Tensor]):
        self._p, self.wanted = primitives, wanted
        self._found: dict[str, Tensor] = {}
        self._sums: dict[str, Any] = {}
        self._waiting: dict[str, tuple[Tensor, Tensor]] = {}
        self._scaled: tuple[Tensor, str, Tensor, str, Tensor | None] | None = None
        self._computed: dict[str, Callable[[Tensor], None]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.wanted

    def __setitem__(self, name: str, gradient: Tensor | None) -> None:
        if name in self.wanted:
            self._found[name] = gradient

    def weight(self, name: str, dy: Tensor, x: Tensor | None) -> None:
        """Adds the gradient of a linear layer's weight: dy (n, O)^T . x (n, I)."""
        if name in self.wanted:
            if self._p.batches_wgrads():
                self._waiting[name] = dy, x
            else:
                (self._found[name],) = self._p.wgrads([dy], [x], [self.wanted[name].dtype])

    def sums(self, sums: dict[str, Any]) -> None:
        """Adds gradients that are partial sums over rows."""
        self._sums |= {name: total for name, total in sums.items() if name in self.wanted}

    def norm(self, weight: str, bias: str, norm: NormGradients) -> None:
        """Adds the gradients of a norm's weight and bias."""
        self.sums({weight: norm.weight, bias: norm.bias})

    def scaled(self, scale: Tensor | None, weight: str, w: Tensor, bias: str, b: Tensor | None) -> None:
        """Declares that gradients added for a layer's weight and bias are those of scale * w and scale * b, i.e. of the
        result before the scale. `finished` converts them, and computes the gradient of "layer_scale" from both."""
        if scale is None:
            return
        self._scaled = scale, weight, w, bias, b
        if "layer_scale" in self.wanted:
            self.wanted = self.wanted | {weight: w} | ({} if b is None else {bias: b})

    def computed(self, name: str, value: Tensor, backward: Callable[[Tensor], None]) -> None:
        """Declares that sums added as `name` are the gradient of a tensor that the forward computed. It is passed to
        `backward`, shaped as `value`, once it is finished."""
        self.wanted, self._computed[name] = self.wanted | {name: value}, backward

    def _unscale(self) -> None:
        """Converts the gradients of scale * w and scale * b to those of w, b and the scale."""
        scale, weight, w, bias, b = self._scaled
        dweight, dbias = self._found.get(weight), self._found.get(bias)
        if dweight is not None:
            self["layer_scale"] = self._p.layer_scale_backward(scale, w, dweight, b, dbias)
        elif dbias is not None:
            self._found[bias] = dbias * scale

    def _multiply(self) -> None:
        if self._waiting:
            dys, xs = zip(*self._waiting.values(), strict=True)
            dtypes = [self.wanted[name].dtype for name in self._waiting]
            self._found |= zip(self._waiting, self._p.wgrads(dys, xs, dtypes), strict=True)
            self._waiting.clear()

    def finished(self) -> dict[str, Tensor]:
        """Returns all gradients, contiguous, each with the shape and dtype of its argument."""
        self._multiply()
        if self._sums:
            dtypes = [self.wanted[name].dtype for name in self._sums]
            self._found |= zip(self._sums, self._p.finish(list(self._sums.values()), dtypes), strict=True)
        while self._computed:  # emptied: a cycle of references would keep the gradients alive, and autograd copy them
            name, backward = self._computed.popitem()
            backward(self._found.pop(name).view(self.wanted[name].shape))
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
    """Returns a placeholder for an unwanted gradient: results of a backward must be tensors and must not alias."""
    return torch.empty(0, dtype=like.dtype, device=like.device)


def rows_of(x: Tensor) -> Tensor:
    """Returns x (..., C) as (n, C)."""
    if x.ndim == 2:
        return x
    return x.view(-1, x.shape[-1]) if x.is_contiguous() else x.flatten(0, -2)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x in `dtype`. PyTorch is called only if it has another: on a CPU, each call takes microseconds after a
    gemm, which evicts PyTorch's code from the caches."""
    return x if x.dtype is dtype else x.to(dtype)


def float32(*shape: int) -> Tensor:
    """Returns an uninitialised float32 tensor on the CPU, whatever PyTorch's default dtype is."""
    return torch.empty(shape, dtype=torch.float32)


def wider(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return a if a is b else torch.promote_types(a, b)


def storage_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Returns the dtype of gemms and activations for a call in `dtype`, by default that of `x`."""
    return gemm.compute_dtype(dtype or x.dtype, x.device)


def result_dtype(
    x: Tensor, residual: Tensor | None, dtype: torch.dtype | None, scale: Tensor | None = None
) -> torch.dtype:
    """Returns PyTorch's dtype of scale * y + residual, y being a layer's result in `dtype`, by default that of x."""
    wanted = dtype or x.dtype
    for other in (scale, residual):
        wanted = wanted if other is None else wider(wanted, other.dtype)
    return wanted


def scaled_weight(p: Primitives, scale: Tensor | None, dtype: torch.dtype, weight: Tensor) -> Tensor:
    """Returns scale * weight as a dgrad in `dtype` reads it, for a layer whose result is multiplied by layer scale
    (O,), or the weight if there is no scale."""
    (weight,) = p.weights_in(dtype, weight, last=True)  # releases the copy that the forward kept
    return weight if scale is None else torch.mul(weight, scale[:, None], out=torch.empty_like(weight, dtype=dtype))


def unflattened(rows: Tensor, like: Tensor) -> Tensor:
    """Returns rows (n, O) as (..., O), where `like` is (..., C). An op's result must not be a view to autograd, which
    would forbid changing it in place."""
    return torch.ops.aten._unsafe_view.default(rows, (*like.shape[:-1], rows.shape[1]))


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the accumulator dtype of sums and statistics: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalized(
    p: Primitives, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Returns the input of a layer after an optional norm, in `dtype`, and the norm's statistics, [] without a norm."""
    if weight is None:
        return cast(x, dtype).contiguous(), []
    ((y, statistics),) = p.layer_norms([Norm(x, weight, bias)], eps, dtype)
    return y, [statistics]


def normalized_backward(
    p: Primitives, dy: Tensor | None, x: Tensor, statistics: list[Tensor], a: Any, gradients: Gradients,
    dtype: torch.dtype, *, recompute: bool, residual: Tensor | None = None, residual_bias: str = "",
) -> Tensor | None:  # fmt: skip
    """Stores the gradients of "x" and of the norm's parameters.

    recompute: whether to return the layer's input.
    residual: added to the gradient of x in the norm's backward; only with a norm.
    residual_bias: name of the vector whose gradient is the sum of the residual's rows.
    """
    if a.norm_weight is None:
        if dy is not None:
            gradients["x"] = dy
        return cast(x, dtype).contiguous() if recompute else None
    norm = NormGradient(dy, x, *statistics, a.norm_weight, a.norm_bias, residual=residual, recompute=recompute)
    summed = residual is not None and residual_bias in gradients
    (found,) = p.layer_norms_backward([norm._replace(sum_residual=summed)])
    gradients["x"] = found.dx
    gradients.norm("norm_weight", "norm_bias", found)
    if summed:
        gradients.sums({residual_bias: found.residual})
    return found.y


def half_input(p: Primitives, a: Any, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Returns the input of the first layer of a residual branch (attention or MLP of a block), and pre-norm statistics.

    `a`: arguments with norm_weight, norm_bias, eps, residual, post_norm and dtype; `rows`: its x. `half_output`
    ends the branch; both have a backward.
    """
    return normalized(p, rows, None if a.post_norm else a.norm_weight, a.norm_bias, a.eps, dtype)


def half_output(
    p: Primitives, a: Any, rows: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Computes the last layer, a post-norm and the residual; returns the result and what a post-norm saves."""
    added = rows if a.residual else None
    dtype = result_dtype(rows, added, a.dtype, a.layer_scale)
    if not a.post_norm or a.norm_weight is None:
        return p.linear(x, weight, bias, scale=a.layer_scale, residual=added, dtype=dtype), []
    t = p.linear(x, weight, bias)
    ((out, statistics),) = p.layer_norms([Norm(t, a.norm_weight, a.norm_bias, residual=added)], a.eps, dtype)
    return out, [statistics, t]


def half_output_backward(
    p: Primitives, a: Any, saved: list[Tensor], grad: Tensor, dtype: torch.dtype, bias: str, gradients: Gradients
) -> tuple[Tensor, Tensor | None]:
    """From the gradient of the branch's result, returns that of the last layer's in `dtype`, and the residual's
    gradient of x, not rounded. Stores the gradients of a post-norm, and of the layer's `bias`, unless
    `half_input_backward` does."""
    added, grad = grad, cast(grad, dtype).contiguous()
    if wider(dtype, added.dtype) == dtype:
        added = grad
    if a.post_norm and a.norm_weight is not None:
        statistics, t = saved
        norm = NormGradient(grad, t, statistics, a.norm_weight, a.norm_bias, recompute=False, sum_dx=True, keep_dy=True)
        (found,) = p.layer_norms_backward([norm])
        gradients.norm("norm_weight", "norm_bias", found)
        gradients.sums({bias: found.dx_sum})
        return found.dx, added if a.residual else None
    if bias in gradients and not (a.residual and a.norm_weight is not None):
        gradients.sums({bias: p.column_sums([grad])[0]})
    return grad, added if a.residual else None


def half_input_backward(
    p: Primitives, a: Any, saved: list[Tensor], rows: Tensor, dlayer: Tensor, layer: Tensor, added: Tensor | None,
    weight: str, bias: str, gradients: Gradients, dtype: torch.dtype,
) -> Tensor | None:  # fmt: skip
    """Stores the gradients of "x" and of a pre-norm; returns the first layer's input if `weight` needs it.

    Args:
        dlayer: gradient of the first layer's result.
        layer: the first layer's weight.
        added: the residual's gradient of x, or None.
    """
    recompute = weight in gradients
    if a.norm_weight is None or a.post_norm:  # there is no pre-norm, whose backward could add it
        dy = p.dgrad(dlayer, layer, added) if "x" in gradients else None
        return normalized_backward(p, dy, rows, [], a._replace(norm_weight=None), gradients, dtype, recompute=recompute)
    dy, options = p.dgrad(dlayer, layer), {"residual": added, "residual_bias": bias}
    return normalized_backward(p, dy, rows, saved, a, gradients, dtype, recompute=recompute, **options)
