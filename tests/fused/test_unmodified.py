"""Every kind of change to every module that fused ops may bypass: results and calls of hooks are those without fused
ops.

The changes are applied to all modules of an example of each class that `accelerate` supports, of a stem and of the
branch of SGMIM, and to all their parameters, buffers, methods and settings. A new child of a block is therefore tested
without any change here.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any, NamedTuple

import pytest
import torch
from timm.models import beit, eva, swin_transformer, swin_transformer_v2, vision_transformer
from timm.utils import AttentionExtract
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.nn.utils import parametrize, weight_norm

import sgmim_fast
from sgmim_fast import SGMIM, accelerate, backends, reference
from sgmim_fast.fused import unmodified
from sgmim_fast.fused.accelerate import FAST

SHAPE = 2, 6, 4, 8
WINDOWS = {"dim": 8, "input_resolution": SHAPE[1:3], "num_heads": 2, "window_size": 2, "shift_size": 1}
TOKENS = 2, 5, 8
HEADS = {"dim": 8, "num_heads": 2, "qkv_bias": True}


class Example(NamedTuple):
    """A module, whose submodules may be bypassed, and its input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    within: str = ""  # changes are applied to this submodule and those inside
    without: tuple[str, ...] = ()  # except these
    plain: Callable[[nn.Module, Tensor], Any] = lambda module, x: module(x)
    fast: Callable[[nn.Module, Tensor], Any] = lambda module, x: module(x)


def stem() -> nn.Module:
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    return sgmim_fast.create_encoder("vit_tiny_patch16_224", **options)


MASK = torch.tensor([[[0, 1], [1, 0]], [[1, 1], [0, 0]]]).repeat_interleave(2, 1).repeat_interleave(2, 2)
VISIBLE = (1 - MASK).flatten().nonzero().squeeze(1)


class Features(nn.Module):
    """The minimal encoder that SGMIM accepts."""

    num_features, in_chans, patch_size = 8, 3, 4

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(nn.functional.pixel_unshuffle(x, 8)[:, ::24] * 3).flatten(2).mT


def branch() -> nn.Module:
    return SGMIM(Features(), 8, accelerate=False)


def losses(model: nn.Module, x: Tensor) -> Any:
    return model(x[:, :3], x[:, 3:], MASK, return_losses=True)


def dense_losses(model: nn.Module, x: Tensor) -> Any:
    return reference.sgmim_losses(model, x[:, :3], x[:, 3:], MASK)


BLOCKS = {
    swin_transformer.SwinTransformerBlock: ({**WINDOWS, "drop_path": 0.3}, SHAPE),
    swin_transformer_v2.SwinTransformerV2Block: ({**WINDOWS, "drop_path": 0.3}, SHAPE),
    swin_transformer.PatchMerging: ({"dim": 8}, SHAPE),
    swin_transformer_v2.PatchMerging: ({"dim": 8}, SHAPE),
    beit.Block: ({**HEADS, "window_size": (2, 2), "init_values": 0.1}, TOKENS),
    vision_transformer.Block: (HEADS, TOKENS),
    eva.EvaBlock: ({**HEADS, "init_values": 0.1}, TOKENS),
}
ROPE = torch.linspace(-1, 1, 4 * 8, dtype=torch.float64).view(4, 8)  # for patches; one token is a prefix
GATED = {**HEADS, "swiglu_mlp": True, "qk_norm": True, "scale_attn_inner": True, "drop_path": 0.3}
EXAMPLES = {
    **{
        f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}": Example(lambda kind=kind, o=options: kind(**o), shape)
        for kind, (options, shape) in BLOCKS.items()
    },
    **{
        f"EvaBlock, {name}": Example(
            lambda options=options: eva.EvaBlock(**GATED, **options),
            TOKENS,
            plain=lambda block, x: block(x, rope=ROPE),
            fast=lambda block, x: block(x, rope=ROPE),
        )
        for name, options in {
            "packed": {"attn_type": "rope", "rotate_half": True},
            "separate": {"qkv_fused": False, "scale_mlp": True},
            "separate rope": {"attn_type": "rope", "qkv_fused": False, "init_values": 0.1},
        }.items()
    },
    "without drop path": Example(lambda: swin_transformer.SwinTransformerBlock(**WINDOWS), SHAPE),
    "stem": Example(
        stem,
        (2, 3, 16, 16),
        "model.patch_embed",
        (),
        lambda encoder, x: encoder(x, MASK),
        lambda encoder, x: encoder(x, MASK, VISIBLE),
    ),
    "branch": Example(branch, (2, 4, 16, 16), "", ("", "encoder"), dense_losses, losses),
}


