"""The whole model on every backend and device, and features of GPUs only: streams, graphs, several devices, float16."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import assert_close_to_truth
from tiny import batch, foreign, gradients
from torch import Tensor

import sgmim_fast
from sgmim_fast import SGMIM, SelectiveMask, backends, reference, selective_mask, standardize_structure

ROOT = Path(__file__).parents[1]
SIZE = (32, 48)
ENCODERS = {  # swin has padding, swinv2 has shifts and cosine attention
    "swin": ("swin_tiny_patch4_window7_224", {"window_size": 5, "depths": (1, 1), "num_heads": (1, 2)}),
    "swinv2": ("swinv2_tiny_window8_256", {"window_size": 4, "depths": (2, 1), "num_heads": (1, 2)}),
    "beit": ("beit_base_patch16_224", {"depth": 1, "num_heads": 2}),
}
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]
on_gpu = pytest.mark.parametrize("name", [pytest.param(n, marks=gpu) for n in ("torch", "triton")])


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """Disables TF32 in cuDNN, which computes the stem of a foreign encoder and uses TF32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def whole(backend):
    """The forced backend, if it has every op of the branch."""
    for op in backends.BRANCH:
        usable, reason = backends.can_run(op, backend)
        if not usable:
            pytest.skip(reason)
    return backend


def evaluate(model: SGMIM, inputs: list[Tensor], mask: SelectiveMask, dense: bool = False) -> dict[str, Tensor]:
    """Returns the losses, and the gradients of parameters and images."""
    images, structure = (t.detach().requires_grad_() for t in inputs)
    run = reference.sgmim_losses if dense else SGMIM.__call__
    options = {} if dense else {"return_losses": True}
    losses = run(model, images, structure, mask, **options)
    return losses._asdict() | gradients(model, losses.total, images, structure)


def put(device: torch.device, dtype: torch.dtype, seed: int = 1) -> tuple[SGMIM, list[Tensor], SelectiveMask]:
    model = foreign()
    inputs = [t.to(device, dtype) for t in batch(model, SIZE, seed=seed)]
    grid = SIZE[0] // model.encoder_stride, SIZE[1] // model.encoder_stride
    generator = torch.Generator(device).manual_seed(2)
    return model.to(device, dtype), inputs, selective_mask(2, grid, generator=generator, device=device)


def test_float32(whole, device):
    model, inputs, mask = put(device, torch.float32)
    actual = evaluate(model, inputs, mask)
    expected = evaluate(model.double(), [t.double() for t in inputs], mask, dense=True)
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        assert (actual[name] - e).norm() <= 1e-5 * e.norm(), name


@pytest.mark.parametrize("ratio", [0.6, [0.3, 0.9]], ids=["equal", "ragged"])
def test_visible_patches_alone(whole, device, ratio):
    """An encoder of visible patches with a decoder and MAE's target, in float32, against MAE's forward in float64."""
    arguments = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    encoder = sgmim_fast.create_encoder("vit_tiny_patch16_224", visible_only=True, **arguments)
    decoder = sgmim_fast.Decoder(encoder, 2, 32, 2)
    model = SGMIM(encoder, decoder=decoder, target="normalized_patch", loss="l2", accelerate=False).to(device)
    inputs = [t.float().to(device) for t in batch(model, SIZE)]
    mask = selective_mask(2, (4, 6), ratio, torch.Generator(device).manual_seed(0), device)
    expected = evaluate(copy.deepcopy(model).double(), [t.double() for t in inputs], mask, dense=True)
    if whole != "cuda":  # this backend has no window attention
        sgmim_fast.accelerate(encoder)
        sgmim_fast.accelerate(decoder)
    actual = evaluate(model, inputs, mask)
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        assert (actual[name] - e).norm() <= 1e-5 * e.norm(), name


