"""Registration of one public op: schema, fake, autograd, autocast, and the choice of a backend at run time.

An op declares its arguments once, as a NamedTuple of typed fields. The schemas, the tensors saved for the backward, the
backward's arguments, its fake and the names in error messages are derived from that declaration.

The steps of a call:

1.  The public function checks what only it can check, and calls the op with the fields of its `Arguments` in order.
2.  If anything may observe operator calls (torch.compile, export, torch.func, a dispatch or function mode, a tensor
    subclass), the registered operator `sgmim_fast::NAME` is called through PyTorch's dispatcher. In plain eager mode
    the dispatcher would only call the same Python functions, in as much time as a small kernel takes, so `Op.__call__`
    bypasses it.
3.  Autocast: its dtype is filled in as the `dtype` argument unless that is given. Nothing below is cast a second time.
4.  Autograd: if a gradient is needed, `_Gradient` computes the result and saves the inputs and the forward's `saved`.
5.  Devices, shapes and dtypes are checked, in traced calls too, where the fake returns shapes and nothing is computed.
6.  `backends.choose` returns the function that computes the result: a composition bound to a backend's primitives, or a
    function of the backend itself.
7.  Backward: `_Gradient` calls `sgmim_fast::NAME_backward`, which goes through 2, 5 and 6 on the forward's backend.

In plain eager mode, 5 and 6 are skipped for arguments of which an earlier call had the same `_signature`; so they are
in the backward of such a call, whose gradient autograd has checked.

Second derivatives and forward-mode derivatives are not implemented: both raise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from sgmim_fast import backends
from sgmim_fast.ops import _check, gemm
from sgmim_fast.ops.primitives import Gradients, absent

LIBRARY = torch.library.Library("sgmim_fast", "FRAGMENT")

AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)

_PLAIN = {Tensor, torch.nn.Parameter}
# Signatures remembered per part of an op, since lists of rows may have any length, and states with signatures.
_MOST_SIGNATURES, _MOST_STATES = 1024, 8

# The backward uses the settings of its forward, although it may run later and in a thread of autograd.
_CARRIED = (backends.FORCED, gemm.BFLOAT16_IN)

_SCHEMA = {
    **{Tensor: "Tensor", Tensor | None: "Tensor?", list[Tensor]: "Tensor[]", torch.dtype | None: "ScalarType?"},
    **{int: "SymInt", list[int]: "SymInt[]", bool: "bool", list[bool]: "bool[]", float: "float"},
}
_INT, _FLOAT = (int, torch.SymInt), (int, float, torch.SymInt, torch.SymFloat)
# type in a schema -> types of the argument, or of the entries of a list, and their name in errors
_ACCEPTED = {
    "Tensor": (Tensor, "a tensor"),
    "Tensor?": ((Tensor, type(None)), "a tensor or None"),
    "Tensor[]": (Tensor, "tensors"),
    "ScalarType?": ((torch.dtype, type(None)), "a dtype or None"),
    "SymInt": (_INT, "an integer"),
    "SymInt[]": (_INT, "integers"),
    "bool": (bool, "True or False"),
    "bool[]": (bool, "True or False"),
    "float": (_FLOAT, "a number"),
}


class Layout(NamedTuple):
    """Describes flat arguments, in which every list is replaced by its tensors."""

    names: list[str | None]  # names of the tensors, present or None; None for other arguments
    places: list[int]  # positions of the tensors, present or None


class Declaration:
    """The arguments declared by a NamedTuple of typed fields. A field may be a group of tensors, itself a NamedTuple.

    A group is passed as a flat list. It may have class methods `nested(list)`, which makes it from that list if it has
    other than one tensor per field, and `names(length)`, the names of its tensors in errors if not those of its fields.
    """

    def __init__(self, kind: Any):
        hints = get_type_hints(kind)
        self.kind, self.fields = kind, list(hints)
        self.groups = {i: hint for i, hint in enumerate(hints.values()) if hasattr(hint, "_fields")}
        self.types = ["Tensor[]" if i in self.groups else _SCHEMA[hint] for i, hint in enumerate(hints.values())]
        self.lists = [i for i, t in enumerate(self.types) if t == "Tensor[]"]
        self.takes_dtype = self.types[-1] == "ScalarType?"
        self._layouts: dict[tuple[int, ...], Layout] = {}

    def schema(self, optional: Sequence[str] = ()) -> str:
        """Returns the arguments of a schema; those in `optional` may be None."""
        types = zip(self.types, self.fields, strict=True)
        return ", ".join(f"{t}{'?' if name in optional and t[-1] != '?' else ''} {name}" for t, name in types)

    def check_types(self, args: Sequence[Any]) -> None:
        """Raises TypeError for an argument of another type. In plain eager mode no dispatcher does."""
        for name, declared, arg in zip(self.fields, self.types, args, strict=False):
            types, expected = _ACCEPTED[declared]
            if declared.endswith("[]"):
                if not isinstance(arg, list | tuple):
                    raise TypeError(f"{name} is {_check.named(arg)}; expected a list of {expected}")
                wrong = [entry for entry in arg if not isinstance(entry, types)]
                if wrong:
                    raise TypeError(f"{name} has {_check.named(wrong[0])} in it; expected {expected}")
            elif not isinstance(arg, types):
                raise TypeError(f"{name} is {_check.named(arg)}; expected {expected}")

    def make(self, args: Sequence[Any]) -> Any:
        """Returns the NamedTuple; arguments missing at the end are None."""
        if self.groups or len(args) < len(self.fields):
            args = [*args, *[None] * (len(self.fields) - len(args))]
            for i, group in self.groups.items():
                if args[i] is not None:
                    args[i] = self._nested(self.fields[i], group, args[i])
        return self.kind._make(args)

    @staticmethod
    def _nested(name: str, group: Any, tensors: Sequence[Any]) -> Any:
        if hasattr(group, "nested"):
            return group.nested(tensors)
        if len(tensors) != len(group._fields):
            raise ValueError(f"{name} has {len(tensors)} tensors; expected {len(group._fields)}")
        return group(*tensors)

    def lengths(self, args: Sequence[Any]) -> tuple[int, ...]:
        """Returns the lengths of the lists of tensors."""
        return tuple(len(args[i]) for i in self.lists)

    def flat(self, args: Sequence[Any]) -> Sequence[Any]:
        """Returns the arguments with every list replaced by its tensors."""
        if not self.lists:
            return args
        return [leaf for i, arg in enumerate(args) for leaf in (arg if i in self.lists else (arg,))]

    def unflat(self, flat: Sequence[Any], lengths: Sequence[int]) -> Sequence[Any]:
        if not self.lists:
            return flat
        leaves, sizes = iter(flat), iter(lengths)
        return [
            [next(leaves) for _ in range(next(sizes))] if i in self.lists else next(leaves)
            for i in range(len(self.fields))
        ]

    def layout(self, lengths: tuple[int, ...]) -> Layout:
        """Returns the layout for lists of these lengths."""
        if lengths not in self._layouts:
            names = list(self._names(lengths))
            places = [i for i, name in enumerate(names) if name is not None]
            self._layouts[lengths] = Layout(names, places)
        return self._layouts[lengths]

    def _names(self, lengths: Sequence[int]) -> Iterator[str | None]:
        sizes = iter(lengths)
        for i, (field, kind) in enumerate(zip(self.fields, self.types, strict=True)):
            if i in self.lists:
                count, group = next(sizes), self.groups.get(i)
                if hasattr(group, "names"):
                    yield from group.names(count)
                else:
                    yield from (f"{field}[{j}]" for j in range(count)) if group is None else group._fields[:count]
            else:
                yield field if kind.startswith("Tensor") else None

    def tensors(self, args: Sequence[Any]) -> list[tuple[str, Tensor]]:
        """Returns the tensors among the arguments, with their names."""
        names, flat = self.layout(self.lengths(args)).names, self.flat(args)
        return [(name, leaf) for name, leaf in zip(names, flat, strict=False) if isinstance(leaf, Tensor)]


class Choice:
    """The functions chosen for calls of one signature; the one for the backward at its first."""

    __slots__ = ("backward", "forward")

    def __init__(self, forward: Callable[..., Any]):
        self.forward, self.backward = forward, None


class Part:
    """The forward or backward of an op: its registered operator, and the same call in plain eager mode."""

    def __init__(
        self,
        name: str,
        part: str,
        declared: Declaration,
        schema: str,
        fake: Callable[..., Any],
        check: Callable[[Any], None] | None,
    ):
        self.name, self.part, self.declared, self.check = name, part, declared, check
        self.fake = fake
        self._choices: dict[Any, dict[Any, Choice]] = {}  # `backends.state` -> signature of a checked call -> choice
        qualifier = name if part == "forward" else f"{name}_backward"
        LIBRARY.define(f"{qualifier}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        self.overload = getattr(torch.ops.sgmim_fast, qualifier).default
        LIBRARY.impl(qualifier, self.kernel, "CompositeExplicitAutograd")
        for key in ("AutocastCPU", "AutocastCUDA"):
            LIBRARY.impl(qualifier, self._autocast_kernel, key)
        torch.library.register_fake(f"sgmim_fast::{qualifier}", self._checked_fake, lib=LIBRARY)

    def _checked(self, args: Sequence[Any]) -> tuple[torch.device, Any]:
        self.declared.check_types(args)
        device = _check.same_device(self.declared.tensors(args))
        made = self.declared.make(args)
        if self.check is not None:
            self.check(made)
        return device, made

    def choose(self, args: Sequence[Any]) -> Callable[..., Any]:
        """Checks the arguments, and returns the function of this part for them."""
        device, _ = self._checked(args)
        return backends.choose(self.name, self.part, device.type, args)

    def chosen(self, args: Sequence[Any], signature: Any) -> Choice:
        """Returns the choice for a call, which is remembered by its `_signature` unless calls are being recorded."""
        state = backends.state()
        if state is None:
            return Choice(self.choose(args))
        choices = self._choices.get(state)
        if choices is None:
            if len(self._choices) >= _MOST_STATES:
                self._choices.clear()
            choices = self._choices[state] = {}
        try:
            choice = choices.get(signature)
        except TypeError:  # an argument that is not hashable is of a wrong type
            self.declared.check_types(args)
            raise
        if choice is None:
            choice = Choice(self.choose(args))
            if len(choices) >= _MOST_SIGNATURES:
                choices.clear()
            choices[signature] = choice
        return choice

    def kernel(self, *args: Any) -> Any:
        return self.choose(args)(*args)

    def _checked_fake(self, *args: Any) -> Any:
        return self.fake(self._checked(args)[1])

    def _autocast_kernel(self, *args: Any) -> Any:
        # Below this point the op casts explicitly: nothing it calls may be autocast again.
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
            return self.overload(*self.in_autocast(args))

    def in_autocast(self, args: tuple) -> tuple:
        """Returns the arguments with autocast's dtype filled in, if this part has a dtype argument."""
        if self.part == "backward" or not self.declared.takes_dtype:
            return args
        count = len(self.declared.fields)
        first = next((arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()), None)
        if first is None or first.dtype == torch.float64 or (len(args) == count and args[-1] is not None):
            return args  # as in PyTorch's own ops, float64 is never autocast
        args = args + (None,) * (count - 1 - len(args)) if len(args) < count else args[:-1]
        return (*args, torch.get_autocast_dtype(first.device.type))


