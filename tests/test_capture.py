"""`capture` with a simulated graph on the CPU. test_capture_gpu.py has the tests on a GPU."""

from __future__ import annotations

import copy
import logging
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from fake_graph import FakeGraph, values_unread
from tiny import batch, drawn, family, foreign, stem_mask
from torch import Tensor, nn

from sgmim_fast import SGMIM, SelectiveMask, backends, capture, create_encoder, selective_mask

CAPTURE = sys.modules["sgmim_fast.capture"]


@pytest.fixture
def graphs(monkeypatch):
    """Lets `capture` record steps on the CPU, on a backend that behaves there as on a GPU."""
    monkeypatch.setattr(CAPTURE, "Graph", FakeGraph)
    with backends.use("torch"), values_unread():
        yield FakeGraph


def data(model: SGMIM, size: tuple[int, int], step: int, count: int = 2) -> tuple[Tensor, Tensor, SelectiveMask]:
    """Returns a batch and masks that differ in every step."""
    images, structure = (x.float() for x in batch(model, size, count, seed=10 + step))
    return images, structure, drawn(model, size, count, seed=20 + step)


def eager(model: nn.Module, *inputs: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """An ordinary eager forward and backward pass."""
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(*inputs, **options)
    loss.backward()
    return loss.detach()


def state(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of parameters, buffers and gradients."""
    found = {name: value.clone() for name, value in model.state_dict().items()}
    return found | {f"{n}.grad": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, other: nn.Module) -> None:
    found, expected = state(model), state(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def pair(name: str = "vit", **options: Any) -> tuple[SGMIM, SGMIM, tuple[int, int]]:
    """Returns a model, a copy of it, and its image size."""
    model, size = family(name, **options)
    return model, copy.deepcopy(model), size


def adamw(model: nn.Module, capturable: bool = True, lr: Any = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr, fused=True, capturable=capturable)


@pytest.mark.parametrize("name", ["swin", "swinv2", "beit", "vit"])
def test_replays_are_the_eager_step(graphs, name):
    """Loss and gradients are bitwise equal while images, structure, masks and weights change."""
    model, plain, size = pair(name)
    step = capture(model, autocast=torch.bfloat16)
    for i in range(5):
        inputs = data(model, size, i)
        model.zero_grad()
        plain.zero_grad()
        assert torch.equal(step(*inputs), eager(plain, *inputs, dtype=torch.bfloat16))
        assert_same(model, plain)
        with torch.no_grad():
            for those in (model.parameters(), plain.parameters()):
                for p in those:
                    p -= 0.01 * p.grad
    assert step.captures == 1 and step.reasons == []


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_training_with_optimizer_scaler_and_clipping(graphs, capturable, accumulate, scaled):
    """Twelve steps give bitwise the weights of the plain loop. The optimizer is captured if it is capturable."""
    model, plain, size = pair()
    optimizers = [adamw(m, capturable) for m in (model, plain)]
    scalers = [torch.amp.GradScaler("cpu", 256.0, growth_interval=3) if scaled else None for _ in range(2)]
    step = capture(model, optimizers[0], scaler=scalers[0], clip=0.5, accumulate=accumulate)
    for i in range(12 * accumulate):
        inputs = data(model, size, i)
        found = step(*inputs)
        if i % accumulate == 0:
            optimizers[1].zero_grad()
        loss = plain(*inputs)
        assert torch.equal(found, loss.detach())
        loss = loss / accumulate if accumulate > 1 else loss
        (scalers[1].scale(loss) if scaled else loss).backward()
        if i % accumulate == accumulate - 1:
            if scaled:
                scalers[1].unscale_(optimizers[1])
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            if scaled:
                scalers[1].step(optimizers[1])
                scalers[1].update()
            else:
                optimizers[1].step()
        assert_same(model, plain)
    assert step.captures == (2 if capturable else 1) and step.reasons == []
    assert not scaled or scalers[0].state_dict() == scalers[1].state_dict()


def test_a_learning_rate_on_the_device_is_seen(graphs):
    model, plain, size = pair()
    optimizers = [adamw(m, lr=torch.tensor(1e-2)) for m in (model, plain)]
    step = capture(model, optimizers[0])
    for i in range(8):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (i + 1))
        inputs = data(model, size, i)
        step(*inputs)
        optimizers[1].zero_grad()
        eager(plain, *inputs)
        optimizers[1].step()
        assert_same(model, plain)
    assert step.captures == 2


def test_a_learning_rate_that_is_a_number_and_changes(graphs, caplog):
    """The result is right, and one warning says how to include the learning rate in the graph."""
    model, plain, size = pair()
    optimizers = [adamw(m) for m in (model, plain)]
    step = capture(model, optimizers[0])
    for i in range(25):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 / (i + 1)
        inputs = data(model, size, i)
        step(*inputs)
        optimizers[1].zero_grad()
        eager(plain, *inputs)
        optimizers[1].step()
    assert_same(model, plain)
    assert step.captures == 1
    assert [r.message for r in caplog.records if "a learning rate can be a tensor" in r.message] != []
    assert len(caplog.records) == 1


def load_state(model, plain, optimizer, other):
    for m in (model, plain):
        m.load_state_dict({name: 0.9 * value for name, value in m.state_dict().items()})


def assign_state(model, plain, optimizer, other):
    for m in (model, plain):
        m.load_state_dict({name: 0.9 * value for name, value in m.state_dict().items()}, assign=True)
    for o, m in ((optimizer, model), (other, plain)):
        o.param_groups[0]["params"] = list(m.parameters())


def other_data(model, plain, optimizer, other):
    for m in (model, plain):
        for p in m.parameters():
            p.data = p.data * 0.9


def in_place_data(model, plain, optimizer, other):
    for m in (model, plain):
        for p in m.parameters():
            p.data.mul_(0.9)


def load_optimizer(model, plain, optimizer, other):
    for o in (optimizer, other):
        o.load_state_dict(copy.deepcopy(o.state_dict()))


def freeze(model, plain, optimizer, other):
    for m in (model, plain):
        m.encoder.requires_grad_(False)


def evaluation(model, plain, optimizer, other):
    model.eval()
    plain.eval()


def other_rate(model, plain, optimizer, other):
    for o in (optimizer, other):
        o.param_groups[0]["weight_decay"] = 0.5


def other_attribute(model, plain, optimizer, other):
    for m in (model, plain):
        m.encoder.model.norm.eps = 0.1


def other_child(model, plain, optimizer, other):
    for m in (model, plain):
        m.encoder.model.norm = nn.Identity()


def new_parameter(model, plain, optimizer, other):
    for m, o in ((model, optimizer), (plain, other)):
        m.image_head.bias = nn.Parameter(torch.ones_like(m.image_head.bias))
        o.add_param_group({"params": [m.image_head.bias]})


@pytest.mark.parametrize(
    "change",
    [
        *(load_state, assign_state, other_data, in_place_data, load_optimizer, freeze, evaluation, other_rate),
        *(other_attribute, other_child, new_parameter),
    ],
)
def test_what_changes_between_steps_is_seen(graphs, change):
    """Results are bitwise those of the plain loop before, during and long after the change."""
    model, plain, size = pair()
    optimizers = [adamw(m) for m in (model, plain)]
    step = capture(model, optimizers[0], clip=1.0)
    for i in range(14):
        if i == 7:
            change(model, plain, *optimizers)
        inputs = data(model, size, i)
        optimizers[1].zero_grad()
        loss = eager(plain, *inputs)
        assert torch.equal(step(*inputs), loss)
        nn.utils.clip_grad_norm_([p for g in optimizers[1].param_groups for p in g["params"]], 1.0)
        optimizers[1].step()
        assert_same(model, plain)
    again = change not in (load_state, in_place_data)
    assert step.captures == (2 if not again else 3 if change in (load_optimizer, other_rate) else 4)
    assert step.reasons == []


def test_gradients_add_up_as_backward_adds_them(graphs):
    """Without an optimizer, gradients accumulate: over calls, over two shapes, in the caller's tensors, after
    zeroing."""
    model, plain, size = pair()
    step = capture(model)

    def both(i: int, count: int = 2) -> None:
        inputs = data(model, size, i, count)
        assert torch.equal(step(*inputs), eager(plain, *inputs))
        assert_same(model, plain)

    for i in range(9):
        both(i, count=2 + i % 2)
        if i % 4 == 3:
            for m in (model, plain):
                m.zero_grad(set_to_none=i == 3)
    own = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for m in (model, plain):
        for name, p in m.named_parameters():
            p.grad = own[name] if m is model else own[name].clone()
    both(20)
    both(21)
    assert all(p.grad is own[name] for name, p in model.named_parameters())
    for m in (model, plain):  # now some parameters have a gradient and some do not
        m.image_head.zero_grad()
    both(22)
    assert step.captures == 2


def test_results_last(graphs):
    """The loss of an earlier call keeps its value."""
    model, plain, size = pair()
    step = capture(model)
    found = [step(*data(model, size, i), return_losses=True) for i in range(6)]
    assert step.captures == 1
    for i, losses in enumerate(found):
        expected = plain(*data(model, size, i), return_losses=True)
        assert type(losses) is type(expected)
        assert all(torch.equal(x, y) and not x.requires_grad for x, y in zip(losses, expected, strict=True))


@pytest.mark.parametrize("shown", ["masked", "visible", "all", 0.3])
def test_masks_from_a_seed_on_the_device(graphs, shown):
    """Masks differ in every replay, and are those of the eager step with the same seed."""
    model, plain, size = pair()
    grid = size[0] // model.encoder_stride

    def masks(seed):
        def draw(images):
            seed[1] += 1
            return selective_mask(len(images), grid, seed=seed, shown=shown)

        return draw

    step, other = capture(model, mask=masks(torch.tensor([5, 0]))), masks(torch.tensor([5, 0]))
    images, structure, _ = data(model, size, 0)
    seen = set()
    for _ in range(6):
        mask = other(images)
        seen.add(mask.mask.numpy().tobytes())
        assert torch.equal(step(images, structure), eager(plain, images, structure, mask))
        assert_same(model, plain)
    assert step.captures == 1 and len(seen) == 6


@pytest.mark.parametrize("own", [False, True])
def test_masks_from_a_generator_of_the_device(graphs, own):
    """The generator is the default one, or another one that is registered with the graph."""
    model, plain, size = pair()
    images, structure, _ = data(model, size, 0)
    found = []
    for m in (model, plain):
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(3) if own else None

        def masks(images, generator=generator):
            return selective_mask(len(images), size[0] // 16, generator=generator)

        step = capture(m, mask=masks) if m is model else lambda *x, m=m, masks=masks: eager(m, *x, masks(x[0]))
        found.append([step(images, structure) for _ in range(6)])
        assert m is plain or (step.captures == 1 and step.reasons == [])
    assert all(torch.equal(*losses) for losses in zip(*found, strict=True))
    assert len({loss.item() for loss in found[0]}) == 6
    assert_same(model, plain)


def test_seeds_of_masks():
    seed = torch.tensor([3, 4])
    first = selective_mask(4, 6, seed=seed, shown=0.5)
    assert torch.equal(first.mask, selective_mask(4, 6, seed=seed).mask)
    assert not torch.equal(first.mask, ~first.structure)  # shown cells are drawn independently
    assert not torch.equal(first.mask, selective_mask(4, 6, seed=seed + 1).mask)
    with pytest.raises(ValueError, match="seed is given with a generator or a device"):
        selective_mask(4, 6, seed=seed, device="cpu")
    with pytest.raises(ValueError, match=r"seed has shape \(3,\)"):
        selective_mask(4, 6, seed=torch.zeros(3, dtype=torch.int64))


def test_shapes_and_how_many_graphs_are_kept(graphs, caplog):
    caplog.set_level(logging.INFO, "sgmim_fast")
    model, plain, size = pair()
    step = capture(model)
    for count in range(1, CAPTURE.MOST + 3):
        for i in range(4):
            model.zero_grad()
            plain.zero_grad()
            inputs = data(model, size, i, count)
            assert torch.equal(step(*inputs), eager(plain, *inputs))
        assert_same(model, plain)
        assert step.captures == count
    assert len(step._known) == CAPTURE.MOST
    assert [r.message for r in caplog.records][:2] == [
        "capture: forward and backward, graph 1",
        "capture: forward and backward, graph 2",
    ]


def test_attributes_that_change_at_every_call(graphs, caplog):
    """The step is never captured, its results are right, and one warning is given."""
    model, plain, size = pair()
    step = capture(model)
    for i in range(20):
        for m in (model, plain):
            m.encoder.model.norm.eps = 1e-3 * (i + 1)
            m.zero_grad()
        inputs = data(model, size, i)
        assert torch.equal(step(*inputs), eager(plain, *inputs))
    assert_same(model, plain)
    assert step.captures == 0
    assert [r.message.partition(": ")[2] for r in caplog.records] == [
        "shapes, modules or their attributes differ at every call"
    ]


def hook(model):
    model.encoder.register_forward_hook(lambda *_: None)


def gradient_hook(model):
    model.image_head.weight.register_hook(lambda grad: 2 * grad)


def accumulated_hook(model):
    model.image_head.weight.register_post_accumulate_grad_hook(lambda p: None)


class Around(nn.Module):
    """A model that does something that cannot be captured."""

    def __init__(self, model: nn.Module, what: Any) -> None:
        super().__init__()
        self.model, self.what = model, what
        self.in_chans, self.structure_channels, self.encoder_stride = 3, 1, model.encoder_stride

    def forward(self, *args: Any) -> Tensor:
        loss = self.model(*args)
        return loss * self.what(loss)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (lambda x: 1 + 0 * x.item(), "reads a value on the host (test_capture.py:"),
        (lambda x: 2 if x > 0 else 1, "reads a value on the host (test_capture.py:"),
        (lambda x: len(torch.nonzero(x)), "the shape of what nonzero gives depends on values"),
        (lambda x: x[None][x[None] > 0].sum(), "the shape of what index gives depends on values"),
        (lambda x: x.detach()[None].tolist()[0], "Tensor.tolist reads values on the host (test_capture.py:"),
        (lambda x: torch.tensor([1.0, 2.0]).sum(), "sends numbers of the host to the device (test_capture.py:"),
        (lambda x: 1 + random.random(), "draws from the random numbers of Python or NumPy"),
        (lambda x: 1 + np.random.rand(), "draws from the random numbers of Python or NumPy"),
    ],
)
def test_what_a_graph_cannot_hold(graphs, caplog, what, reason):
    """The step runs eagerly with the results of the plain one, and the reason is logged once."""
    model, plain, size = pair()
    model, plain = Around(model, what), Around(plain, what)
    step = capture(model)
    for i in range(6):
        inputs = data(model, size, i)
        model.zero_grad()
        plain.zero_grad()
        random.seed(i)
        np.random.seed(i)
        found = step(*inputs)
        random.seed(i)
        np.random.seed(i)
        assert torch.equal(found, eager(plain, *inputs))
        assert_same(model, plain)
    assert step.captures == 0
    [record] = caplog.records
    assert record.levelname == "WARNING" and record.message.startswith("capture leaves Around eager: ")
    assert reason in record.message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook, "a _MaskedViT has hooks"),
        (gradient_hook, "a parameter has hooks"),
        (accumulated_hook, "a parameter has hooks"),
    ],
)
def test_hooks_come_and_go(graphs, change, reason):
    """Without hooks the step is captured; with hooks, also with those added later, it runs eagerly."""
    model, plain, size = pair()
    step = capture(model)
    for i in range(10):
        if i == 5:
            change(model)
            change(plain)
        model.zero_grad()
        plain.zero_grad()
        inputs = data(model, size, i)
        assert torch.equal(step(*inputs), eager(plain, *inputs))
        assert_same(model, plain)
    assert step.captures == 1 and step.reasons == [reason]


def test_a_mask_tensor_is_searched_on_the_host(graphs):
    model, plain, size = pair()
    step = capture(model)
    for i in range(4):
        images, structure, mask = data(model, size, i)
        mask = stem_mask(model, size, mask)
        model.zero_grad()
        plain.zero_grad()
        assert torch.equal(step(images, structure, mask), eager(plain, images, structure, mask))
    assert step.captures == 0
    assert step.reasons[0].startswith("Tensor.tolist reads values on the host (masking.py:")


@pytest.mark.parametrize(
    ("create", "hooked", "reasons"),
    [
        (lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9), False, []),
        (lambda parameters: torch.optim.AdamW(parameters, 1e-2), False, []),  # counts steps on the host
        (lambda parameters: torch.optim.Rprop(parameters, 1e-4), False, []),
        (
            lambda parameters: torch.optim.AdamW(parameters, 1e-2, fused=True, capturable=True),
            True,
            ["AdamW has hooks"],
        ),
    ],
)
def test_other_optimizers(graphs, create, hooked, reasons):
    """The weights are those of the plain loop, whether the optimizer is captured or not."""
    model, plain, size = pair()
    optimizers = [create(m.parameters()) for m in (model, plain)]
    steps = []
    if hooked:
        optimizers[0].register_step_post_hook(lambda *_: steps.append(1))
    step = capture(model, optimizers[0])
    for i in range(7):
        inputs = data(model, size, i)
        step(*inputs)
        optimizers[1].zero_grad()
        eager(plain, *inputs)
        optimizers[1].step()
        assert_same(model, plain)
    inside = type(optimizers[0]) is torch.optim.SGD
    assert step.captures == 1 + inside and step.reasons == reasons
    assert len(steps) == 7 * hooked


def test_a_recording_that_fails(graphs, caplog, monkeypatch):
    """The failure is logged, and the step continues eagerly with the gradients that it had."""
    model, plain, size = pair()
    monkeypatch.setattr(FakeGraph, "fails", "operation not permitted when stream is capturing\nmore")
    step = capture(model)
    for i in range(6):
        inputs = data(model, size, i)
        assert torch.equal(step(*inputs), eager(plain, *inputs))  # gradients accumulate
        assert_same(model, plain)
    assert step.captures == 0
    assert step.reasons == ["RuntimeError: operation not permitted when stream is capturing"]
    assert len(caplog.records) == 1


def test_a_bad_call_leaves_no_trace(graphs):
    model, plain, size = pair()
    step = capture(model)
    images, structure, mask = data(model, size, 0)
    for _ in range(4):
        with pytest.raises(ValueError, match="images has 63x64 pixels"):
            step(images[:, :, 1:], structure, mask)
    assert not step._known
    for i in range(4):
        inputs = data(model, size, i)
        assert torch.equal(step(*inputs), eager(plain, *inputs))
    assert_same(model, plain)
    assert step.captures == 1


@pytest.mark.parametrize("name", ["swin", "vit"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_off_a_gpu_it_is_the_plain_loop(caplog, name, dtype):
    """Results are bitwise equal, with the backends of the CPU, and the reason is logged once."""
    model, plain, size = pair(name)
    optimizers = [adamw(m, capturable=False) for m in (model, plain)]
    step = capture(model, optimizers[0], autocast=dtype, clip=1.0)
    for i in range(4):
        inputs = data(model, size, i)
        optimizers[1].zero_grad()
        loss = eager(plain, *inputs, dtype=dtype)
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizers[1].step()
        assert torch.equal(step(*inputs), loss)
        assert_same(model, plain)
    assert step.captures == 0
    assert [r.message for r in caplog.records] == [
        "capture leaves SGMIM eager: its parameters are on cpu, where there are no CUDA graphs"
    ]


def test_a_loss_of_ones_own(graphs):
    """The first entry of the result is minimised; the other entries are returned as well."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    plain = copy.deepcopy(model)

    def loss(net, x, weights):
        y = net(x)
        return (y * weights["of"]).square().mean(), y

    step = capture(model, loss=loss)
    for _ in range(5):
        x, weights = torch.randn(16, 8), {"of": torch.randn(2)}
        total, y = step(x, weights=weights)
        expected, other = loss(plain, x, weights)
        expected.backward()
        assert torch.equal(total, expected.detach()) and torch.equal(y, other.detach())
        assert_same(model, plain)  # including running statistics
    assert step.captures == 1


def test_drop_path_draws_as_eagerly(graphs):
    encoder = create_encoder(
        "vit_base_patch16_224", img_size=64, depth=3, embed_dim=48, num_heads=3, drop_path_rate=0.5
    )
    model = SGMIM(encoder, 16)
    plain, step = copy.deepcopy(model), capture(model)
    for i in range(6):
        inputs = data(model, (64, 64), i)
        torch.manual_seed(i)
        found = step(*inputs)
        torch.manual_seed(i)
        assert torch.equal(found, eager(plain, *inputs))
    assert step.captures == 1


def test_foreign_encoders_are_captured(graphs):
    model = foreign()
    plain, step = copy.deepcopy(model), capture(model)
    for i in range(4):
        inputs = data(model, (64, 64), i)
        assert torch.equal(step(*inputs), eager(plain, *inputs))
    assert_same(model, plain)
    assert step.captures == 1


def test_bad_arguments():
    model = foreign()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for error, message, arguments, options in (
        (TypeError, "model is a function; expected an nn.Module", (lambda x: x,), {}),
        (ValueError, "model has no parameters", (nn.Identity(),), {}),
        (TypeError, "optimizer is a float; expected a torch.optim.Optimizer", (model, 0.1), {}),
        (ValueError, "accumulate is 0; expected at least 1", (model,), {"accumulate": 0}),
        (ValueError, "clip is 1.0; expected a norm above 0 and an optimizer", (model,), {"clip": 1.0}),
        (ValueError, "clip is -1; expected a norm above 0", (model, optimizer), {"clip": -1}),
    ):
        with pytest.raises(error, match=message):
            capture(*arguments, **options)
