"""Weights that are shared out over processes (FSDP, torch's `fully_shard`), for averaging and saving."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel

CONFIG_FILE = "configs/accelerate/fsdp.yaml"


def asked_for() -> bool:
    """Whether `accelerate launch` was told to share out weights."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def check_sharding(state: Any) -> None:
    """Refuse (ValueError) settings of FSDP, in an `AcceleratorState`, that this package does not know."""
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        return
    settings = [
        ("fsdp_version", plugin.fsdp_version, 2),
        # accelerate would send buffers around as if they were sharded, and the statistics are buffers.
        ("fsdp_cpu_ram_efficient_loading", plugin.cpu_ram_efficient_loading, False),
        # Otherwise the saved model would not be one ordinary safetensors file.
        ("fsdp_state_dict_type", plugin.state_dict_type.name, "FULL_STATE_DICT"),
    ]
    for name, found, expected in settings:
        if found != expected:
            raise ValueError(f"{name}: expected {expected} as in {CONFIG_FILE}, found {found}")


def keep_the_dtype_rule(state: Any) -> None:
    """Have mixed precision narrow the weights and nothing else, in an `AcceleratorState` with FSDP.

    accelerate would also round every input of every block, times and rotary tables among them, reduce
    gradients in the narrow dtype, and round the output before the loss (see `model/layers.py`).
    """
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None or plugin.mixed_precision_policy is None:
        return
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=plugin.mixed_precision_policy.param_dtype,
        reduce_dtype=torch.float32,
        output_dtype=None,
        cast_forward_inputs=False,
    )


def let_generate(model: BLIP3oDiTModel) -> None:
    """Have a sharded model gather its weights for generation as it does for a training step."""
    of_blocks = [(block, method) for block in model.dit.blocks for method in ("encode", "modulate")]
    for module, method in [(model, "generate"), *of_blocks]:
        if isinstance(module, FSDPModule):
            register_fsdp_forward_method(module, method)


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name; of sharded ones each process's own part, which is what optimizers change.

    A forward pass without a backward one leaves some parameters whole, in copies that are thrown away.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that every process has whole, on the device of the parameter and shared out as it is."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Sharded tensors put together, which takes all processes; an empty dict where they are not kept."""
    kept = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            kept[name] = whole.cpu() if isinstance(tensor, DTensor) else whole
    return kept
