"""What a checkpoint holds of model and optimizer, by name, however they are wrapped or sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as whole

_OPTIONS = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """All tensors of a training, on the CPU of the first process (the others get less): {"model", "optimizer"}.

    Every process has to call it. The optimizer's are named KIND/PARAMETER, as in exp_avg/encoder.mask_token.
    """
    weights = whole.get_model_state_dict(model, options=_OPTIONS)
    states = whole.get_optimizer_state_dict(model, optimizer, options=_OPTIONS).get("state", {})
    named = {f"{kind}/{name}": tensor for name, state in states.items() for kind, tensor in state.items()}
    return {"model": weights, "optimizer": named}


def restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], named: dict[str, Tensor]
) -> None:
    """Puts back what `gather` gave. Every process has to call it, with all tensors."""
    options = whole.StateDictOptions(full_state_dict=True)
    groups: Any = whole.get_optimizer_state_dict(model, optimizer)["param_groups"]
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in named.items():
        kind, _, name = key.partition("/")
        states.setdefault(name, {})[kind] = tensor
    content = {"state": states, "param_groups": groups}
    whole.set_optimizer_state_dict(model, optimizer, content, options=options)
    whole.set_model_state_dict(model, weights, options=options)
