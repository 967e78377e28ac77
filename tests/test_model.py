"""`SGMIM` against the dense reference implementation for every family, option and kind of mask, and as a module."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import io
import pickle
import sys
from typing import Any

import pytest
import timm
import torch
from checks import AGAIN, assert_close_to_truth, moved
from hypothesis import given
from hypothesis import strategies as st
from packed import PRECISIONS, assert_same_bits
from tiny import FAMILIES, ConvEncoder, batch, drawn, family, foreign, gradients, nothing_searched, stem_mask
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sgmim_fast import SGMIM, Losses, SelectiveMask, backends, reference, selective_mask, standardize_structure
from sgmim_fast.ops import gemm

Evaluation = dict[str, Tensor]


def evaluate(
    model: SGMIM,
    images: Tensor,
    structure: Tensor | None,
    mask: Any,
    valid: Tensor | None = None,
    *,
    dense: bool = False,
) -> Evaluation:
    """Returns the three losses and all gradients by name. `dense` computes them with the reference implementation."""
    images = images.detach().requires_grad_()
    inputs = [images]
    if model.guidance is not None:
        structure = structure.detach().requires_grad_()
        inputs.append(structure)
    if dense:
        losses = reference.sgmim_losses(model, images, structure, mask, valid)
    else:
        losses = model(images, structure, mask, return_losses=True, structure_valid=valid)
        assert isinstance(losses, Losses)
    return losses._asdict() | gradients(model, losses.total, *inputs)


def assert_same(actual: Evaluation, expected: Evaluation, tolerance: float) -> None:
    """Compares each tensor relative to its norm. A gradient that is all zero may be absent."""
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        assert (actual[name] - e).norm() <= tolerance * e.norm(), name


def assert_right(model: SGMIM, size: tuple[int, int], mask: Any, valid: Tensor | None = None, count: int = 2) -> None:
    """Asserts 1e-10 in float64. In float32, where the kernels run, the error may be twice that of dense arithmetic."""
    double = copy.deepcopy(model).double()
    batches = [batch(model, size, count, seed) for seed in range(3)]
    truths = [evaluate(double, *inputs, mask, valid, dense=True) for inputs in batches]
    assert_same(evaluate(double, *batches[0], mask, valid), truths[0], 1e-10)
    batches = [[t.float() for t in inputs] for inputs in batches]
    actual, plain = (
        [evaluate(model, *inputs, mask, valid, dense=dense) for inputs in batches] for dense in (False, True)
    )
    assert actual[0].keys() == plain[0].keys() == truths[0].keys()
    for name in truths[0]:
        a, p, t = (torch.stack([e[name] for e in evaluations]) for evaluations in (actual, plain, truths))
        assert_close_to_truth(a, p, t, name)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    model, size = family(name)
    assert_right(model, size, drawn(model, size))


@pytest.mark.parametrize(
    "options",
    [
        {"structure_channels": 2},
        {"guidance": False},
        {"hidden_context": "drop"},
        {"position_embedding": True},
        {"position_embedding": True, "hidden_context": "drop", "structure_channels": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["swin-stride-16", "vit"])
def test_options(name, options):
    model, size = family(name, **options)
    assert_right(model, size, drawn(model, size))


@pytest.mark.parametrize(
    ("patch", "stride", "width", "size"),
    [
        (4, 4, 8, (8, 12)),  # no patch merging
        (4, 8, 16, (16, 24)),
        (2, 12, 16, (24, 12)),  # patches of 6 pixels, one merging
        (14, 14, 40, (28, 42)),  # head width 5
        (8, 24, 32, (48, 24)),
        (4, 40, 24, (40, 80)),  # three mergings, patches of 5 pixels
        (16, 16, 32, (16, 16)),  # one cell
    ],
    ids=str,
)
def test_strides(patch, stride, width, size):
    model = foreign(width=width, patch=patch, stride=stride)
    assert_right(model, size, drawn(model, size, 3), count=3)


@pytest.mark.parametrize("layout", ["tokens", "map"])
def test_foreign_encoders(layout):
    model = foreign(layout=layout)
    assert_right(model, (32, 48), drawn(model, (32, 48)))


@pytest.mark.parametrize("shown", ["masked", "visible", "all", 0.4])
@pytest.mark.parametrize("context", ["keep", "drop"])
def test_where_the_structure_is_shown(shown, context):
    model, size = foreign(hidden_context=context), (64, 48)
    assert_right(model, size, drawn(model, size, 3, ratio=[0.2, 0.6, 0.9], shown=shown), count=3)


@pytest.mark.parametrize("ratio", [[0.0, 0.5], [1.0, 0.5], 0.0, 1.0], ids=str)
@pytest.mark.parametrize("context", ["keep", "drop"])
@pytest.mark.parametrize("shown", ["masked", "visible"])
def test_nothing_visible_and_nothing_masked(ratio, context, shown):
    model, size = foreign(hidden_context=context), (32, 32)
    assert_right(model, size, drawn(model, size, ratio=ratio, shown=shown))


def test_a_mask_coarser_than_the_cells():
    model, size = foreign(), (64, 96)
    mask = drawn(model, (32, 48))  # 2 × 3 units on 4 × 6 cells
    assert mask.mask.shape == (2, 2, 3)
    assert_right(model, size, mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64])
def test_mask_tensors(dtype):
    """A mask tensor gives bitwise the results of the drawn mask."""
    model, size = foreign(), (32, 48)
    mask = drawn(model, size, ratio=[0.3, 0.7])
    inputs = [t.float() for t in batch(model, size)]
    assert_same_bits([evaluate(model, *inputs, m) for m in (mask, stem_mask(model, size, mask).to(dtype))])


UNALIGNED = torch.rand(2, 8, 12, generator=torch.Generator().manual_seed(0)) < 0.5


@pytest.mark.parametrize(
    "options", [{}, {"hidden_context": "drop"}, {"structure_channels": 2}, {"guidance": False}], ids=str
)
def test_unaligned_masks_take_the_dense_arithmetic(options):
    model, size = foreign(**options), (32, 48)
    inputs = [t.float() for t in batch(model, size)]
    actual, expected = (evaluate(model, *inputs, UNALIGNED, dense=dense) for dense in (False, True))
    assert_same_bits([actual, expected])


def test_a_drawn_mask_finer_than_the_cells_takes_the_dense_arithmetic():
    model, size = foreign(stride=32), (64, 96)
    mask = drawn(foreign(stride=16), size)
    inputs = [t.float() for t in batch(model, size)]
    assert_same_bits([evaluate(model, *inputs, mask, dense=dense) for dense in (False, True)])


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("channels", [1, 2])
def test_structure_valid(aligned, channels):
    model, size = foreign(structure_channels=channels), (32, 48)
    valid = torch.rand(2, channels, *size) < 0.8
    mask = drawn(model, size) if aligned else UNALIGNED
    assert_right(model, size, mask, valid)
    images, structure = batch(model, size)
    double = model.double()
    missing = torch.where(valid, structure, torch.nan)
    losses = [double(images, s, mask, structure_valid=valid) for s in (structure, missing)]
    assert torch.equal(*losses)


def test_nothing_valid():
    model, size = foreign(), (32, 48)
    images, structure = (t.float() for t in batch(model, size))
    losses = model(
        images, structure, drawn(model, size), return_losses=True, structure_valid=torch.zeros_like(structure).bool()
    )
    assert losses.structure == 0 and losses.image > 0


def test_every_backend(backend, device):
    if device.type != "cpu":
        pytest.skip("tests/test_model_places.py has the model on a GPU")
    model, size = foreign(structure_channels=2), (32, 48)
    mask = drawn(model, size, ratio=[0.3, 0.8])
    valid = torch.rand(2, 2, *size) < 0.8
    inputs = [t.float() for t in batch(model, size)]
    double = evaluate(copy.deepcopy(model).double(), *[t.double() for t in inputs], mask, valid, dense=True)
    actual, plain = (evaluate(model, *inputs, mask, valid, dense=dense) for dense in (False, True))
    again = functools.cache(lambda: [evaluate(model, *moved(inputs), mask, valid, dense=True) for _ in range(AGAIN)])
    for name in double:
        assert_close_to_truth(
            actual[name], plain[name], double[name], name, lambda name=name: (found[name] for found in again())
        )
    assert plain.keys() == actual.keys()


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_autocast(precision):
    """The error against the float32 model is that of the dense arithmetic under autocast. Gradients are in float32."""
    model, size = family("vit")
    mask = drawn(model, size)
    actual, plain, truth = [], [], []
    for seed in range(4):
        inputs = [t.float() for t in batch(model, size, seed=seed)]
        with torch.autocast("cpu", torch.bfloat16), gemm.compute_bfloat16_in(precision.compute):
            actual.append(evaluate(model, *inputs, mask))
            plain.append(evaluate(model, *inputs, mask, dense=True))
        truth.append(evaluate(copy.deepcopy(model).double(), *[t.double() for t in inputs], mask, dense=True))
    assert {t.dtype for t in actual[0].values()} == {torch.float32}
    for name in truth[0]:
        assert_close_to_truth(
            *(torch.stack([e[name] for e in evaluations]) for evaluations in (actual, plain, truth)), name
        )


def test_a_bfloat16_model():
    model, size = foreign().bfloat16(), (32, 48)
    mask = drawn(model, size)
    inputs = [t.bfloat16() for t in batch(model, size)]
    actual = evaluate(model, *inputs, mask)
    expected = evaluate(model.double(), *[t.double() for t in inputs], mask, dense=True)
    assert {actual[name].dtype for name in ("total", "image", "structure")} == {torch.float32}
    assert actual["input 0"].dtype == torch.bfloat16
    for name, e in expected.items():
        assert (actual[name] - e).norm() <= 0.05 * e.norm(), name


@given(
    patch=st.sampled_from([1, 2, 4]),
    cells=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stem_cells=st.integers(1, 8),
    channels=st.integers(1, 2),
    context=st.sampled_from(["keep", "drop"]),
    data=st.data(),
)
def test_any_shape_and_mask(patch, cells, stem_cells, channels, context, data):
    """Losses and gradients are those of the reference implementation for any mask, aligned to cells or not."""
    stride, size = patch * stem_cells, (cells[0] * patch * stem_cells, cells[1] * patch * stem_cells)
    model = foreign(patch=patch, stride=stride, structure_channels=channels, hidden_context=context).double()
    shape = 2, size[0] // patch, size[1] // patch
    if data.draw(st.booleans(), label="aligned"):
        mask = torch.tensor(
            data.draw(st.lists(st.booleans(), min_size=2 * cells[0] * cells[1], max_size=2 * cells[0] * cells[1]))
        )
        mask = mask.view(2, *cells).repeat_interleave(stem_cells, 1).repeat_interleave(stem_cells, 2)
    else:
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) < 0.5
    inputs = batch(model, size)
    expected = evaluate(model, *inputs, mask, dense=True)
    assert_same(evaluate(model, *inputs, mask), expected, 1e-9)
    actual = evaluate(model.float(), *[t.float() for t in inputs], mask)
    for name, e in expected.items():
        assert ((actual[name] - e).abs() <= 1e-3 * (1 + e.abs())).all(), name


@pytest.mark.parametrize("name", [*FAMILIES, "foreign"])
@pytest.mark.parametrize("shown", ["masked", "visible", "all", 0.5])
def test_a_drawn_mask_is_not_searched(name, shown):
    """Holds for every family and every grid whose units consist of whole cells, in forward and backward."""
    model, size = (foreign(), (32, 64)) if name == "foreign" else family(name)
    inputs = [t.float() for t in batch(model, size)]
    cells = size[0] // model.encoder_stride, size[1] // model.encoder_stride
    for side in (s for s in range(1, min(cells) + 1) if cells[0] % s == cells[1] % s == 0):
        mask = selective_mask(2, (cells[0] // side, cells[1] // side), [0.3, 0.8], shown=shown)
        with nothing_searched():
            actual = evaluate(model, *inputs, mask)
        expected = evaluate(model, *inputs, mask, dense=True)
        for key, e in expected.items():  # where all cells are masked, some gradients are rounding errors
            assert (actual.get(key, torch.zeros_like(e)) - e).norm() <= 1e-3 * e.norm() + 1e-6, key


def test_searching_is_noticed():
    with pytest.raises(AssertionError, match="nonzero_static"), nothing_searched():
        torch.nonzero_static(torch.ones(3), size=3)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), nothing_searched():
        torch.ones(3).sum().item()
    with pytest.raises(AssertionError, match="index"), nothing_searched():
        torch.ones(3)[torch.tensor([True, False, True])]


@pytest.mark.parametrize("name", ["swin", "vit", "foreign"])
def test_a_mask_tensor_is_searched_once(name, monkeypatch):
    model, size = (foreign(), (32, 64)) if name == "foreign" else family(name)
    mask = drawn(model, size)
    inputs = [t.float() for t in batch(model, size)]
    expected, tensor, searched = evaluate(model, *inputs, mask), stem_mask(model, size, mask), []
    find = torch.nonzero_static
    monkeypatch.setattr(torch, "nonzero_static", lambda x, size: searched.append(x.shape) or find(x, size=size))
    assert_same_bits([expected, evaluate(model, *inputs, tensor)])
    assert searched == 2 * [mask.mask.flatten().shape]  # on the cells: once for masked and once for visible ones


class Refused(nn.Linear):
    """A head that the ops do not replace."""


@pytest.mark.parametrize("path", ["visible", "dense", "not aligned"])
def test_the_model_computes_nothing_of_the_reference(path, monkeypatch):
    model, size = foreign(), (32, 64)
    inputs = *(t.float() for t in batch(model, size)), drawn(model, size)
    if path == "dense":
        model.image_head.__class__ = Refused
    if path == "not aligned":
        inputs = *inputs[:2], torch.rand(2, 8, 16) < 0.5
    expected = evaluate(model, *inputs, dense=True)
    for name, value in vars(reference).copy().items():
        if getattr(value, "__module__", "") == reference.__name__ and not isinstance(value, type):
            monkeypatch.delattr(reference, name)
    assert not hasattr(reference, "sgmim_losses")
    assert_same(evaluate(model, *inputs), expected, 1e-3)
    model.predict(*inputs)


def test_the_reference_is_a_leaf():
    """It imports only PyTorch and the standard library, even for types."""
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(reference))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module)
    roots = {name.partition(".")[0] for name in names}
    assert "torch" in roots and roots <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", ["structure_tokens", "relational_guidance"])
def test_functions_of_the_reference_that_are_modules_now(name):
    model, size = foreign(), (32, 64)
    tokens, shown = torch.randn(2, 8, 16), torch.rand(2, 8) < 0.5
    module, args = model.guidance, (tokens, tokens, shown)
    if name == "structure_tokens":
        module, args = model.structure_encoder, (batch(model, size)[1].float(), torch.rand(2, 8, 16) < 0.5)
    with pytest.warns(DeprecationWarning, match=f"reference.{name}"):
        found = getattr(reference, name)(module, *args)
    assert torch.equal(found, module(*args))


def test_what_is_returned():
    model, size = foreign(), (32, 48)
    inputs = *(t.float() for t in batch(model, size)), drawn(model, size)
    losses = model(*inputs, return_losses=True)
    assert losses._fields == ("total", "image", "structure")
    assert torch.equal(losses.total, losses.image + losses.structure)
    assert torch.equal(model(*inputs), losses.total)
    assert torch.equal(model(images=inputs[0], structure=inputs[1], mask=inputs[2]), losses.total)


def test_without_guidance_it_is_simmim():
    model, size = foreign(guidance=False), (32, 48)
    assert model.structure_encoder is model.guidance is model.structure_head is None
    images = batch(model, size)[0].float()
    losses = model(images, mask=drawn(model, size), return_losses=True)
    assert torch.equal(losses.total, losses.image) and losses.structure == 0
    assert not [name for name in model.state_dict() if name.split(".")[0] not in ("encoder", "image_head")]


def test_channels_last_and_strided_inputs():
    model, size = foreign(structure_channels=2), (32, 48)
    mask = drawn(model, size)
    images, structure = (t.float() for t in batch(model, size))
    expected = evaluate(model, images, structure, mask)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (images, structure)]
    wider = [torch.stack([t, t], -1)[..., 0] for t in (images, structure)]
    for inputs in (last, wider):
        assert not any(t.is_contiguous() for t in inputs)
        assert_same(evaluate(model, *inputs, mask), expected, 1e-5)


def test_same_bits_again(threads):
    model, size = family("swin")
    inputs = [t.float() for t in batch(model, size)]
    for number in (1, 2):
        with threads(number):
            assert_same_bits([evaluate(model, *inputs, drawn(model, size)) for _ in range(2)])


def test_pickle_and_deepcopy():
    model, size = family("vit")
    inputs = *(t.float() for t in batch(model, size)), drawn(model, size)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits([evaluate(m, *inputs) for m in (model, other)])
    mask = pickle.loads(pickle.dumps(inputs[2]))
    assert isinstance(mask, SelectiveMask) and torch.equal(model(*inputs[:2], mask), model(*inputs))


def test_deepcopy_after_a_step():
    model, size = foreign(), (32, 48)
    inputs = *(t.float() for t in batch(model, size)), drawn(model, size)
    model(*inputs).backward()
    assert_same_bits([evaluate(m, *inputs) for m in (model, copy.deepcopy(model))])


def test_state_dict_round_trip():
    model, size = foreign(position_embedding=False), (32, 48)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = SGMIM(ConvEncoder(), 16)
    inputs = *(t.float() for t in batch(model, size)), drawn(model, size)
    assert not torch.equal(other(*inputs), model(*inputs))
    assert not any(other.load_state_dict(torch.load(file)))
    assert_same_bits([evaluate(m, *inputs) for m in (model, other)])


def test_no_weight_decay():
    model, _ = family("vit", position_embedding=True)
    names = model.no_weight_decay()
    assert {"encoder.mask_token", "encoder.model.cls_token", "encoder.model.pos_embed", "guidance.pos_embed"} <= names
    assert {name for name, p in model.named_parameters() if p.ndim > 2} & names == {
        "encoder.mask_token",
        "encoder.model.cls_token",
        "encoder.model.pos_embed",
        "guidance.pos_embed",
    }
    assert foreign().no_weight_decay() == set()


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_training_lowers_the_losses(name):
    model, size = family(name)
    images, structure = 1 + 0.1 * torch.randn(2, 3, *size), 0.1 * torch.randn(2, 1, *size) - 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, history = torch.Generator().manual_seed(0), []
    grid = [s // model.encoder_stride for s in size]
    for _ in range(15):
        losses = model(images, structure, selective_mask(2, grid, generator=generator), return_losses=True)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        history.append([loss.item() for loss in losses])
    for first, last in zip(history[0], history[-1], strict=True):
        assert last < 0.6 * first


def test_frozen_parts():
    """Only the head is trained: other parameters have no gradient, and the head's gradient is the same."""
    model, size = foreign(), (32, 48)
    inputs = *(t.float() for t in batch(model, size)), drawn(model, size)
    expected = evaluate(model, *inputs)
    model.requires_grad_(False)
    model.structure_head.requires_grad_()
    model(*inputs).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("structure_head"):
            assert torch.equal(parameter.grad, expected[name])
        else:
            assert parameter.grad is None