class Op:
    """One public op.

    Args:
        name: name of the op, the same in every folder of the project.
        arguments: the declaration, a NamedTuple. A dtype field must be the last one: autocast fills it in.
        forward: for a composition `forward(primitives, arguments)`, written once for all backends (`ops.primitives`).
            Otherwise the `torch` backend's function, called with the arguments in order; the other backends are then
            modules named in `backends.MODULES` with functions `forward` and `backward`. Returns a tensor, with `saves`
            a tensor and the list of tensors that the backward needs.
        fake: `fake(arguments)`, returns tensors with the shapes and dtypes of the forward's results (FakeTensor).
        check: `check(arguments)`, raises unless shapes and dtypes are as the docstring says. It runs before any backend
            or `fake`. Every op also checks that all tensors are on one device.
        backward: for a composition `backward(primitives, arguments, saved, grad, gradients)`.
        request: for a composition `request(arguments)`, the `Request` that a backend accepts or not.
        indices: `indices(arguments)`, raises for indices out of range. Called if the backend's kernels do not check.
        saves: whether the forward returns tensors to save besides the arguments.
        unsaved: arguments that the backward does not need; they are None there.
        added: argument that is only added to the result, so that its gradient is the result's. It is unsaved.
        returns: returns of the schema, for an op that is not differentiable.
    """

    def __init__(
        self,
        name: str,
        arguments: type,
        forward: Callable[..., Any],
        *,
        fake: Callable[[Any], Any],
        check: Callable[[Any], None],
        backward: Callable[..., None] | None = None,
        request: Callable[[Any], Any] | None = None,
        indices: Callable[[Any], None] | None = None,
        saves: bool = False,
        unsaved: Sequence[str] = (),
        added: str | None = None,
        returns: str = "Tensor",
    ):
        self.name, self.declared = name, Declaration(arguments)
        self._saves, self._added = saves, None if added is None else self.declared.fields.index(added)
        self._unsaved = (*unsaved, added) if added else tuple(unsaved)
        returns = "(Tensor, Tensor[])" if saves else returns
        self._forward = Part(name, "forward", self.declared, f"({self.declared.schema()}) -> {returns}", fake, check)
        self.overload = self._forward.overload
        self._traced = Choice(self.overload)
        self._differentiate: Callable[..., Any] | None = None
        if backward is None:
            backends.register(name, "forward", forward)
            return
        self._composition, self._request, self._indices = (forward, backward), request, indices
        backends.register(name, "forward", self._bound_forward, self._requested)
        backends.register(name, "backward", self._bound_backward, self._requested)
        schema = self.declared.schema(optional=self._unsaved)
        schema = f"(Tensor grad, {schema}, Tensor[] saved, bool[] needs) -> Tensor[]"
        self._differentiable(schema, self.declared, self._fake_backward, self._save, self._gradients)

    def __call__(self, *args: Any) -> Any:
        signature = None if _watched() else _signature(args)
        if signature is None:
            return self.overload(*args)
        if self.declared.takes_dtype and torch.is_autocast_enabled(_device_type(args)):
            args = self._forward.in_autocast(args)
            signature = signature, args[-1]
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
            choice = self._forward.chosen(args, signature)
            return choice.forward(*args) if self._differentiate is None else self._differentiate(choice, args)

    # Compositions, bound to the primitives of a backend

    def _requested(self, part: str, args: Sequence[Any]) -> tuple[Any, Any]:
        """Returns the forward's arguments, among those of a part, and the `Request` made of them."""
        a = self.declared.make(args if part == "forward" else args[1 : 1 + len(self.declared.fields)])
        return a, self._request(a)

    def _bound_forward(self, primitives: Any) -> Callable[..., Any]:
        forward, make, indices = self._composition[0], self.declared.make, self._indices
        check = indices is not None and not primitives.CHECKS_INDICES

        def run(*args: Any) -> Any:
            a = make(args)
            if check:
                indices(a)
            return forward(primitives, a)

        return run

    def _bound_backward(self, primitives: Any) -> Callable[..., Any]:
        backward, declared = self._composition[1], self.declared

        def run(grad: Tensor, *args: Any) -> list[Tensor | None]:
            *args, saved, needs = args
            names, places = declared.layout(declared.lengths(args))
            flat = declared.flat(args)
            wanted = {names[i]: flat[i] for i, need in zip(places, needs, strict=True) if need}
            gradients = Gradients(primitives, wanted)
            backward(primitives, declared.make(args), saved, grad, gradients)
            found, eager = gradients.finished(), type(needs) is tuple  # see `_backward_of`
            return [
                found[names[i]] if need else None if eager else absent(grad)
                for i, need in zip(places, needs, strict=True)
            ]

        return run

    def _fake_backward(self, args: tuple) -> list[Tensor]:
        grad, *args = args
        *args, _, needs = args
        flat, places = self.declared.flat(args), self.declared.layout(self.declared.lengths(args)).places
        return [
            torch.empty_like(flat[i], memory_format=torch.contiguous_format) if need else absent(grad)
            for i, need in zip(places, needs, strict=True)
        ]

    def _save(self, ctx: Any, args: Sequence[Any], saved: Sequence[Tensor]) -> None:
        if self._added is not None and args[self._added] is not None:
            ctx.added_dtype = args[self._added].dtype
        (names, places), flat = self.declared.layout(ctx.lengths), [*self.declared.flat(args)]
        ctx.places = [i for i in places if flat[i] is not None and names[i] not in self._unsaved]
        ctx.save_for_backward(*[flat[i] for i in ctx.places], *saved)
        for i in places:
            flat[i] = None
        ctx.flat = flat

    def _gradients(self, ctx: Any, needs: Sequence[bool], grad: Tensor) -> list[Any]:
        flat, tensors = [*ctx.flat], ctx.saved_tensors
        for i, tensor in zip(ctx.places, tensors, strict=False):
            flat[i] = tensor
        places = self.declared.layout(ctx.lengths).places
        flags = [needs[i] and i != self._added for i in places]
        args = self.declared.unflat(flat, ctx.lengths)
        found: list[Any] = [None] * len(flat)
        if any(flags):
            saved = list(tensors[len(ctx.places) :])
            for i, gradient in zip(places, self._backward_of(ctx.choice, grad, args, saved, flags), strict=True):
                found[i] = gradient
        if self._added is not None and needs[self._added]:
            found[self._added] = grad.to(ctx.added_dtype)
        return found

    # Autograd

    def differentiable(
        self,
        arguments: type,
        backward: Callable[..., Any],
        *,
        fake: Callable[[Any], Any],
        save: Callable[..., None],
        gradients: Callable[..., Sequence[Any]],
    ) -> None:
        """Adds a backward to an op that is not a composition.

        Args:
            arguments: declaration of the arguments of `NAME_backward`, a NamedTuple.
            backward: the `torch` backend's function, called with these arguments in order.
            fake: as for the forward.
            save: `save(ctx, inputs, saved)`, saves what the backward needs, and every input that it depends on.
            gradients: `gradients(ctx, needs, grad)`, calls the backward op; returns a gradient or None per input.
        """
        declared = Declaration(arguments)
        backends.register(self.name, "backward", backward)
        self._differentiable(f"({declared.schema()}) -> Tensor", declared, fake, save, gradients)

    def _differentiable(
        self,
        schema: str,
        declared: Declaration,
        fake: Callable[..., Any],
        save: Callable[..., None],
        gradients: Callable[..., Sequence[Any]],
    ) -> None:
        part = _Backward if declared is self.declared else Part
        self._backward = part(self.name, "backward", declared, schema, fake, None)
        self.backward_overload = self._backward.overload
        methods = {"op": self, "save": staticmethod(save), "gradients": staticmethod(gradients)}
        self._function = type(f"{self.name}_function", (_Gradient,), methods)
        self._differentiate = self._with_gradient
        LIBRARY.impl(self.name, self._autograd_kernel, "Autograd")

    def backward(self, *args: Any) -> Any:
        """Calls `NAME_backward`."""
        signature = None if _watched() else _signature(args)
        if signature is None:
            return self.backward_overload(*args)
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS), torch._C._AutoDispatchBelowAutograd():
            return self._backward.chosen(args, signature).forward(*args)

    def _backward_of(
        self, choice: Choice, grad: Tensor, args: Sequence[Any], saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor | None]:
        """Calls `NAME_backward` of a composition after a forward through `choice`."""
        if choice is self._traced or type(grad) is not Tensor or _watched():
            return self.backward(grad, *args, saved, needs)
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS), torch._C._AutoDispatchBelowAutograd():
            if choice.backward is None:
                choice.backward = self._backward.choose((grad, *args, saved, needs))
            return choice.backward(grad, *args, saved, tuple(needs))  # a tuple: None for gradients that are not needed

    def _with_gradient(self, choice: Choice, args: tuple) -> Any:
        args += (None,) * (len(self.declared.fields) - len(args))
        flat = self.declared.flat(args)
        if torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in flat):
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError(
                    f"sgmim_fast.ops.{self.name} has no derivative in torch.func; expected torch.autograd or backward()"
                )
            give_saved = choice is self._traced  # in plain eager mode the saved tensors are not returned
            found = self._function.apply(choice, self.declared.lengths(args), give_saved, *flat)
            result, *saved = found if give_saved else (found,)
            return (result, saved) if self._saves else result
        with torch._C._AutoDispatchBelowAutograd():
            return choice.forward(*args)

    def _autograd_kernel(self, *args: Any) -> Any:
        _refuse_tangents(self.name, pytree.tree_leaves(args))
        return self._with_gradient(self._traced, args)

    def not_differentiable(self) -> None:
        """Registers the op without a gradient. Its public function raises for an argument that requires one."""

        def autograd_kernel(*args: Any) -> Any:
            _refuse_tangents(self.name, args)
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload(*args)

        LIBRARY.impl(self.name, autograd_kernel, "Autograd")


