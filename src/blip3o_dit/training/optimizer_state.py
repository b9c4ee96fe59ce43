"""The optimizer's state as tensors (safetensors) and numbers (JSON), instead of torch's pickle.

Tensors are named "<parameter number>.<state name>", and those of torchao's 8-bit states, which are three
tensors and a flag each, "<parameter number>.<state name>.<part>".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from blip3o_dit.training.checkpoint import OPTIMIZER_NUMBERS, OPTIMIZER_TENSORS, from_its_weights
from blip3o_dit.utils.json_files import read_json_object, short_repr
from blip3o_dit.utils.validation import damage_refused

# What an optimizer keeps of a parameter: one that lacks something would begin it anew, or fail in its step.
ADAMW_STATES, MUON_STATES = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}

EIGHT_BIT_PARTS = ("codes", "scale", "qmap")


def gathered_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The optimizer's whole state dict, by parameter number.

    Where weights are shared out over processes (FSDP) all must call this, and the first one gets the state.
    """
    optimizer = unwrapped(optimizer)
    if not _sharded(optimizer):
        return optimizer.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    if not state:
        return {}
    names = [name for group in state["param_groups"] for name in group["params"]]
    return _renamed(state["state"], state["param_groups"], {name: i for i, name in enumerate(names)})


def save_optimizer(
    folder: Path, state: dict[str, Any], scheduler: LRScheduler, scaler: dict[str, Any] | None
) -> None:
    """Write the state of the optimizer (as `gathered_state` gives it), its schedule and, with float16, the
    loss scaler's."""
    tensors: dict[str, Tensor] = {}
    signed: dict[str, bool] = {}
    for number, values in state["state"].items():
        for name, value in values.items():
            key = f"{number}.{name}"
            if type(value).__name__ == "OptimState8bit":
                tensors |= {f"{key}.{part}": getattr(value, part) for part in EIGHT_BIT_PARTS}
                signed[key] = value.signed
            else:
                tensors[key] = value
    numbers = {
        "param_groups": _json_values(state["param_groups"]),
        "eight_bit": signed,
        "scheduler": _json_values(scheduler.state_dict()),
        "scaler": scaler,
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / OPTIMIZER_TENSORS)
    (folder / OPTIMIZER_NUMBERS).write_text(json.dumps(numbers, indent=1))


def load_optimizer(
    folder: Path, model: nn.Module, optimizer: Any, scheduler: LRScheduler
) -> dict[str, Any] | None:
    """Read what `save_optimizer` wrote, also for another number of processes; returns the scaler's state.

    Raises:
        ValueError: naming the file, when it is not such a state or that of other parameters.
    """
    optimizer = unwrapped(optimizer)
    file, where = folder / OPTIMIZER_TENSORS, folder / OPTIMIZER_NUMBERS
    numbers = read_json_object(where)
    saved_groups = numbers.get("param_groups")
    with damage_refused(file, "tensors"):
        tensors = load_file(file)
    _check_groups(where, optimizer, saved_groups)
    state = _state(file, tensors, numbers.get("eight_bit"), optimizer.param_groups)
    groups = _like(f"{where}: param_groups", optimizer.state_dict()["param_groups"], saved_groups)
    schedule = _like(f"{where}: scheduler", scheduler.state_dict(), numbers.get("scheduler"))
    if _sharded(optimizer):
        _load_sharded(model, optimizer, state, groups)
    else:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    scheduler.load_state_dict(schedule)
    return numbers.get("scaler")


def _check_groups(file: Path, optimizer: Optimizer, found: Any) -> None:
    """Parameters are numbered group by group, so other groups would mean other parameters."""
    expected = [len(group["params"]) for group in optimizer.param_groups]
    groups = found if isinstance(found, list) else []
    names = [group.get("params") if isinstance(group, dict) else None for group in groups]
    counts = [len(listed) if isinstance(listed, list) else None for listed in names]
    if counts != expected:
        raise ValueError(
            f"{file}: param_groups: expected {expected} parameters with and without weight decay, found "
            f"{short_repr(counts)} (earlier versions with --weight_decay also let norms and gates decay; "
            "optimizer muon has its matrices apart): " + from_its_weights(file.parent)
        )