class Broken(ConvEncoder):
    """Returns half of its tokens."""

    def forward(self, x, mask):
        return super().forward(x, mask)[:, ::2]


MODEL, SIZE = foreign(), (32, 48)


def arguments(**changes: Any) -> dict[str, Any]:
    images, structure = (t.float() for t in batch(MODEL, SIZE))
    given = {
        "images": images,
        "structure": structure,
        "mask": stem_mask(MODEL, SIZE, drawn(MODEL, SIZE)),
        "structure_valid": None,
    }
    return given | {name: change(given[name]) for name, change in changes.items()}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": lambda t: t[0]}, ValueError, r"images has shape \(3, 32, 48\); expected \(B, 3, H, W\)"),
        ({"images": lambda t: t[:, :1]}, ValueError, "images has 1 channels; expected 3"),
        ({"images": lambda t: t.byte()}, TypeError, "images has dtype torch.uint8; expected a floating-point dtype"),
        ({"images": lambda t: t.long()}, TypeError, "images has dtype torch.int64; expected a floating-point dtype"),
        ({"images": lambda t: t.numpy()}, TypeError, r"images is a ndarray; expected a tensor \(B, 3, H, W\)"),
        ({"images": lambda t: t[:0]}, ValueError, "images is an empty batch; expected at least one image"),
        ({"images": lambda t: t[:, :, :-1]}, ValueError, "images has 31x48 pixels; expected multiples of the encoder"),
        ({"images": lambda t: t[:, :, :, 8:]}, ValueError, "images has 32x40 pixels; expected multiples of"),
        ({"structure": lambda t: None}, TypeError, r"structure is missing; expected a map \(B, S, H, W\)"),
        ({"structure": lambda t: t[:, 0]}, ValueError, r"structure has shape \(2, 32, 48\); expected \(B, 1, H, W\)"),
        ({"structure": lambda t: t.repeat(1, 2, 1, 1)}, ValueError, "structure has 2 channels; expected 1"),
        ({"structure": lambda t: t.short()}, TypeError, "structure has dtype torch.int16; expected a floating"),
        ({"structure": lambda t: t[:, :, 16:]}, ValueError, r"structure has shape \(2, 1, 16, 48\); exp"),
        ({"structure": lambda t: t[:1]}, ValueError, r"structure has shape \(1, 1, 32, 48\); expected"),
        ({"structure": lambda t: t.to("meta")}, ValueError, "structure is on meta; expected cpu, where images is"),
        ({"mask": lambda t: None}, TypeError, "mask is missing; expected a tensor"),
        ({"mask": lambda t: t.tolist()}, TypeError, "mask is a list; expected a tensor"),
        ({"mask": lambda t: t[:, ::4, ::4]}, ValueError, r"mask has shape \(2, 2, 3\); expected .* = \(2, 8, 12\)"),
        ({"mask": lambda t: drawn(MODEL, SIZE).mask}, ValueError, r"of what selective_mask returned pass all, not"),
        ({"mask": lambda t: t[:1]}, ValueError, r"mask has shape \(1, 8, 12\); expected .* = \(2, 8, 12\)"),
        ({"mask": lambda t: t[:, None]}, ValueError, r"mask has shape \(2, 1, 8, 12\); expected"),
        ({"mask": lambda t: t.float() * 2}, ValueError, "mask has values other than 0 and 1; expected 1 where"),
        ({"mask": lambda t: t.float() - 0.5}, ValueError, "mask has values other than 0 and 1; expected 1 where"),
        ({"mask": lambda t: t.to("meta")}, ValueError, "mask is on meta; expected cpu, where images is"),
        ({"mask": lambda t: drawn(MODEL, SIZE, 3)}, ValueError, r"mask has shape \(3, 2, 3\); expected 2 masks"),
        ({"mask": lambda t: drawn(MODEL, (80, 48))}, ValueError, r"mask has shape \(2, 5, 3\); expected 2 masks"),
        ({"structure_valid": lambda t: torch.ones(2, 1, 32, 48)}, TypeError, "structure_valid has dtype torch.float32"),
        ({"structure_valid": lambda t: torch.ones(2, 1, 32, 32).bool()}, ValueError, "structure_valid has shape "),
        (
            {"structure_valid": lambda t: torch.ones(2, 1, 32, 48, device="meta").bool()},
            ValueError,
            "structure_valid is on meta; expected cpu",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        MODEL(**arguments(**changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.where(t > t.min(), torch.nan),
            "structure has infinities or NaN; expected a map that sgmim_fast.st",
        ),
        (lambda t: t.where(t > t.min(), torch.inf), "structure has infinities or NaN; .*nonfinite='ignore', and struc"),
        (
            lambda t: 65535 * t.sigmoid(),
            "structure is mostly beyond ±10, from .* to .*; expected a map that sgmim_fast",
        ),
        (lambda t: 255 * (t / 9).sigmoid(), "structure is mostly beyond"),
        (lambda t: -1000 * t.sigmoid(), "structure is mostly beyond"),
        (
            lambda t: torch.cat([t[:-1], 1000 * t[-1:].sigmoid()]),
            "structure is mostly beyond ±10 in some of its maps, from",
        ),
    ],
    ids=["NaN", "infinity", "16 bits", "8 bits", "negative", "one of them"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_structure_that_is_not_standardised(change, message, dtype):
    model, given = foreign().to(dtype), arguments()
    given = {name: value.to(dtype) if name in ("images", "structure") else value for name, value in given.items()}
    given["structure"] = change(given["structure"])
    with pytest.raises(ValueError, match=message):
        model(**given)
    with pytest.raises(ValueError, match=message):
        model.predict(**given)
    given["structure_valid"] = given["structure"].isfinite() & (given["structure"].abs() < 10)
    assert model(**given).isfinite()


@given(share=st.floats(0, 0.19), far=st.floats(1, 1e6), seed=st.integers(0, 99))
def test_every_standardised_map_is_taken(share, far, seed):
    """Includes maps that are nearly flat except for a few distant values."""
    generator = torch.Generator().manual_seed(seed)
    raw = 65535 * torch.rand(2, 1, *SIZE, generator=generator).pow(1 + far / 1e5)
    raw[torch.rand(raw.shape, generator=generator) < share] *= far
    given = arguments(structure=lambda t: standardize_structure(raw))
    assert MODEL(**given).isfinite()


def test_compiled_it_is_refused_too():
    model, given = foreign(), arguments()
    given["mask"] = drawn(model, SIZE)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert compiled(**given).isfinite()
    for raw in (65535 * given["structure"].sigmoid(), given["structure"] / 0):
        with pytest.raises(RuntimeError, match="structure has infinities, NaN or values that are not standardised"):
            compiled(**given | {"structure": raw})


def test_where_values_cannot_be_read():
    """When the model is recorded (then for all tokens) or runs on fake tensors, it behaves as without the check."""
    model, given = foreign(), arguments()
    given["mask"] = drawn(model, SIZE)

    def call(images, structure):
        return model(**given | {"images": images, "structure": structure})

    inputs = given["images"], given["structure"]
    torch.testing.assert_close(make_fx(call)(*inputs)(*inputs), call(*inputs), rtol=1e-6, atol=0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call(*map(mode.from_tensor, inputs)).shape == ()


def test_a_mask_in_the_place_of_structure():
    given = arguments()
    with pytest.raises(TypeError, match=r"mask is missing; expected .* returned, by name: mask=\.\.\."):
        foreign(guidance=False)(given["images"], given["mask"])


def test_return_losses_by_position():
    model, size = foreign(), (32, 48)
    inputs = *(t.float() for t in batch(model, size)), drawn(model, size)
    with pytest.warns(FutureWarning, match="return_losses by position will be refused; pass it by name") as found:
        losses = model(*inputs, True)
    assert isinstance(losses, Losses) and found[0].filename == __file__
    for more, named in (((True, None), {}), ((False,), {"return_losses": True})):
        with pytest.raises(TypeError, match="return_losses and the rest by name"):
            model(*inputs, *more, **named)


def test_structure_of_another_dtype():
    with pytest.raises(
        TypeError, match=r"structure has dtype torch\.float64 and embed_weight torch\.float32; expected the same"
    ):
        MODEL(**arguments(structure=lambda t: t.double()))


def test_an_encoder_that_returns_something_else():
    torch.manual_seed(0)
    model = SGMIM(Broken(), 16)
    with pytest.raises(
        ValueError, match=r"encoder returned \(2, 3, 16\); expected \(B, N, C\) = \(2, 6, 16\) or \(B, C, h, w\)"
    ):
        model(**arguments())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"encoder": nn.Identity()}, TypeError, "encoder is a Identity without 'num_features'; expected a masked"),
        ({"encoder": "swin_tiny"}, TypeError, r"encoder is a str without 'num_features'.* sgmim_fast.create_encoder\("),
        ({"encoder_stride": 18}, ValueError, "encoder_stride is 18; expected a multiple of the encoder's patch size 4"),
        ({"encoder_stride": 0}, ValueError, "encoder_stride is 0; expected a multiple"),
        ({"structure_channels": 0}, ValueError, "structure_channels is 0; expected at least 1"),
        ({"hidden_context": "mask"}, ValueError, "hidden_context is 'mask'; expected 'keep' or 'drop'"),
        ({"encoder": ConvEncoder(20)}, ValueError, "encoder.num_features is 20; expected a multiple of the guidance's"),
        ({"encoder": ConvEncoder(9)}, ValueError, r"encoder.num_features is 9; expected a multiple of 2\^2"),
        ({"position_embedding": True}, ValueError, "position_embedding is True; expected an encoder with `img_size`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        SGMIM(**{"encoder": ConvEncoder(), "encoder_stride": 16} | options)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "resnet18"])
def test_a_plain_timm_model(name):
    encoder = timm.create_model(name)
    for attribute in ("in_chans", "patch_size"):  # some timm models have these attributes
        setattr(encoder, attribute, 4)
    with pytest.raises(TypeError, match=f"encoder is timm's .* takes no mask; .*create_encoder.'{name}'"):
        SGMIM(encoder, 32)


def test_stride_of_a_timm_encoder():
    encoder = family("swin")[0].encoder
    with pytest.raises(ValueError, match="encoder_stride is 16; expected 32, the stride of this encoder"):
        SGMIM(encoder, encoder_stride=16)


def test_patch_that_is_not_square():
    encoder = ConvEncoder()
    encoder.patch_size = (4, 8)
    with pytest.raises(ValueError, match=r"encoder.patch_size is \(4, 8\); expected a square"):
        SGMIM(encoder, 16)
    encoder.patch_size = (4, 4)
    assert SGMIM(encoder, 16).patch_size == 4


def test_a_forced_backend_is_asked_for_the_branch():
    model = foreign().double()
    if not backends.available()["cpu"][0]:
        pytest.skip(backends.available()["cpu"][1])
    inputs = batch(model, (32, 48))
    with backends.use("cpu"), pytest.raises(RuntimeError, match="'cpu' was forced but cannot run"):
        model(*inputs, drawn(model, (32, 48)))
