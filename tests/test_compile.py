"""`torch.compile(fullgraph=True)` of the model, forward and backward, with drawn masks; the cost of mask tensors."""

from __future__ import annotations

import pytest
import torch
from checks import assert_close_to_truth
from tiny import batch, drawn, family, foreign, gradients, stem_mask
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sgmim_fast import SGMIM, __version__, selective_mask
from sgmim_fast.fused.accelerate import FAST


@pytest.fixture(autouse=True)
def fresh():
    """Resets the compiler, so that tests do not share compiled code."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def evaluate(model: SGMIM, call, images: Tensor, structure: Tensor, mask, **options) -> dict[str, Tensor]:
    images, structure = images.detach().requires_grad_(), structure.detach().requires_grad_()
    losses = call(images, structure, mask, return_losses=True, **options)
    return losses._asdict() | gradients(model, losses.total, *[images, structure][: 1 + (model.guidance is not None)])


def assert_compiles(model: SGMIM, size: tuple[int, int], compiler: str, **options) -> None:
    """Asserts that the compiled model gives the eager one's losses and gradients, for several draws, in one graph."""
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    for seed in range(3):
        inputs = *(t.float() for t in batch(model, size, seed=seed)), drawn(model, size, seed=seed)
        actual, expected = evaluate(model, compiled, *inputs, **options), evaluate(model, model, *inputs, **options)
        assert actual.keys() == expected.keys()
        for name, e in expected.items():
            assert (actual[name] - e).norm() <= 1e-5 * e.norm(), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden_context": "drop", "structure_channels": 2},
        {"guidance": False},
        {"stride": 8},
        {"patch": 14, "stride": 14, "width": 40, "layout": "map"},
    ],
    ids=str,
)
def test_foreign_encoder(options):
    model = foreign(**options)
    assert_compiles(model, (2 * model.encoder_stride, 3 * model.encoder_stride), "aot_eager")


@pytest.mark.parametrize("name", ["swin", "beit", "vit"])
def test_families(name):
    assert_compiles(*family(name), "aot_eager")


def test_position_embedding():
    assert_compiles(*family("vit", position_embedding=True), "aot_eager")


def test_structure_valid():
    model, size = foreign(), (32, 48)
    assert_compiles(model, size, "aot_eager", structure_valid=torch.rand(2, 1, *size) < 0.8)


@pytest.mark.parametrize(
    "name", ["vit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("swin", "swinv2", "beit"))]
)
def test_steps_of_a_compiled_model_and_optimizer(name):
    """Accelerated encoder, branch and AdamW: three compiled steps give the parameters of three eager steps."""
    model, size = family(name)
    assert any(isinstance(m, tuple(FAST.values())) for m in model.modules())
    start = {key: value.clone() for key, value in model.state_dict().items()}
    inputs = [t.float() for t in batch(model, size)]

    def train(compiled: bool) -> dict[str, Tensor]:
        model.load_state_dict(start)
        # With a small epsilon, rounding errors would become steps where a gradient is 0, such as that of a key's bias.
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-2)
        call, update = model, optimizer.step
        if compiled:
            call = torch.compile(model, backend="aot_eager", fullgraph=True)
            update = torch.compile(optimizer.step, backend="aot_eager")
        for seed in range(3):
            optimizer.zero_grad()
            call(*inputs, drawn(model, size, seed=seed)).backward()
            update()
        return {key: value.detach().clone() for key, value in model.named_parameters()}

    expected, actual = train(False), train(True)
    moved = sum((value - start[key]).square().sum() for key, value in expected.items()).sqrt()
    error = sum((actual[key] - value).square().sum() for key, value in expected.items()).sqrt()
    assert moved > 0.1 and error <= 1e-4 * moved, (moved, error)


@pytest.mark.parametrize("shown", ["visible", "all", 0.5])
def test_ablations_and_coarse_masks(shown):
    model, size = foreign(), (32, 64)
    inputs = *(t.float() for t in batch(model, size)), selective_mask(2, (1, 2), [0.2, 0.9], shown=shown)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual, expected = evaluate(model, compiled, *inputs), evaluate(model, model, *inputs)
    for name, e in expected.items():
        assert (actual[name] - e).norm() <= 1e-5 * e.norm(), name


def test_other_sizes_and_counts():
    """The same compiled model accepts new batch sizes, image sizes and numbers of masked cells."""
    model = foreign()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for count, size, ratio in ((2, (32, 48), 0.6), (3, (64, 64), 0.3), (1, (32, 48), 0.5)):
        inputs = *(t.float() for t in batch(model, size, count)), drawn(model, size, count, ratio=ratio)
        actual, expected = evaluate(model, compiled, *inputs), evaluate(model, model, *inputs)
        for name, e in expected.items():
            assert (actual[name] - e).norm() <= 1e-5 * e.norm(), (name, count, size)


def test_autocast():
    model, size = family("vit")
    compiled, actual, plain, truth = torch.compile(model, backend="aot_eager", fullgraph=True), [], [], []
    for seed in range(3):
        inputs = *(t.float() for t in batch(model, size, seed=seed)), drawn(model, size)
        with torch.autocast("cpu", torch.bfloat16):
            actual.append(evaluate(model, compiled, *inputs))
            plain.append(evaluate(model, model, *inputs))
        truth.append(evaluate(model.double(), model, inputs[0].double(), inputs[1].double(), inputs[2]))
        model.float()
    assert {t.dtype for t in actual[0].values()} == {torch.float32}
    for name in truth[0]:
        assert_close_to_truth(*(torch.stack([e[name] for e in runs]) for runs in (actual, plain, truth)), name)


def test_a_mask_tensor_breaks_the_graph_once():
    model, size = foreign(), (32, 48)
    mask = drawn(model, size)
    inputs = [t.float() for t in batch(model, size)]
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs)
    expected = evaluate(model, model, *inputs, mask)
    for name, actual in evaluate(model, compiled, *inputs, stem_mask(model, size, mask)).items():
        assert (actual - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 1
    assert graphs.frame_count == 1  # nothing is computed before the search


def test_code_on_disk_is_of_this_version():
    assert f"sgmim_fast {__version__}" in torch.compiler.config.cache_key_tag


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin", "vit", "foreign"])
def test_inductor(name):
    model, size = (foreign(), (32, 48)) if name == "foreign" else family(name)
    assert_compiles(model, size, "inductor")