@pytest.mark.parametrize(("name", "arguments"), ENCODERS.values(), ids=ENCODERS)
def test_accelerated_encoder(backend, device, name, arguments):
    """The whole model with fused ops, against the dense arithmetic with timm's own blocks in float64."""
    if backend == "cuda":
        pytest.skip("timm's own forward runs where the forced backend has no window attention")
    encoder = sgmim_fast.create_encoder(name, img_size=SIZE, embed_dim=24, **arguments)
    model = SGMIM(encoder, encoder.stride, accelerate=False).to(device)
    inputs = [t.to(device, torch.float32) for t in batch(model, SIZE)]
    mask = selective_mask(2, (2, 3), device=device)
    expected = evaluate(copy.deepcopy(model).double(), [t.double() for t in inputs], mask, dense=True)
    sgmim_fast.accelerate(encoder)
    actual = evaluate(model, inputs, mask)
    assert actual.keys() == expected.keys()
    for key, e in expected.items():
        assert (actual[key] - e).norm() <= 1e-5 * e.norm(), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(whole, device, dtype):
    """The error against float64 is that of the dense arithmetic under the same autocast."""
    if whole == "cpu" and dtype == torch.float16:
        pytest.skip("the C++ kernels take float32 and bfloat16")
    actual, plain, truth = [], [], []
    for seed in range(4):
        model, inputs, mask = put(device, torch.float32, seed)
        with torch.autocast(device.type, dtype):
            actual.append(evaluate(model, inputs, mask))
            plain.append(evaluate(model, inputs, mask, dense=True))
        truth.append(evaluate(copy.deepcopy(model).double(), [t.double() for t in inputs], mask, dense=True))
    for name in truth[0]:
        three = (torch.stack([e[name] for e in evaluations]) for evaluations in (actual, plain, truth))
        assert_close_to_truth(*three, name)


