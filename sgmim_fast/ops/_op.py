"""Registration of one public op: schema, fake, autograd, autocast, and the choice of a backend at run time.

Every op is a pair `sgmim_fast::NAME` and `sgmim_fast::NAME_backward` defined from Python, so that the names exist
whatever was built. The kernel behind both asks `backends.choose` which backend runs, then calls that backend's
`forward` or `backward` function. The gradient is one `torch.autograd.Function` around the pair. There is no second
derivative and no forward-mode derivative: both raise.

A call takes the registered operator where somebody may be watching: torch.compile, export, torch.func, a dispatch or
function mode, a tensor subclass. In plain eager mode, where PyTorch's dispatcher would only lead to the same Python
functions by way of C++ (and takes as long as a small kernel), it calls them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from sgmim_fast import backends
from sgmim_fast.ops import _check, products

LIBRARY = torch.library.Library("sgmim_fast", "FRAGMENT")

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)

_PLAIN = {Tensor, torch.nn.Parameter}

# What was chosen for the forward is chosen for its backward too, which may run later and in a thread of autograd's.
_CARRIED = (backends.FORCED, products.BFLOAT16_IN)


class Op:
    """One public op.

    Args:
        name: the op's name, the same in every folder of the project.
        schema: arguments and returns of the forward op. A `ScalarType? dtype` argument, where there is one, must be
            the last: autocast fills it in.
        forward: the `torch` backend's forward, plain PyTorch, run anywhere. Other backends are modules named in
            `backends.MODULES` with functions `forward` and `backward` of the same signatures.
        fake: shapes and dtypes of the forward's results (FakeTensor arithmetic).
        check: `check(*args)` raises unless shapes and dtypes are those the docstring promises, before any backend or
            `fake` sees the arguments. That all tensors are on one device is checked for every op.
        fields: argument that is a list of tensors -> `names(length)`, what they are called.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        check: Callable[..., None],
        fields: dict[str, Callable[[int], Sequence[str]]] | None = None,
    ):
        self.name = name
        self._takes_dtype = "ScalarType? dtype" in schema
        self._fields = fields or {}
        self._kernel = self._define(name, schema, forward, fake, "forward", check)
        self.overload = getattr(torch.ops.sgmim_fast, name).default
        self._count = len(self.overload._schema.arguments)
        self._differentiate: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if not _unwatched(args):
            return self.overload(*args)
        if self._takes_dtype:
            device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
            if torch.is_autocast_enabled(device):
                args = self._fill_dtype(self.overload, args)
        args += (None,) * (self._count - len(args))
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            if self._differentiate is None:
                return self._kernel(*args)
            return self._differentiate(self._kernel, args)

    def _define(
        self, qualifier: str, schema: str, plain: Callable, fake: Callable, part: str, check: Callable | None = None
    ) -> Callable[..., Any]:
        LIBRARY.define(f"{qualifier}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        op, name = getattr(torch.ops.sgmim_fast, qualifier).default, self.name
        backends.register(name, part, plain)
        places = [argument.name for argument in op._schema.arguments]

        def checked(args: tuple) -> torch.device:
            device = _check.together(self._tensors(places, args))
            if check is not None:
                check(*args)
            return device

        def kernel(*args: Any) -> Any:
            device = checked(args)
            return backends.choose(name, part, device.type, args)(*args)

        def checked_fake(*args: Any) -> Any:
            checked(args)
            return fake(*args)

        def autocast_kernel(*args: Any) -> Any:
            # Below this point the op does its own casting: nothing it calls may be cast a second time.
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
                if part == "forward" and self._takes_dtype:
                    args = self._fill_dtype(op, args)
                return op(*args)

        LIBRARY.impl(qualifier, kernel, "CompositeExplicitAutograd")
        for key in ("AutocastCPU", "AutocastCUDA"):
            LIBRARY.impl(qualifier, autocast_kernel, key)
        torch.library.register_fake(f"sgmim_fast::{qualifier}", checked_fake, lib=LIBRARY)
        return kernel

    def _tensors(self, places: list[str], args: tuple) -> Iterator[tuple[str, Tensor]]:
        """The tensors among the arguments, by name."""
        for place, arg in zip(places, args, strict=False):
            if isinstance(arg, Tensor):
                yield place, arg
            elif isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor):
                names = self._fields.get(place, lambda count, place=place: [f"{place}[{i}]" for i in range(count)])
                yield from zip(names(len(arg)), arg, strict=False)

    @staticmethod
    def _fill_dtype(op: torch._ops.OpOverload, args: tuple) -> tuple:
        count = len(op._schema.arguments)
        first = next(arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point())
        if first.dtype == torch.float64 or (len(args) == count and args[-1] is not None):
            return args  # like PyTorch's own ops, float64 is never autocast
        args = args + (None,) * (count - 1 - len(args)) if len(args) < count else args[:-1]
        return (*args, torch.get_autocast_dtype(first.device.type))

    def differentiable(
        self,
        schema: str,
        *,
        backward: Callable[..., Any],
        fake: Callable[..., Any],
        save: Callable[..., None],
        gradients: Callable[..., tuple],
        outputs: int = 1,
    ) -> None:
        """Adds the backward op and the autograd formula.

        Args:
            schema: arguments and returns of `NAME_backward`.
            backward: the `torch` backend's backward.
            fake: shapes and dtypes of the backward's results.
            save: `save(ctx, inputs, results)` keeps what the backward needs, and every input that it depends on.
            gradients: `gradients(ctx, needs, *grads) -> one gradient, list of gradients or None per input`, calling the
                backward op. `needs` has one bool, or list of bools, per input. Trailing inputs may be left out.
            outputs: how many leading results carry gradients; the others are saved for the backward only.
        """
        backward_kernel = self._define(f"{self.name}_backward", schema, backward, fake, "backward")
        backward_overload = getattr(torch.ops.sgmim_fast, f"{self.name}_backward").default

        def run_backward(*args: Any) -> Any:
            if not _unwatched(args):
                return backward_overload(*args)
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS), torch._C._AutoDispatchBelowAutograd():
                return backward_kernel(*args)

        self.backward, self.backward_overload = run_backward, backward_overload
        overload = self.overload

        class Function(torch.autograd.Function):
            # autograd.Function sees tensors only among its direct arguments and results: lists travel flat.
            @staticmethod
            def forward(ctx: Any, call: _Call, *flat: Any) -> tuple:
                args = call.nested(flat)
                with torch._C._AutoDispatchBelowAutograd():
                    results = call.run(*args)
                save(ctx, args, results)
                ctx.call, ctx.chosen = call, [variable.get() for variable in _CARRIED]
                leaves = call.flat_results(results)
                ctx.mark_non_differentiable(*leaves[outputs:])
                ctx.set_materialize_grads(False)
                return tuple(leaves)

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> tuple:
                _, *needs = ctx.needs_input_grad
                if all(grad is None for grad in grads[:outputs]):
                    return (None,) * len(ctx.needs_input_grad)
                wanted = ctx.call.nested(needs)
                tokens = [variable.set(value) for variable, value in zip(_CARRIED, ctx.chosen, strict=True)]
                try:
                    with torch.no_grad():
                        result = gradients(ctx, wanted, *grads[:outputs])
                finally:
                    for variable, token in zip(_CARRIED, tokens, strict=True):
                        variable.reset(token)
                flat = [grad for group in result for grad in (group if isinstance(group, list) else [group])]
                flat += [None] * (len(needs) - len(flat))
                flat = [grad if need else None for grad, need in zip(flat, needs, strict=True)]
                if torch.is_grad_enabled():  # create_graph=True
                    depends_on = [t for t in (*ctx.saved_tensors, *grads) if t is not None and t.requires_grad]
                    flat = _Once.apply(name, len(flat), *flat, *depends_on)
                return (None, *flat)

        name = self.name
        Function.__name__ = Function.__qualname__ = f"{self.name}_function"

        def differentiate(run: Callable[..., Any], args: tuple) -> Any:
            call = _Call(run, args)
            if torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in call.flat):
                if torch._C._are_functorch_transforms_active():
                    raise NotImplementedError(
                        f"sgmim_fast.ops.{name} has no derivative in torch.func; expected torch.autograd or backward()"
                    )
                return call.nested_results(Function.apply(call, *call.flat))
            with torch._C._AutoDispatchBelowAutograd():
                return run(*args)

        def autograd_kernel(*args: Any) -> Any:
            _refuse_tangents(name, pytree.tree_leaves(args))
            return differentiate(overload, args)

        self._differentiate = differentiate
        LIBRARY.impl(self.name, autograd_kernel, "Autograd")

    def not_differentiable(self) -> None:
        """Says that the op has no gradient. Its public function raises for an argument that requires one."""

        def autograd_kernel(*args: Any) -> Any:
            _refuse_tangents(self.name, args)
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload(*args)

        LIBRARY.impl(self.name, autograd_kernel, "Autograd")