def _load_sharded(
    model: nn.Module, optimizer: Optimizer, state: dict[int, dict[str, Tensor]], groups: list[dict[str, Any]]
) -> None:
    """Every process has read the whole state, and keeps its part."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    named = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    whole = _renamed(state, groups, dict(enumerate(named)))
    set_optimizer_state_dict(model, optimizer, whole, options=StateDictOptions(full_state_dict=True))


def _renamed(state: dict[Any, Any], groups: list[dict[str, Any]], names: dict[Any, Any]) -> dict[str, Any]:
    """A state dict with other names, or numbers, for the parameters."""
    return {
        "state": {names[key]: values for key, values in state.items()},
        "param_groups": [g | {"params": [names[key] for key in g["params"]]} for g in groups],
    }


def unwrapped(optimizer: Any) -> Any:
    """torch's optimizer inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def _sharded(optimizer: Optimizer) -> bool:
    return any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])


def _json_values(value: Any) -> Any:
    """What JSON can hold: torchao keeps its learning rate in a tensor."""
    if isinstance(value, dict):
        return {key: _json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_values(item) for item in value]
    return value.item() if isinstance(value, Tensor) else value


def _like(where: str, current: Any, found: Any) -> Any:
    """The found value, refused unless it is built like the current one, in whose types it is returned."""
    if isinstance(current, dict) and isinstance(found, dict) and current.keys() == found.keys():
        return {key: _like(f"{where}: {key}", item, found[key]) for key, item in current.items()}
    if isinstance(current, list | tuple) and isinstance(found, list) and len(current) == len(found):
        return type(current)(_like(where, *pair) for pair in zip(current, found, strict=True))
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    if isinstance(current, Tensor) and is_number:
        return torch.full_like(current, found)
    if isinstance(current, int | float) and not isinstance(current, bool) and is_number:
        return found
    if type(current) is type(found) and not isinstance(found, dict | list):
        return found
    raise ValueError(
        f"{where}: expected a value like {short_repr(_json_values(current))}, found {short_repr(found)}"
    )


def _state(
    file: Path, tensors: dict[str, Tensor], eight_bit: Any, groups: list[dict[str, Any]]
) -> dict[int, dict[str, Tensor]]:
    """{parameter number: {state name: tensor}}, each with its parameter's shape (or a single number)."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in groups for p in group["params"]]
    by_number = {str(number): parameter for number, parameter in enumerate(parameters)}
    for key, tensor in _joined(file, tensors, eight_bit).items():
        number, _, name = key.partition(".")
        if number not in by_number:
            raise ValueError(
                f"{file}: expected states of {len(by_number)} parameters, found {short_repr(key)}"
            )
        expected = list(by_number[number].shape)
        if tensor.ndim and list(tensor.shape) != expected:
            raise ValueError(
                f"{file}: {short_repr(key)}: expected shape {expected}, found {list(tensor.shape)}"
            )
        state.setdefault(int(number), {})[name] = tensor
    if state and len(state) != len(parameters):
        raise ValueError(f"{file}: expected states of {len(parameters)} parameters, found {len(state)}")
    names = [ADAMW_STATES if "betas" in group else MUON_STATES for group in groups for _ in group["params"]]
    for place, values in state.items():
        if values.keys() != names[place]:
            found = f"{', '.join(sorted(names[place]))}, found {short_repr(sorted(values))}"
            raise ValueError(f"{file}: parameter {place}: expected {found}")
    return state


def _joined(file: Path, tensors: dict[str, Tensor], eight_bit: Any) -> dict[str, Tensor]:
    """The tensors with the parts of each 8-bit state put together."""
    if not isinstance(eight_bit, dict):
        raise ValueError(f"{file}: expected {OPTIMIZER_NUMBERS} to say which states have 8 bits")
    if not eight_bit:
        return tensors
    from torchao.optim.subclass_8bit import OptimState8bit

    joined = dict(tensors)
    for key, signed in eight_bit.items():
        codes, scale, qmap = (joined.pop(f"{key}.{part}", None) for part in EIGHT_BIT_PARTS)
        if codes is None or scale is None or qmap is None:
            raise ValueError(f"{file}: {short_repr(key)}: expected {', '.join(EIGHT_BIT_PARTS)}")
        if codes.dtype != torch.uint8 or qmap.numel() != 256 or codes.numel() % max(1, scale.numel()):
            raise ValueError(
                f"{file}: {short_repr(key)}: expected an 8-bit state, found other shapes or types"
            )
        joined[key] = OptimState8bit(codes, scale, qmap, bool(signed))
    return joined