def test_compiled(whole, device):
    """The model compiles to one graph with the same results."""
    torch._dynamo.reset()
    model, inputs, mask = put(device, torch.float32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual, expected = compiled(*inputs, mask), model(*inputs, mask)
    assert (actual - expected).abs() <= 1e-6 * expected.abs()
    actual, expected = gradients(model, actual), gradients(model, expected)
    for name, e in expected.items():
        assert (actual[name] - e).norm() <= 1e-5 * e.norm(), name
    torch._dynamo.reset()


@on_gpu
def test_no_step_waits_for_the_device(name):
    """Masks, standardisation, forward and backward run while every synchronisation is an error."""
    model, (images, structure), _ = put(torch.device("cuda"), torch.float32)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with backends.use(name):
            for _ in range(2):
                mask = selective_mask(2, (2, 3), device="cuda")
                model(images, standardize_structure(structure, nonfinite="ignore"), mask).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("encoder", ENCODERS)
def test_no_accelerated_step_waits_for_the_device(name, encoder):
    timm_name, arguments = ENCODERS[encoder]
    fast = sgmim_fast.create_encoder(timm_name, img_size=SIZE, embed_dim=24, **arguments)
    model = SGMIM(fast, fast.stride, accelerate=True).cuda()
    images, structure = (t.to("cuda", torch.float32) for t in batch(model, SIZE))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with backends.use(name):
            for _ in range(2):
                model(images, structure, selective_mask(2, (2, 3), device="cuda")).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_graph_capture(name):
    """Replays of a captured step give the gradients of the eager one, for changing inputs."""
    model, inputs, mask = put(torch.device("cuda"), torch.float32)
    static = [t.clone() for t in inputs]
    with backends.use(name):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model.zero_grad()
                model(*static, mask).backward()
        torch.cuda.current_stream().wait_stream(stream)
        model.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = model(*static, mask)
            loss.backward()
        for seed in (5, 6):
            fresh = [t.cuda().float() for t in batch(model, SIZE, seed=seed)]
            for t, new in zip(static, fresh, strict=True):
                t.copy_(new)
            graph.replay()
            expected = model(*fresh, mask)
            assert (loss - expected).abs() <= 1e-6 * expected.abs()
            captured = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
            for key, e in gradients(model, expected).items():
                assert (captured[key] - e).norm() <= 1e-5 * e.norm(), key


@on_gpu
def test_another_stream(name):
    model, inputs, mask = put(torch.device("cuda"), torch.float32)
    with backends.use(name):
        expected = evaluate(model, inputs, mask)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            actual = evaluate(model, inputs, mask)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
    for key, e in expected.items():
        assert torch.equal(actual[key], e), key


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    results = []
    for number in (0, 1):
        model, inputs, mask = put(torch.device("cuda", number), torch.float32)
        with torch.cuda.device(0):
            results.append({key: t.cpu() for key, t in evaluate(model, inputs, mask).items()})
    assert results[0].keys() == results[1].keys()
    for key, e in results[0].items():
        assert (results[1][key] - e).norm() <= 1e-5 * e.norm(), key


@on_gpu
def test_float16_with_a_gradient_scaler(name):
    """During ten steps the loss stays finite and falls."""
    model, inputs, mask = put(torch.device("cuda"), torch.float32)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 1e-2), torch.amp.GradScaler("cuda")
    losses = []
    with backends.use(name):
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = model(*inputs, mask)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    assert torch.isfinite(torch.tensor(losses)).all()
    assert losses[-1] < losses[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_the_automatic_choice_on_a_gpu():
    """Every op runs on our own kernels, in half precision and float32."""
    model, inputs, mask = put(torch.device("cuda"), torch.float32)
    for op in backends.MODULES:
        assert any(backends.can_run(op, name)[0] for name in ("cuda", "triton")), op
    assert torch.isfinite(sgmim_fast.SGMIM.__call__(model, *inputs, mask))


def test_gpu_suite_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu_suite.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device" in done.stderr


@pytest.fixture
def benchmarks(monkeypatch):
    """Makes the modules of the folder importable."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_gates_of_the_gpu_suite(benchmarks):
    """Computes verdicts from invented rows."""
    import gpu_suite

    times = {"dense": 35.0, "dense-compiled": 26.0, "visible-compiled": 11.0, "fused-triton": 10.0, "gemm-floor": 9.0}
    rows = [
        {"encoder": "swin_base", "dtype": "bfloat16", "name": name, "median_ms": ms, "peak_mib": 10 * ms}
        for name, ms in times.items()
    ]
    verdicts = {v["gate"]: v["holds"] for v in gpu_suite.verdicts(rows, {("swin_base", "bfloat16"): 49})}
    assert verdicts == {
        "dense / fused >= 3.5": True,
        "dense-compiled / fused >= 2.5": True,
        "visible-compiled / fused >= 1.15": False,
        "fused / gemm-floor <= 1.25": True,
        "memory of dense <= 0.4": True,
        "launches <= 48": False,
    }
    assert json.dumps(verdicts)
    rows = [
        {"encoder": "vit_base", "op": op, "dtype": "float32", "backend": backend, "median_ms": ms}
        for op, backend, ms in (
            ("standardize_structure", "torch", 9.9),
            ("standardize_structure", "cuda", 1.0),
            ("gather_patches", "torch", 9.9),
        )
    ]
    assert [v["holds"] for v in gpu_suite.sorting_gates(rows)] == [False]
    assert [v["holds"] for v in gpu_suite.sorting_gates(rows[::2])] == [None]
    rows[0]["median_ms"] = 10.0
    assert [v["holds"] for v in gpu_suite.sorting_gates(rows)] == [True]
    times = {"dense": 250.0, "dense-compiled": 140.0, "accelerated": 100.0, "simmim-captured": 99.0}
    rows = [
        {"encoder": "swin_base", "dtype": "bfloat16", "name": name, "median_ms": ms, "peak_mib": 10 * ms}
        for name, ms in times.items()
    ]
    assert all(v["holds"] for v in gpu_suite.verdicts(rows, {}, gpu_suite.STEP_GATES))
    rows[0]["median_ms"] = 240.0
    assert [v["holds"] for v in gpu_suite.verdicts(rows, {}, gpu_suite.STEP_GATES)] == [False, True, True, True]


def test_table_of_the_ops(benchmarks, monkeypatch, tmp_path, capsys):
    """The table has every op of the branch, here on a CPU, and names a backend with wrong results."""
    import op_table
    from tools import shapes

    tiny = shapes.Shape("tiny", width=32, stride=16, patch=4, image=64, heads=2, stem=16)
    monkeypatch.setattr(op_table, "SHAPES", {"tiny": tiny})
    options = ["--device", "cpu", "--encoder", "tiny", "--batch", "2", "--seconds", "0.01"]
    file = tmp_path / "ops.json"
    assert op_table.main([*options, "--dtype", "float32,bfloat16", "--json", str(file)]) == 0, capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert {row["op"] for row in rows} == {name for name in backends.MODULES if "triton" in backends.MODULES[name]}
    if not backends.available()["cpu"][0]:
        return
    assert {row["backend"] for row in rows} == {"cpu", "torch"}
    right = backends.implementation
    for op, change in (
        ("standardize_structure", lambda t: t + 1e-3),
        ("linear_l1", lambda results: (results[0] * 1.01, results[1])),
    ):

        def wrong(name, part, backend, op=op, change=change):
            function = right(name, part, backend)
            altered = (name, part, backend) == (op, "forward", "cpu")
            return (lambda *args: change(function(*args))) if altered else function

        monkeypatch.setattr(backends, "implementation", wrong)
        monkeypatch.setattr(backends, "state", lambda: None)  # no choice of an earlier call is used again
        assert op_table.main([*options, "--dtype", "float32"]) == 1
        lines = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
        assert len(lines) == 1 and lines[0].startswith(op)
