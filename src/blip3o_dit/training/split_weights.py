"""bfloat16 weights whose float32 values are kept to the bit: the other 16 bits lie beside the optimizer.

A weight takes 4 bytes as before, but the passes read and write 2 of them and cast nothing, and gradients take
2. What is learned is learned by the float32 values: a bfloat16 alone would lose an update below 1/512 of it.
Apex's DistributedFusedAdam calls it `store_param_remainders`, modded-nanogpt mantissa tracking.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.adamw import adamw
from transformers import TrainingArguments

from blip3o_dit.utils.validation import triton_works

HALF = 1 << 15  # of the step between two bfloat16 numbers, as an integer of float32's bits


def split(exact: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 numbers -> the nearest bfloat16 ones (of two, the larger in size), and an int16 remainder."""
    bits = exact.view(torch.int32)
    return ((bits + HALF) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def joined(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 numbers that `split` was given."""
    bits = weight.view(torch.int16).to(torch.int32) << 16
    return bits.add_(remainder).view(torch.float32)


def rounded_at_random(exact: Tensor) -> Tensor:
    """Float32 numbers -> bfloat16 ones beside them, the nearer the likelier: on average nothing is lost."""
    bits = exact.view(torch.int32)
    return ((bits + torch.randint_like(bits, 1 << 16)) >> 16).to(torch.int16).view(torch.bfloat16)


class SplitWeights:
    """Makes a float32 model's weights bfloat16, and keeps what they lose by it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.remainders: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            parameter.data, self.remainders[name] = split(parameter.data)

    def exact(self, name: str, parameter: Tensor) -> Tensor:
        """The float32 value of a parameter."""
        return joined(parameter, self.remainders[name])

    def optimizer(self, settings: TrainingArguments, moments: str) -> tuple[type[AdamW], dict[str, Any]]:
        """AdamW for these weights, as the Trainer takes it: a class and its arguments."""
        of = {parameter: self.remainders[name] for name, parameter in self._model.named_parameters()}
        betas = (settings.adam_beta1, settings.adam_beta2)
        own = {"remainders": of, "moments": getattr(torch, moments)}
        return SplitAdamW, own | {"lr": settings.learning_rate, "betas": betas, "eps": settings.adam_epsilon}

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the model has its float32 values, to be saved or replaced: 4 bytes a parameter more."""
        kept = {name: parameter.data for name, parameter in self._model.named_parameters()}
        for name, parameter in self._model.named_parameters():
            parameter.data = self.exact(name, parameter.data)
        try:
            yield
        finally:
            for name, parameter in self._model.named_parameters():
                weight, remainder = split(parameter.data)
                parameter.data = kept[name].copy_(weight)
                self.remainders[name].copy_(remainder)


class SplitAdamW(AdamW):
    """torch's fused AdamW on the float32 values of split weights, which are there for one tensor at a time.

    With Triton on a GPU one kernel of our own, `triton_adamw.py`.

    Args:
        remainders: of each parameter.
        moments: how the two moments are kept. In bfloat16 the second one, which changes by a thousandth in a
            step, is rounded at random: rounded to the nearest it would never fall.
    """

    def __init__(
        self, params: Any, *, remainders: Mapping[nn.Parameter, Tensor], moments: torch.dtype, **settings: Any
    ) -> None:
        super().__init__(params, fused=True, **settings)
        self._remainders, self._moments = remainders, moments

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; `grad_scale` and `found_inf` as torch's own has them."""
        for group in self.param_groups:
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in given:
                self._begin(parameter)
            if given and given[0].is_cuda and triton_works():
                from blip3o_dit.training import triton_adamw

                scaling = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
                triton_adamw.step(given, self._remainders, self.state, group, *scaling)
                continue
            for parameter in given:
                self._update(parameter, parameter.grad.float(), group)

    def _begin(self, parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=self._moments)

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state, remainder = self.state[parameter], self._remainders[parameter]
        exact = joined(parameter, remainder)
        mean, square = state["exp_avg"].float(), state["exp_avg_sq"].float()  # themselves in float32
        same = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize", "fused")}
        scaling = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        beta1, beta2 = group["betas"]
        adamw(
            *([exact], [gradient], [mean], [square], [], [state["step"]]),
            **(same | scaling),
            beta1=beta1,
            beta2=beta2,
        )
        if self._moments == torch.bfloat16:
            state["exp_avg"].copy_(mean)
            state["exp_avg_sq"].copy_(rounded_at_random(square))
        for kept, new in zip((parameter, remainder), split(exact), strict=True):
            kept.copy_(new)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's own would give the moments the weights' dtype."""
        super().load_state_dict(state_dict | {"state": {}})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, values in state_dict["state"].items():
            parameter = parameters[number]
            self.state[parameter] = {name: value.to(parameter.device) for name, value in values.items()}
