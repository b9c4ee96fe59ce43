"""Health of a run: losses and gradients that are not finite, and losses out of all proportion."""

from __future__ import annotations

import json
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip3o_dit.data.store import write_atomically

DIAGNOSIS_FILE = "diagnosis.json"
SPIKES_FILE = "loss_spikes.jsonl"

# A loss is a spike when it is above the median of the last ones by so many deviations (the median one, scaled
# to a normal distribution's) and by this factor: losses of single batches scatter by their times.
WINDOW, FEWEST, DEVIATIONS, FACTOR = 200, 20, 8.0, 2.0


class NonFiniteLossError(ValueError):
    """A loss or gradient became NaN or infinite; raised before the optimizer step: the weights are intact."""


class LossWatch:
    """Takes in the loss of every micro-batch and looks at it before the optimizer step at the latest.

    Args:
        deferred: look at losses in `check` only, and wait there for no more than the forward pass.
        on_spike: called with the optimizer step, the loss, the usual one, and the samples.
    """

    def __init__(self, *, deferred: bool, on_spike: Callable[[int, float, float, list[int]], None]) -> None:
        self._deferred = deferred
        self._on_spike = on_spike
        self._pending: list[tuple[Tensor, torch.cuda.Event | None, int, dict[str, Any]]] = []
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self.inputs: list[dict[str, Any]] = []
        """The micro-batches of the step under way, or the one at fault, for a diagnosis."""

    def add(self, loss: Tensor, step: int, inputs: dict[str, Any]) -> None:
        """Take in the loss of a micro-batch of optimizer step `step`."""
        event = None
        value = loss.detach()
        if value.is_cuda:
            value = torch.empty((), dtype=loss.dtype, pin_memory=True).copy_(value, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((value, event, step, inputs))
        self.inputs.append(inputs)
        if not self._deferred:
            self._look()

    def check(self) -> None:
        """Raises NonFiniteLossError, with step and samples, if a loss since the last call was not finite."""
        self._look()

    def forget(self) -> None:
        """The step was sound."""
        self.inputs = []

    def _look(self) -> None:
        pending, self._pending = self._pending, []
        for value, event, step, inputs in pending:
            if event is not None:
                event.synchronize()
            if not torch.isfinite(value):
                self.inputs = [inputs]
                raise NonFiniteLossError(
                    f"step {step}: expected a finite loss, found {value.item()} for samples "
                    f"{inputs['index']}; stopped before the optimizer step "
                    "(lower --learning_rate, or train without --fp16)"
                )
            self._compare(float(value), step, inputs["index"])

    def _compare(self, loss: float, step: int, samples: list[int]) -> None:
        if len(self._recent) >= FEWEST:
            usual = statistics.median(self._recent)
            deviation = 1.4826 * statistics.median(abs(value - usual) for value in self._recent)
            if loss > max(FACTOR * usual, usual + DEVIATIONS * deviation):
                self._on_spike(step, loss, usual, samples)
        self._recent.append(loss)


def check_gradient_norm(norm: Tensor, model: nn.Module, step: int) -> None:
    """Raises NonFiniteLossError, naming the parameters, unless the norm of all gradients is finite."""
    if torch.isfinite(norm):
        return
    names = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    raise NonFiniteLossError(
        f"step {step}: expected finite gradients, found NaN or infinity in {shown or 'their norm'}; "
        "stopped before the optimizer step"
    )


def write_diagnosis(
    file: Path,
    error: NonFiniteLossError,
    step: int,
    model: nn.Module,
    batches: list[dict[str, Any]],
    forward: Callable[[dict[str, Any]], Tensor] | None,
    keys: Callable[[list[int]], list[str]],
) -> Path:
    """Write a diagnosis: step, samples, the first layer whose output is not finite, gradients, dtypes.

    Args:
        batches: the micro-batches of the step.
        forward: the loss of one of them, computed once more without gradients; None: do not.
        keys: sample indices -> their keys.
    """
    samples = [index for batch in batches for index in batch["index"]]
    found = {
        "error": str(error),
        "step": step,
        "samples": [{"index": i, "key": key} for i, key in zip(samples, keys(samples), strict=True)],
        "first_layer": _first_bad_layer(model, batches, forward) if forward else None,
        "inputs": {
            name: [_finite(batch[name]) for batch in batches] for name in ("eva", "clip", "noise", "time")
        },
        "weights": _bad_tensors((name, p.detach()) for name, p in model.named_parameters()),
        "gradients": _bad_tensors((name, p.grad) for name, p in model.named_parameters()),
    }
    write_atomically(file, json.dumps(found, indent=1).encode())
    return file


@torch.no_grad()
def _first_bad_layer(
    model: nn.Module, batches: list[dict[str, Any]], forward: Callable[[dict[str, Any]], Tensor]
) -> dict[str, str] | None:
    """Name, class and dtype of the first layer that makes something not finite of a batch."""
    found: list[dict[str, str]] = []
    with _after_each_layer(model, found):
        for batch in batches:
            forward(batch)
    return found[0] if found else None


@contextmanager
def _after_each_layer(model: nn.Module, found: list[dict[str, str]]) -> Iterator[None]:
    def look(name: str, layer: nn.Module, output: Any) -> None:
        if isinstance(output, Tensor) and not found and not _finite(output):
            found.append({"name": name, "class": type(layer).__name__, "dtype": str(output.dtype)})

    handles = [
        layer.register_forward_hook(lambda layer, _, output, name=name: look(name, layer, output))
        for name, layer in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bad_tensors(named: Any) -> list[dict[str, str]]:
    return [
        {"name": name, "dtype": str(tensor.dtype)}
        for name, tensor in named
        if tensor is not None and not _finite(tensor)
    ]


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
