from __future__ import annotations

import resource

import pytest
import torch
from checks import AGAIN, assert_close_to_truth, layouts, moved
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sgmim_fast import backends
from sgmim_fast.ops.token_salience import token_salience

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def stretched(s: Tensor) -> Tensor:
    low, high = s.amin(-1, keepdim=True), s.amax(-1, keepdim=True)
    return torch.where(low == high, 0, (s - low) / (high - low))


def formula(x: Tensor) -> Tensor:
    """Implements SPEC, "Salience-based masking", literally, in the dtype of the tokens."""
    return stretched((x @ x.mT).softmax(-1).sum(-2))


def apart(x: Tensor, rounded: bool = False) -> Tensor:
    """Returns the same without the attention of tokens to themselves, which is close to 1 for long tokens.

    If `rounded`, the attention is `moved` as well as the tokens. Short tokens attend to each other so evenly that
    moving the tokens alone does not change a bit of it, and the errors of plain PyTorch would depend on the chance of
    one number.
    """
    attention = (x @ x.mT).softmax(-1)
    if rounded:
        (attention,) = moved([attention])
    attention.diagonal(dim1=-2, dim2=-1).zero_()
    return stretched(attention.sum(-2) - attention.sum(-1))


def check(x: Tensor, device: torch.device | str) -> None:
    actual = token_salience(x.to(device))
    assert actual.dtype == torch.float32 and actual.is_contiguous()
    again = lambda: (apart(t.float(), rounded=True) for _ in range(AGAIN) for t in moved([x.float()]))  # noqa: E731
    assert_close_to_truth(actual, apart(x.float()), apart(x.double()), again=again)
    assert actual.amin() == 0 and (actual.amax() == 1 or x.shape[1] == 1)


@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_the_truth(scale):
    x = scale * torch.randn(2, 30, 12, dtype=torch.float64)
    torch.testing.assert_close(apart(x), formula(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", [0.3, 5.0, 30.0], ids=["even", "peaked", "to itself"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 2, 3), (3, 36, 128), (1, 37, 33), (2, 65, 100), (1, 130, 31), (1, 196, 768), (1, 600, 16)]
)
def test_against_float64(place, shape, attention, dtype):
    """`attention` is the logit of a token with itself; the others have at most exp(-30) of the weight for 30."""
    if place.interpreted and shape[1] * shape[2] > 10000:
        pytest.skip("large sizes take minutes in Triton's interpreter")
    check(((attention / shape[2]) ** 0.5 * torch.randn(shape)).to(dtype), place.device)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 40)),
    scale=st.sampled_from([1e-2, 0.1, 1.0]),
    number=st.integers(0, 2**31),
)
def test_any_shape(place, shape, scale, number):
    check(scale * torch.randn(shape, generator=torch.Generator().manual_seed(number)), place.device)


def test_float64_on_any_device():
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    with backends.use("torch"):
        torch.testing.assert_close(token_salience(x), formula(x), rtol=1e-12, atol=1e-12)
    assert token_salience(x).dtype == torch.float64


def test_huge_logits_are_not_too_large(device):
    """exp without subtraction would overflow. Each token attends to itself, but the first attends to the last."""
    x = torch.eye(6, device=device)[None] * 50
    assert torch.equal(token_salience(x), torch.zeros(1, 6, device=device))
    x[0, 5] = 100 * torch.eye(6, device=device)[0]
    assert torch.equal(token_salience(x)[0].cpu(), torch.tensor([0.0, 0.5, 0.5, 0.5, 0.5, 1.0]))


def test_equal_tokens_give_zeros(place, device):
    if place.backend == "torch" or place.interpreted:  # Triton's interpreter multiplies with NumPy
        pytest.skip("the library's gemm may round equal columns differently")
    for tokens in (1, 6, 7, 64, 100):
        assert not token_salience(torch.randn(2, 1, 24, device=device).expand(2, tokens, 24)).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("at", [0, 5, 36])
def test_what_is_not_finite_shows_in_its_image_alone(device, value, at):
    """3e38 is finite, but its square is not."""
    x = torch.randn(3, 37, 8, device=device)
    expected = token_salience(x)
    x[1, at, 3] = value
    actual = token_salience(x)
    assert actual[1].isnan().all()
    assert torch.equal(actual[::2], expected[::2])


def test_an_image_of_one_token_that_is_not_finite(device):
    x = torch.randn(2, 1, 8, device=device)
    x[0, 0, 3] = torch.nan
    assert token_salience(x).isnan().tolist() == [[True], [False]]


def test_images_are_independent(device):
    x = torch.randn(5, 50, 24, device=device)
    together = token_salience(x)
    for image in range(5):
        assert torch.equal(together[image], token_salience(x[image : image + 1])[0])


def test_no_images(device):
    assert token_salience(torch.zeros(0, 4, 3, device=device)).shape == (0, 4)


def test_layouts(device):
    for name, x in layouts(torch.randn(2, 3, 7, 4, device=device)).items():
        x = x.flatten(1, 2) if name != "every other" else x[:, 1]
        assert torch.equal(token_salience(x), token_salience(x.contiguous())), name
    x = torch.randn(2, 9, 13, device=device)
    assert torch.equal(token_salience(x.mT), token_salience(x.mT.contiguous()))


def test_same_bits_each_time_and_with_any_number_of_threads(device, threads):
    x = torch.randn(3, 130, 40, device=device)
    results = []
    for number in (1, 1, 2):
        with threads(number):
            results.append(token_salience(x))
    assert torch.equal(results[0], results[1])
    # Gemms of plain PyTorch may depend on the number of threads.
    assert backends.forced() == "torch" or torch.equal(results[0], results[2])


def test_autocast_changes_nothing(device):
    x = torch.randn(2, 20, 16, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        actual = token_salience(x)
    assert torch.equal(actual, token_salience(x))


def test_the_attention_is_never_written():
    """For 6000 tokens the attention would have 144 MB."""
    usable, reason = backends.can_run("token_salience", "cpu")
    if not usable:
        pytest.skip(reason)
    x = torch.randn(1, 6000, 8)
    with backends.use("cpu"):
        token_salience(x[:, :600])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        token_salience(x)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 30_000, f"{grown} kB; the attention would take 140,000"


def test_compile(device):
    x = torch.randn(2, 16, 12, device=device)

    def function(x):
        return token_salience(x + 1) * 2

    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(4, 4), ValueError, r"x has shape \(4, 4\); expected \(B, N, D\)"),
        (torch.zeros(2, 0, 4), ValueError, r"x has shape \(2, 0, 4\); .* at least one token"),
        (torch.zeros(2, 4, 0), ValueError, "at least one token and channel"),
        (torch.zeros(1, 4, 4, dtype=torch.int32), TypeError, "x has dtype torch.int32"),
        (torch.zeros(1, 4, 4, requires_grad=True), ValueError, "x requires grad"),
    ],
)
def test_bad_input(x, error, message):
    with pytest.raises(error, match=message):
        token_salience(x)