def test_there_is_an_example_of_every_class():
    assert BLOCKS.keys() == FAST.keys()


class Change:
    """Applies a change to the same submodule of two models. `calls` has what hooks received."""

    def __init__(self, undo: contextlib.ExitStack):
        self.undo, self.calls = undo, []

    def patch(self, kind: type, name: str, value: Any) -> None:
        """Sets an attribute of a class until the models have run."""
        before = kind.__dict__.get(name)
        setattr(kind, name, value)
        self.undo.callback(setattr, kind, name, before) if before is not None else self.undo.callback(
            delattr, kind, name
        )

    def listen(self, inside: nn.Module) -> Callable[..., None]:
        """Returns a hook for all modules."""

        def hook(module: nn.Module, *seen: Any) -> None:
            if module is not inside:
                self.see(seen)

        return hook

    def see(self, *values: Any) -> None:
        self.calls.append([v.detach().clone() if isinstance(v, Tensor) else v for v in _leaves(values)])


def _leaves(values: Any) -> Iterator[Any]:
    if isinstance(values, (tuple, list)):
        for value in values:
            yield from _leaves(value)
    elif isinstance(values, dict):
        yield from _leaves(sorted(values.items()))
    elif not isinstance(values, nn.Module):
        yield values


def twice(function: Callable[..., Any]) -> Callable[..., Any]:
    """Doubles a function's result, and with it the gradient."""

    def doubled(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return result * 2 if isinstance(result, Tensor) and result.is_floating_point() else result

    return doubled


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class TwiceTheWeight(Tensor):
    """Simulates a quantised weight, whose stored values differ from its actual ones."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func in (nn.functional.linear, nn.functional.layer_norm, nn.functional.conv2d, Tensor.__mul__):
                args = [a.as_subclass(Tensor) * 2 if isinstance(a, cls) else a for a in args]
                kwargs = {k: v.as_subclass(Tensor) * 2 if isinstance(v, cls) else v for k, v in (kwargs or {}).items()}
            return func(*args, **(kwargs or {}))


# Changes of a module have the arguments: the `Change`, the module, and the class of the module in the plain model. They
# return nothing, and do nothing where they do not apply.
def forward_hook(change, module, kind):
    module.register_forward_hook(lambda m, args, result: change.see("after", args, result))


def forward_hook_that_changes(change, module, kind):
    module.register_forward_hook(lambda m, args, result: twice(lambda: result)())


def forward_pre_hook(change, module, kind):
    module.register_forward_pre_hook(lambda m, args: change.see("before", args))


def hook_with_keywords(change, module, kind):
    module.register_forward_hook(lambda m, args, kw, result: change.see(args, kw, result), with_kwargs=True)


def backward_hook(change, module, kind):
    module.register_full_backward_hook(lambda m, inputs, outputs: change.see("gradients", outputs))


def backward_pre_hook(change, module, kind):
    module.register_full_backward_pre_hook(lambda m, outputs: tuple(2 * g for g in outputs))


def old_backward_hook(change, module, kind):
    module.register_backward_hook(lambda m, inputs, outputs: change.see("old", outputs))


def forward_of_its_own(change, module, kind):
    module.forward = twice(module.forward)


def call_impl_of_its_own(change, module, kind):
    module._call_impl = twice(module._call_impl)


def forward_of_the_class(change, module, kind):
    change.patch(kind, "forward", twice(kind.forward))


def call_of_the_class(change, module, kind):
    change.patch(kind, "__call__", twice(kind.__call__))


def subclass(change, module, kind):
    module.__class__ = type("Adapter", (type(module),), {"forward": twice(type(module).forward)})


def subclass_with_another_call(change, module, kind):
    module.__class__ = type("Adapter", (type(module),), {"__call__": twice(type(module).__call__)})


def other_children(change, module, kind):
    for name, child in list(module._modules.items()):
        module._modules[name] = nn.Sequential(child, Twice())


def fewer_children(change, module, kind):
    for name in list(module._modules)[-1:]:
        delattr(module, name)


def no_children(change, module, kind):
    for name in module._modules:
        setattr(module, name, nn.Identity())


def one_more_child(change, module, kind):
    module.add_module("one_more", nn.Linear(1, 1))


def children_as_attributes(change, module, kind):
    for name, child in module._modules.items():
        module.__dict__[name] = twice(child)


def frozen(change, module, kind):
    module.requires_grad_(False)


def in_double(change, module, kind):
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.float()


def old_weight_norm(change, module, kind):
    if "weight" in module._parameters and module.weight.ndim > 1:
        weight_norm(module)


def eval_beside_dropout(change, module, kind):
    """The flag `training` differs between a module and its children."""
    module.training = False


# Changes of a parameter or a buffer, with its name as the third argument.
def parametrized(change, module, name):
    if isinstance(module._parameters.get(name), Tensor):
        parametrize.register_parametrization(module, name, Twice())


def not_a_leaf(change, module, name):
    tensor = getattr(module, name)
    delattr(module, name)
    setattr(module, name, tensor * 2)


def plain_in_place_of_parameter(change, module, name):
    if name in module._parameters:
        module._parameters[name] = module._parameters[name] * 2


def other_tensor(change, module, name):
    places = module._parameters if name in module._parameters else module._buffers
    tensor = places[name].detach()
    tensor = tensor.flip(0) if not tensor.is_floating_point() else tensor * 1.5 + 0.3
    places[name] = nn.Parameter(tensor) if name in module._parameters else tensor


def changed_in_place(change, module, name):
    with torch.no_grad():
        tensor = getattr(module, name)
        tensor.copy_(tensor.flip(-1) * 2 if tensor.is_floating_point() else tensor.flip(0))


def changed_behind_its_version(change, module, name):
    getattr(module, name).data.copy_(getattr(module, name).flip(0))


def none(change, module, name):
    setattr(module, name, None)


def buffer_in_place_of_parameter(change, module, name):
    tensor = getattr(module, name)
    delattr(module, name)
    module.register_buffer(name, tensor.detach() * 2)


def tensor_subclass(change, module, name):
    tensor = module._parameters.get(name)
    if tensor is not None:
        module._parameters[name] = tensor.detach().clone().as_subclass(TwiceTheWeight).requires_grad_()


def tensor_hook(change, module, name):
    if getattr(module, name).requires_grad:
        getattr(module, name).register_hook(lambda grad: 3 * grad)


# Changes of a method, with its name as the fourth argument.
def method_of_its_own(change, module, kind, name):
    setattr(module, name, twice(getattr(module, name)))


def method_of_the_class(change, module, kind, name):
    method = kind.__dict__[name]
    if not isinstance(method, (staticmethod, classmethod, property)):
        change.patch(kind, name, twice(method))


def other_setting(value: Any) -> Any:
    """Returns another value for a number, flag, string or tuple of numbers; any other value is returned as it is."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value * 2 + 0.25
        case "none":
            return "tanh"
        case "zeros":
            return "circular"
        case tuple():
            return tuple(map(other_setting, value))
    return value


ON_MODULES = [
    forward_hook,
    forward_hook_that_changes,
    forward_pre_hook,
    hook_with_keywords,
    backward_hook,
    backward_pre_hook,
    old_backward_hook,
    forward_of_its_own,
    call_impl_of_its_own,
    forward_of_the_class,
    call_of_the_class,
    subclass,
    subclass_with_another_call,
    other_children,
    fewer_children,
    no_children,
    one_more_child,
    children_as_attributes,
    frozen,
    in_double,
    old_weight_norm,
    eval_beside_dropout,
]
ON_TENSORS = [
    parametrized,
    not_a_leaf,
    plain_in_place_of_parameter,
    other_tensor,
    changed_in_place,
    changed_behind_its_version,
    none,
    buffer_in_place_of_parameter,
    tensor_subclass,
    tensor_hook,
]
ON_METHODS = [method_of_its_own, method_of_the_class]


def changes(module: nn.Module, kind: str) -> Iterator[tuple[str, Callable[[Change, nn.Module, type], None]]]:
    """Yields all changes of a kind that apply to a module, with their names."""
    cls = type(module)
    if kind == "modules":
        for change in ON_MODULES:
            yield change.__name__, change
    elif kind == "tensors":
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            for change in ON_TENSORS if tensor is not None else ():
                yield f"{change.__name__} {name}", lambda c, m, k, name=name, change=change: change(c, m, name)
    elif kind == "methods":
        names = [n for n, v in vars(cls).items() if callable(v) and n != "forward" and not n.startswith("__")]
        for name in names:
            for change in ON_METHODS:
                yield f"{change.__name__} {name}", lambda c, m, k, name=name, change=change: change(c, m, k, name)
    else:
        for name, value in vars(module).items():
            other = other_setting(value)
            if name[0] != "_" and other != value:
                yield f"{name} = {other}", lambda c, m, k, name=name, other=other: setattr(m, name, other)


def places(example: Example) -> list[str]:
    """Returns the names of the submodules to change."""
    inside = [name for name, _ in example.make().named_modules() if name.startswith(example.within)]
    return [name for name in inside if name not in example.without]


def run(module: nn.Module, call: Callable, example: Example, change: Change) -> dict[str, Any]:
    """Returns results, gradients and what hooks received; or the error."""
    x = torch.linspace(-2, 2, torch.Size(example.shape).numel(), dtype=torch.float64)
    x = x.sin().view(example.shape).requires_grad_()
    torch.manual_seed(1)
    try:
        results = call(module, x)
        results = results if isinstance(results, tuple) else (results,)
        sum((r * torch.linspace(0.5, 1, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results).backward()
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        NotImplementedError,
        IndexError,
        AssertionError,
    ) as error:
        return {"error": error}
    grads = {name: p.grad.as_subclass(Tensor) for name, p in module.named_parameters() if p.grad is not None}
    return {"results": results, "input": x.grad, **grads, "calls": change.calls}


def make(example: Example) -> nn.Module:
    torch.manual_seed(0)
    module = example.make().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def same(plain: Any, fast: Any, where: str) -> list[str]:
    """Returns a line for each difference."""
    if isinstance(plain, dict):
        if plain.keys() != fast.keys():
            return [f"{where}: {plain.get('error', 'works')} in plain, {fast.get('error', 'works')} accelerated"]
        return [line for key in plain if key != "error" for line in same(plain[key], fast[key], f"{where}: {key}")]
    if isinstance(plain, Tensor):
        if plain.shape != fast.shape or plain.dtype != fast.dtype:
            return [f"{where}: {fast.dtype} {tuple(fast.shape)} in place of {plain.dtype} {tuple(plain.shape)}"]
        error = (plain - fast).norm() / (1e-3 + plain.norm()) if plain.is_floating_point() else (plain != fast).sum()
        return [f"{where}: off by {error:.1e}"] if not error <= 1e-6 else []
    if isinstance(plain, (tuple, list)):
        if len(plain) != len(fast):
            return [f"{where}: {len(fast)} in place of {len(plain)}"]
        return [line for p, f in zip(plain, fast, strict=True) for line in same(p, f, where)]
    return [] if plain == fast else [f"{where}: {fast} in place of {plain}"]


def copied(module: nn.Module) -> nn.Module:
    """Copies a module with its tensors and children, in a fifth of the time of `copy.deepcopy`."""
    new = copy.copy(module)
    vars(new).update({name: value.copy() for name, value in vars(module).items() if isinstance(value, dict)})
    for name, child in module._modules.items():
        new._modules[name] = None if child is None else copied(child)
    for name, parameter in module._parameters.items():
        new._parameters[name] = None if parameter is None else nn.Parameter(parameter.detach().clone())
    for name, buffer in module._buffers.items():
        new._buffers[name] = None if buffer is None else buffer.clone()
    return new


def compare(
    example: Example, made: nn.Module, place: str, change: Callable, name: str, dropout: float = 0.0
) -> list[str]:
    """Applies the same change to a plain and an accelerated copy of an example, and returns the differences.

    made: the example, as `make` returns it; it stays as it is.
    """
    plain = copied(made)
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    fast = accelerate(copied(plain))
    outcomes = []
    kind = type(plain.get_submodule(place))
    for module, call in ((plain, example.plain), (fast, example.fast)):
        with contextlib.ExitStack() as undo:
            noted = Change(undo)
            try:
                change(noted, module.get_submodule(place), kind)
            except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
                pytest.fail(f"{name} of {place}: {error!r}")
            outcomes.append(run(module, call, example, noted))
    return same(*outcomes, f"{name} of {place or 'itself'}")


@pytest.fixture(autouse=True)
def quick(threads):
    with threads(1), backends.use("torch"):
        yield


@pytest.mark.filterwarnings("ignore")  # deprecated hooks and weight norm are tested on purpose
@pytest.mark.parametrize("kind", ["modules", "tensors", "methods", "settings"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_changes(name, kind):
    example, different, count = EXAMPLES[name], [], 0
    model = make(example)
    for place in places(example):
        for change_name, change in changes(model.get_submodule(place), kind):
            count += 1
            different += compare(example, model, place, change, change_name)[:1]
    assert count and not different, f"{len(different)} of {count}:\n" + "\n".join(different[:30])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXAMPLES)
def test_flags_that_differ_with_dropout(name):
    """Dropout draws the same numbers, whichever module's flag enables it."""
    example = EXAMPLES[name]
    model, change = make(example), eval_beside_dropout
    different = [line for place in places(example) for line in compare(example, model, place, change, "eval", 0.5)]
    assert not different, "\n".join(different)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_full_backward_hook])
@pytest.mark.parametrize("name", EXAMPLES)
def test_hooks_on_all_modules(name, register):
    """Hooks on all modules receive the same calls with the same arguments."""
    example, outcomes = EXAMPLES[name], []
    plain = make(example)
    for module, call in ((plain, example.plain), (accelerate(copy.deepcopy(plain)), example.fast)):
        noted = Change(contextlib.ExitStack())
        handle = register(noted.listen(inside=module))
        outcomes.append(run(module, call, example, noted))
        handle.remove()
    assert "error" in outcomes[0] or len(outcomes[0]["calls"]) > 1
    assert not same(*outcomes, "all")


@pytest.mark.parametrize("name", EXAMPLES)
def test_transforms(name):
    """torch.func with modules: derivatives in both modes, and parameters passed for one call."""
    example, results = EXAMPLES[name], []
    plain = make(example).eval()
    for module in plain.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # fused attention has no forward mode
    x = torch.linspace(-2, 2, torch.Size(example.shape).numel(), dtype=torch.float64).sin().view(example.shape)
    for module, call in ((plain, example.plain), (accelerate(copy.deepcopy(plain)), example.fast)):

        class Called(nn.Module):
            def __init__(self, inner, call):
                super().__init__()
                self.inner, self.call = inner, call

            def forward(self, x):
                result = self.call(self.inner, x)
                return result.total if isinstance(result, sgmim_fast.Losses) else result.square().sum()

        called = Called(module, call)
        parameters = {name: 1.1 * p.detach() for name, p in called.named_parameters()}

        def loss(parameters, called=called):
            return torch.func.functional_call(called, parameters, (x,))

        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x.cos())
            tangent = torch.autograd.forward_ad.unpack_dual(called(dual)).tangent
        _, jvp = torch.func.jvp(called, (x,), (x.cos(),))
        results.append((loss(parameters), torch.func.grad(loss)(parameters), jvp, tangent))
    assert not same(*results, "transforms")


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in ("stem", "branch")])
def test_traces(name):
    """torch.jit.trace and torch.fx record timm's own operators."""
    example = EXAMPLES[name]
    plain = make(example).eval()
    fast, x = accelerate(copy.deepcopy(plain)), torch.randn(example.shape, dtype=torch.float64)
    options = {
        o.name: o.default for o in signature(type(plain).forward).parameters.values() if o.default is not o.empty
    }
    for traced in (torch.jit.trace(fast, x), torch.fx.symbolic_trace(fast, options)):
        assert "sgmim_fast::" not in str(traced.graph)
        torch.testing.assert_close(traced(x), plain(x))


