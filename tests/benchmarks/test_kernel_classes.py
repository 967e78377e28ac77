"""Assignment of profiler events to the classes of kernels in the benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from tools.kernel_classes import CLASSES, REST, above_gemms, class_of, class_times, sentence

from sgmim_fast import backends, ops

NATIVE = backends.available()["cpu"]
# Our operators without a class: losses, masks, sums, and standardisation.
OTHERS = {"column_sum", "expand_signs", "distance", "isa", "place_tokens", "place_tokens_backward", "selective_mask"}
OTHERS |= {"standardize_structure", "token_salience"}


@pytest.mark.skipif(not NATIVE[0], reason=NATIVE[1])
def test_every_operator_of_ours_has_one():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sgmim_fast_cpu::")]
    classes = {name.partition("::")[2]: class_of(name) for name in names}
    assert {name for name, found in classes.items() if found == REST} == OTHERS
    assert {name for name, found in classes.items() if found == "gemms"} == {
        *("wgrad", "linear", "linear_gelu", "dgrad_gelu")
    }
    assert {name for name, found in classes.items() if found == "GELU"} == {"gelu", "gelu_backward"}
    assert {name for name, found in classes.items() if found == "attention"} == {
        *("attention", "attention_backward", "window_attention", "window_attention_backward"),
        *("position_bias", "position_bias_backward"),
    }


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda x: x @ x, "gemms"),
        (lambda x: F.linear(x, x, x[0]), "gemms"),
        (lambda x: F.gelu(x), "GELU"),
        (lambda x: F.layer_norm(x, x.shape[1:]), "norms"),
        (lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]), "attention"),
        (lambda x: x.to(torch.bfloat16), "copies"),
        (lambda x: torch.cat([x, x]), "copies"),
        (lambda x: x.sin(), REST),
    ],
)
def test_of_pytorchs_calls_most_time_is_in_the_class(run, expected):
    x = torch.randn(1200, 1200)
    times = class_times(lambda: run(x))
    assert list(times) == [*CLASSES, REST]
    assert max(times, key=times.__getitem__) == expected, times


def test_what_ops_do_in_python_is_the_rest():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.norm_linear(x, w, norm_weight=w[0], norm_bias=w[1]).sum().backward()
    found = [event.key for event in profile.key_averages() if "norm_linear" in event.key]
    assert found and all(class_of(key) == REST for key in found)


def test_shares_sum_to_what_the_step_takes_more():
    times = dict.fromkeys([*CLASSES, REST], 1.0) | {"gemms": 15.0}  # 20 in total, for a step of 10
    shares = above_gemms(times, 10.0, 8.0)
    assert shares["gemms"] == pytest.approx(7.5 / 8 - 1) and shares["norms"] == pytest.approx(0.5 / 8)
    assert sum(shares.values()) == pytest.approx(10 / 8 - 1)
    said = sentence("fused-cpu", shares)
    assert said.startswith("fused-cpu is +25.0 % above the bare gemms: gemms -6.2 %, attention +6.2 %")