def _refuse_tangents(name: str, leaves: Sequence[Any]) -> None:
    """Raises NotImplementedError where forward-mode differentiation would lose a tangent here."""
    level = forward_ad._current_level
    if level < 0:
        return
    for leaf in leaves:
        if isinstance(leaf, Tensor) and forward_ad.unpack_dual(leaf, level=level).tangent is not None:
            raise NotImplementedError(
                f"sgmim_fast.ops.{name} has no forward-mode derivative (make_dual, torch.func.jvp); expected backward()"
            )


class _Once(torch.autograd.Function):
    """Gradients as results of what they depend on, which raises where that dependence is differentiated.

    `once_differentiable` looks at the incoming gradients alone, and is on no path to the forward's inputs.
    """

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Any) -> tuple:
        ctx.name = name
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"sgmim_fast.ops.{ctx.name} has no second derivative; its gradient cannot be differentiated")


def _unwatched(args: tuple) -> bool:
    """Whether a call in plain eager mode, with plain tensors, may do without the dispatcher."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    for arg in args:
        if isinstance(arg, Tensor):
            if type(arg) not in _PLAIN or arg.is_meta:
                return False
        elif isinstance(arg, list) and not all(type(entry) in _PLAIN for entry in arg if isinstance(entry, Tensor)):
            return False
    return True


class _Call:
    """One call: what computes it, and the nesting of its arguments and results, which autograd.Function takes flat."""

    def __init__(self, run: Callable[..., Any], args: tuple):
        self.run = run
        self._arguments: pytree.TreeSpec | None = None
        self._results: pytree.TreeSpec | None = None
        self._single = False
        self.flat: Sequence[Any] = args
        if any(isinstance(arg, list) for arg in args):
            self.flat, self._arguments = pytree.tree_flatten(args)

    def nested(self, flat: Sequence[Any]) -> Sequence[Any]:
        return flat if self._arguments is None else pytree.tree_unflatten(flat, self._arguments)

    def flat_results(self, results: Any) -> Sequence[Tensor]:
        self._single = isinstance(results, Tensor)
        if self._single:
            return (results,)
        if not any(isinstance(result, list | tuple) for result in results):
            return results
        leaves, self._results = pytree.tree_flatten(results)
        return leaves

    def nested_results(self, leaves: Sequence[Tensor]) -> Any:
        if self._single:
            return leaves[0]
        return leaves if self._results is None else pytree.tree_unflatten(list(leaves), self._results)


def absent(like: torch.Tensor) -> torch.Tensor:
    """Stands in a backward's results for a gradient nobody asked for; results must be tensors, and must not alias."""
    return like.new_empty(0)