def test_traces_of_a_model():
    model = make(EXAMPLES["branch"])
    x, other = (torch.randn(2, 4, 16, 16, dtype=torch.float64) for _ in range(2))
    arguments = [(images[:, :3], images[:, 3:], mask) for images, mask in ((x, MASK), (other, 1 - MASK))]
    traced = torch.jit.trace(model, arguments[0])
    torch.testing.assert_close(traced(*arguments[1]), model(*arguments[1]))


@torch._dynamo.config.patch(recompile_limit=64)
@pytest.mark.parametrize("name", ["swin_transformer.SwinTransformerBlock", "vision_transformer.Block", "branch"])
def test_hooks_around_compilation(name):
    """The block compiles to one graph, with hooks registered before and others after compilation."""
    example = EXAMPLES[name]
    module = accelerate(make(example)).eval()
    x = torch.randn(example.shape, dtype=torch.float64)
    inside = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Softmax, nn.Identity))]

    def compile_anew() -> Callable[[torch.Tensor], torch.Tensor]:
        torch.compiler.reset()
        return torch.compile(lambda x: example.fast(module, x), fullgraph=name != "branch", backend="eager")

    for m in inside[1::3]:
        before = example.fast(module, x)
        handle = m.register_forward_hook(lambda m, args, result: 2 * result)
        compiled = compile_anew()
        torch.testing.assert_close(compiled(x), example.fast(module, x))
        handle.remove()
        torch.testing.assert_close(compiled(x), before)
    compiled = compile_anew()
    torch.testing.assert_close(compiled(x), example.fast(module, x))
    for m in inside[::3]:
        before = example.fast(module, x)
        handle = m.register_forward_hook(lambda m, args, result: 2 * result)
        torch.testing.assert_close(compiled(x), example.fast(module, x))
        handle.remove()
        torch.testing.assert_close(compiled(x), before)