class _Backward(Part):
    """The backward of a composition, with arguments `grad`, the forward's, `saved` and `needs`."""

    def _checked(self, args: tuple) -> tuple[torch.device, Any]:
        grad, *rest = args
        tensors = [("grad", grad), *self.declared.tensors(rest[:-2])]
        return _check.same_device([*tensors, *((f"saved[{i}]", t) for i, t in enumerate(rest[-2]))]), args


class _Gradient(torch.autograd.Function):
    """The autograd function of an op: one subclass per op, with its name, `save` and `gradients`.

    autograd.Function tracks tensors only if they are direct arguments or results, so lists are passed flat.
    """

    op: ClassVar[Op]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        return super().apply(cls, *args)

    @staticmethod
    def forward(ctx: Any, cls: Any, choice: Choice, lengths: tuple[int, ...], give_saved: bool, *flat: Any) -> Any:
        args = cls.op.declared.unflat(flat, lengths)
        with torch._C._AutoDispatchBelowAutograd():
            results = choice.forward(*args)
        result, saved = results if cls.op._saves else (results, [])
        ctx.cls, ctx.lengths, ctx.choice, ctx.settings = cls, lengths, choice, [v.get() for v in _CARRIED]
        cls.save(ctx, args, saved)
        ctx.set_materialize_grads(False)
        if not give_saved:
            return result
        ctx.mark_non_differentiable(*saved)
        return (result, *saved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        needs = ctx.needs_input_grad[4:]
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        tokens = [variable.set(value) for variable, value in zip(_CARRIED, ctx.settings, strict=True)]
        create_graph = torch.is_grad_enabled()
        try:
            with torch.no_grad() if create_graph else contextlib.nullcontext():
                found = ctx.cls.gradients(ctx, needs, grad)
        finally:
            for variable, token in zip(_CARRIED, tokens, strict=True):
                variable.reset(token)
        found = [*found, *[None] * (len(needs) - len(found))]
        found = [gradient if need else None for gradient, need in zip(found, needs, strict=True)]
        if create_graph:
            found = once(ctx.cls.op.name, found, ctx, grad)
        return (None, None, None, None, *found)


def _refuse_tangents(name: str, leaves: Sequence[Any]) -> None:
    """Raises NotImplementedError if an input has a forward-mode tangent, which would be lost."""
    level = forward_ad._current_level
    if level < 0:
        return
    for leaf in leaves:
        if isinstance(leaf, Tensor) and forward_ad.unpack_dual(leaf, level=level).tangent is not None:
            raise NotImplementedError(
                f"sgmim_fast.ops.{name} has no forward-mode derivative (make_dual, torch.func.jvp); expected backward()"
            )


def once(name: str, found: Sequence[Tensor | None], ctx: Any, grad: Tensor) -> Sequence[Tensor | None]:
    """Returns the gradients that a backward found. Under create_graph, differentiating them in the tensors saved in
    `ctx` or in `grad` raises an error with the op's name."""
    depends_on = [t for t in (*ctx.saved_tensors, grad) if t is not None and t.requires_grad]
    return _Once.apply(name, len(found), *found, *depends_on)


class _Once(torch.autograd.Function):
    """Identity on gradients, with the tensors that they depend on as further inputs; its backward raises.

    `once_differentiable` considers the incoming gradients only, and is on no path to the forward's inputs.
    """

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Any) -> tuple:
        ctx.name = name
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"sgmim_fast.ops.{ctx.name} has no second derivative; its gradient cannot be differentiated")


def _watched() -> bool:
    """Whether anything may observe operator calls, see step 2 above."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _device_type(args: Sequence[Any]) -> str:
    """Returns the device type of the first tensor, whose device is that of all."""
    return next((arg.device.type for arg in args if isinstance(arg, Tensor)), "cpu")


def _signature(args: Sequence[Any]) -> tuple[Any, ...] | None:
    """Returns all that the checks read: shape, dtype, device and layout of tensors, the other arguments as they are.
    None if a tensor is a subclass or on the meta device, which need the dispatcher."""
    found = []
    for arg in args:
        kind = type(arg)
        if kind in _PLAIN:
            if arg.is_meta:
                return None
            found.append((arg.shape, arg.dtype, arg.device, arg.layout))
        elif kind is list:
            entries = _signature(arg)
            if entries is None:
                return None
            found.append(entries)
        elif isinstance(arg, Tensor):
            return None
        else:
            found.append(arg)
    return tuple(found)
