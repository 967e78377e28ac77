"""`capture` on a GPU: replays are equal to eager steps.

The kernels are the same, so results differ only where PyTorch itself adds in no fixed order: by 1e-5 of a loss, and by
1e-3 of the norm of a gradient in bfloat16.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import batch, family
from torch import Tensor, nn

import sgmim_fast
from sgmim_fast import SGMIM, capture, selective_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def pair(name: str = "swin") -> tuple[SGMIM, SGMIM, tuple[int, int]]:
    model, size = family(name)
    model = model.cuda()
    return model, copy.deepcopy(model), size


def data(model: SGMIM, size: tuple[int, int], step: int, count: int = 4) -> tuple[Tensor, Tensor, Any]:
    images, structure = (x.float().cuda() for x in batch(model, size, count, seed=10 + step))
    grid = size[0] // model.encoder_stride, size[1] // model.encoder_stride
    generator = torch.Generator("cuda").manual_seed(20 + step)
    return images, structure, selective_mask(count, grid, generator=generator)


def eager(model: nn.Module, *inputs: Any, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    with torch.autocast("cuda", dtype):
        loss = model(*inputs)
    loss.backward()
    return loss.detach()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert abs(found.item() - expected.item()) <= tolerance * abs(expected.item()), (found.item(), expected.item())


def assert_same_gradients(model: nn.Module, plain: nn.Module) -> None:
    grads = {name: p.grad.float() for name, p in plain.named_parameters() if p.grad is not None}
    whole = torch.stack([grad.norm() for grad in grads.values()]).norm()
    own = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    assert own.keys() == grads.keys()
    for name, grad in grads.items():
        assert (own[name] - grad).norm() <= 1e-3 * (grad.norm() + 1e-3 * whole), name


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_replays_are_eager_steps(name):
    """Images, masks and weights change in every step, and the batch size once in between."""
    model, plain, size = pair(name)
    step = capture(model, autocast=torch.bfloat16)
    losses = []
    for i in range(18):
        inputs = data(model, size, i, 4 if i % 3 else 2)
        for m in (model, plain):
            m.zero_grad()
        losses.append((step(*inputs), eager(plain, *inputs)))
        assert_same_gradients(model, plain)
        with torch.no_grad():
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                p.data = p * 0.99 if i == 6 else p.mul_(0.99)
                q.copy_(p)
    assert step.captures == 4 and step.reasons == []  # two shapes, captured again after `.data`
    for found, expected in losses:
        assert_close(found, expected)


def test_gradients_add_up():
    model, plain, size = pair()
    step = capture(model, autocast=torch.bfloat16)
    for i in range(8):
        inputs = data(model, size, i)
        if i == 5:
            for m in (model, plain):
                m.zero_grad(set_to_none=False)
        assert_close(step(*inputs), eager(plain, *inputs))
        assert_same_gradients(model, plain)
    assert step.captures == 1


def test_masks_drawn_inside_from_a_seed():
    """Masks differ in every replay and are those of the eager step."""
    model, plain, size = pair()
    grid = size[0] // model.encoder_stride
    seeds = [torch.tensor([7, 0], device="cuda") for _ in range(2)]

    def masks(images: Tensor) -> Any:
        seeds[0][1] += 1
        return selective_mask(len(images), grid, seed=seeds[0])

    step = capture(model, mask=masks, autocast=torch.bfloat16)
    images, structure, _ = data(model, size, 0)
    found = []
    for _ in range(8):
        seeds[1][1] += 1
        found.append(step(images, structure))
        assert_close(found[-1], eager(plain, images, structure, selective_mask(len(images), grid, seed=seeds[1])))
    assert step.captures == 1 and len({x.item() for x in found}) == 8
    assert torch.equal(*seeds)


@pytest.mark.parametrize("own", [False, True])
def test_masks_drawn_inside_from_a_generator(own):
    """The generator is PyTorch's default one of the device, or the caller's."""
    model, plain, size = pair()
    grid = size[0] // model.encoder_stride
    images, structure, _ = data(model, size, 0)
    found = []
    for m in (model, plain):
        generator = torch.Generator("cuda").manual_seed(3) if own else None
        torch.manual_seed(3)

        def masks(images: Tensor, generator: Any = generator) -> Any:
            return selective_mask(len(images), grid, generator=generator, device="cuda")

        step = capture(m, mask=masks, autocast=torch.bfloat16) if m is model else None
        found.append([])
        for _ in range(7):
            loss = step(images, structure) if step else eager(m, images, structure, masks(images))
            found[-1].append(loss)
        assert step is None or (step.captures == 1 and step.reasons == [])
    for one, other in zip(*found, strict=True):
        assert_close(one, other)
    assert len({x.item() for x in found[0]}) == 7


def test_drop_path_draws_as_eagerly():
    torch.manual_seed(0)
    encoder = sgmim_fast.create_encoder(
        "vit_base_patch16_224", img_size=64, depth=4, embed_dim=48, num_heads=3, drop_path_rate=0.5
    )
    model = SGMIM(encoder, 16).cuda()
    plain, step = copy.deepcopy(model), capture(model, autocast=torch.bfloat16)
    for i in range(7):
        inputs = data(model, (64, 64), i)
        torch.manual_seed(i)
        found = step(*inputs)
        torch.manual_seed(i)
        assert_close(found, eager(plain, *inputs))
    assert step.captures == 1


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_twenty_steps_of_training(inside, accumulate):
    """AdamW inside and outside of the graph, with clipping, a changing learning rate, and gradient accumulation."""
    model, plain, size = pair()
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    rates = [torch.tensor(1e-4, device="cuda") for _ in range(2)] if inside else [1e-4, 1e-4]
    optimizers = [
        torch.optim.AdamW(m.parameters(), rate, fused=True, capturable=inside)
        for m, rate in zip((model, plain), rates, strict=True)
    ]
    step = capture(model, optimizers[0], autocast=torch.bfloat16, clip=1.0, accumulate=accumulate)
    for i in range(20):
        for optimizer in optimizers:
            rate = 1e-4 * (1 + i % 3)
            if inside:
                optimizer.param_groups[0]["lr"].fill_(rate)
            else:
                optimizer.param_groups[0]["lr"] = rate
        optimizers[1].zero_grad()
        for j in range(accumulate):
            inputs = data(model, size, accumulate * i + j)
            with torch.autocast("cuda", torch.bfloat16):
                loss = plain(*inputs)
            (loss / accumulate).backward()
            assert_close(step(*inputs), loss, 1e-3)
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizers[1].step()
    assert step.captures == 1 + inside and step.reasons == []
    ends = [nn.utils.parameters_to_vector(m.parameters()).detach() for m in (model, plain)]
    assert (ends[0] - ends[1]).norm() <= 0.1 * (ends[1] - start).norm()  # Adam divides by tiny gradients


def test_float16_with_a_scaler_and_the_optimizer_inside():
    """As in eager mode, the scale falls from one that overflows and grows again, and overflowing steps are skipped."""
    model, plain, size = pair()
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-4, fused=True, capturable=True) for m in (model, plain)]
    scalers = [torch.amp.GradScaler("cuda", 2.0**40, growth_interval=4) for _ in range(2)]
    step = capture(model, optimizers[0], autocast=torch.float16, scaler=scalers[0], clip=1.0)
    scales = []
    for i in range(24):
        inputs = data(model, size, i)
        optimizers[1].zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = plain(*inputs)
        scalers[1].scale(loss).backward()
        scalers[1].unscale_(optimizers[1])
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        scalers[1].step(optimizers[1])
        scalers[1].update()
        assert_close(step(*inputs), loss, 1e-3)
        scales.append([scaler.get_scale() for scaler in scalers])
    assert step.captures == 2 and step.reasons == []
    assert all(one == other for one, other in scales)
    assert min(scales)[0] < 2.0**40


def test_a_learning_rate_that_changes_as_a_number():
    model, plain, size = pair()
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-4, fused=True, capturable=True) for m in (model, plain)]
    step = capture(model, optimizers[0], autocast=torch.bfloat16)
    for i in range(8):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-4 * (i + 1)
        inputs = data(model, size, i)
        optimizers[1].zero_grad()
        assert_close(step(*inputs), eager(plain, *inputs), 1e-3)
        optimizers[1].step()
    assert step.captures == 1


def test_tensors_of_the_host():
    model, plain, size = pair()
    step = capture(model, autocast=torch.bfloat16)
    for i in range(5):
        images, structure, mask = data(model, size, i)
        host = images.cpu().pin_memory(), structure.cpu()
        assert_close(step(*host, mask), eager(plain, images, structure, mask))
    assert step.captures == 1


def test_a_mask_tensor_runs_eagerly():
    model, plain, size = pair()
    step = capture(model, autocast=torch.bfloat16)
    for i in range(4):
        images, structure, mask = data(model, size, i)
        mask = sgmim_fast.masking.resize(mask.mask, size[0] // model.patch_size, size[1] // model.patch_size)
        assert_close(step(images, structure, mask), eager(plain, images, structure, mask))
    assert step.captures == 0 and "host" in step.reasons[0]


class Waits(nn.Module):
    """Waits for the device in a way that only the capture itself can detect."""

    def __init__(self, model: SGMIM) -> None:
        super().__init__()
        self.model, self.dropout = model, nn.Dropout(0.1)

    def forward(self, *inputs: Any) -> Tensor:
        torch.cuda.synchronize()
        return self.dropout(self.model(*inputs).expand(64)).mean()


def test_a_capture_that_fails_leaves_everything_working():
    model, plain, size = pair()
    step = capture(Waits(model), autocast=torch.bfloat16)
    other = Waits(plain)
    for i in range(5):
        inputs = data(model, size, i)
        torch.manual_seed(i)
        found = step(*inputs)
        torch.manual_seed(i)
        assert_close(found, eager(other, *inputs))
        assert_same_gradients(step.model, other)
    assert step.captures == 0 and len(step.reasons) == 1
    step = capture(model, autocast=torch.bfloat16)  # another step can be captured afterwards
    for m in (model, plain):
        m.zero_grad()
    for i in range(5):
        inputs = data(model, size, i)
        assert_close(step(*inputs), eager(plain, *inputs))
    assert_same_gradients(model, plain)
    assert step.captures == 1


def test_make_graphed_callables():
    """PyTorch's own `make_graphed_callables` also works with the model."""
    model, plain, size = pair()
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        graphed = torch.cuda.make_graphed_callables(
            copy.deepcopy(model), data(model, size, 99), allow_unused_input=True
        )
    for i in range(3):
        inputs = data(model, size, i)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = graphed(*inputs)
        graphed.zero_grad()
        plain.zero_grad()
        loss.backward()
        assert_close(loss, eager(plain, *inputs))
        assert_same_gradients(graphed, plain)


def test_compiled_with_reduced_overhead():
    model, plain, size = pair("vit")
    compiled = torch.compile(model, mode="reduce-overhead")
    for i in range(5):
        inputs = data(model, size, i)
        torch.compiler.cudagraph_mark_step_begin()
        for m in (model, plain):
            m.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(*inputs)
        loss.backward()
        assert_close(loss.clone(), eager(plain, *inputs), 1e-2)  # fused code of torch.compile rounds in other places