def test_attention_maps_of_timm():
    model = sgmim_fast.create_encoder("vit_tiny_patch16_224", img_size=32, depth=2).model
    for block in model.blocks:
        block.attn.fused_attn = False
    x = torch.randn(1, 3, 32, 32)
    maps = AttentionExtract(model, method="hook")(x)
    fast = AttentionExtract(accelerate(copy.deepcopy(model)), method="hook")(x)
    assert len(maps) == 2
    torch.testing.assert_close(fast, maps)


def test_copies_keep_what_is_known_of_their_mask():
    block = accelerate(make(EXAMPLES["swin_transformer.SwinTransformerBlock"]))
    for copied in (copy.deepcopy(block), copy.deepcopy(copy.deepcopy(block)).float(), block.to(torch.float32)):
        mask, version = copied._seen_mask
        assert mask is copied.attn_mask and version == mask._version
    block.attn_mask.zero_()
    assert block.reasons()["attention"] and not hasattr(copy.deepcopy(block), "_seen_mask")
    block.init_non_persistent_buffers()
    assert not block.reasons()["attention"] and block._seen_mask[0] is block.attn_mask


def test_says_once_which_module_and_why(caplog):
    unmodified._said.clear()
    example = EXAMPLES["vision_transformer.Block"]
    block, model = accelerate(make(example)), make(EXAMPLES["branch"])
    block.attn.proj_drop.register_forward_hook(lambda *_: None)
    model.guidance.mlp.fc1.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING, "sgmim_fast"):
        for _ in range(2):
            block(torch.randn(example.shape, dtype=torch.float64))
            losses(model, torch.randn(2, 4, 16, 16, dtype=torch.float64))
    assert caplog.messages == [
        "the attention of a ViTBlock runs through timm's own code: attn.proj_drop has hooks",
        "the heads and the branch of SGMIM compute all tokens, through PyTorch's modules: guidance.mlp.fc1 has hooks",
    ]


@pytest.mark.parametrize("options", [{"head_dim": 8}, {"head_dim": 32}, {"num_heads": (3, 6)}], ids=str)
def test_heads_that_do_not_add_up_to_the_width(options):
    arguments = {"img_size": 64, "embed_dim": 32, "depths": (1, 1), "window_size": 4, "num_heads": (2, 4), **options}
    plain = sgmim_fast.create_encoder("swin_tiny_patch4_window7_224", **arguments)
    fast, images = accelerate(copy.deepcopy(plain)), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(fast(images), plain(images))
    why = [m.reasons()["attention"] for m in fast.modules() if isinstance(m, swin_transformer.SwinTransformerBlock)]
    assert all("the heads have" in reason or "num_heads does not divide" in reason for reason in why)


def test_torch_export_is_named_as_the_reason(caplog):
    unmodified._said.clear()
    example = EXAMPLES["vision_transformer.Block"]
    block = accelerate(make(example)).float().eval()
    with caplog.at_level(logging.WARNING, "sgmim_fast"):
        torch.export.export(block, (torch.randn(example.shape),))
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith("torch.export traces without strict=True")
