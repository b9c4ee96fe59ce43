"""Anomalies of a run: losses and gradients that are not finite, and losses far above the usual."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from blip3o_dit.utils.atomic import write_atomically

logger = logging.getLogger(__name__)

DIAGNOSIS_FILE = "diagnosis.json"
SPIKES_FILE = "loss_spikes.jsonl"

# A loss is a spike when it is above the median of the last ones by so many deviations (the median one, scaled
# to a normal distribution's) and by this factor: losses of single batches scatter by their times.
WINDOW, MIN_LOSSES, DEVIATIONS, FACTOR = 200, 20, 8.0, 2.0


class NonFiniteLossError(ValueError):
    """A loss or gradient became NaN or infinite; its optimizer step changed no weight."""


class HostCopy:
    """A small tensor on its way to the CPU."""

    def __init__(self, tensor: Tensor) -> None:
        self.on_device = tensor.detach()
        self._value, self._event = self.on_device, None
        if tensor.is_cuda:
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._value = pinned.copy_(self._value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Tensor:
        """The tensor on the CPU; waits for what was queued on the device before the copy, not for more."""
        if self._event is not None:
            self._event.synchronize()
        return self._value


class LossMonitor:
    """Takes in the loss of every micro-batch and looks at it.

    With `deferred` it looks in `check` only, and waits there for no more than the forward pass. `on_spike` is
    called with the optimizer step, the loss, the usual one, and the samples.
    """

    def __init__(self, *, deferred: bool, on_spike: Callable[[int, float, float, list[int]], None]) -> None:
        self._deferred = deferred
        self._on_spike = on_spike
        self._pending: list[tuple[HostCopy, int, dict[str, Any]]] = []
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._inputs: list[tuple[int, dict[str, Any]]] = []

    def add(self, loss: Tensor, step: int, inputs: dict[str, Any]) -> None:
        """Take in the loss of a micro-batch of optimizer step `step`."""
        self._pending.append((HostCopy(loss), step, inputs))
        self._inputs.append((step, inputs))
        if not self._deferred:
            self.check()

    def check(self, step: int | None = None) -> None:
        """Raises NonFiniteLossError, with step and samples, if a loss up to this step (by default any) that
        was not looked at yet is not finite."""
        due = [entry for entry in self._pending if step is None or entry[1] <= step]
        self._pending = self._pending[len(due) :]
        for copy, number, inputs in due:
            value = float(copy.read())
            if not math.isfinite(value):
                self._inputs = [(number, inputs)]
                raise NonFiniteLossError(
                    f"step {number}: expected a finite loss, found {value} for samples {inputs['index']}; "
                    "stopped before the optimizer step (lower --learning_rate, or train without --fp16)"
                )
            self._compare(value, number, inputs["index"])

    def all_finite(self) -> Tensor:
        """Whether the losses that were not looked at yet are finite: a boolean on their device."""
        return torch.isfinite(torch.stack([copy.on_device for copy, _, _ in self._pending])).all()

    def inputs_of(self, step: int) -> list[dict[str, Any]]:
        """The micro-batches of a step that was not forgotten, or the one at fault, for a diagnosis."""
        return [inputs for number, inputs in self._inputs if number == step]

    def withdraw(self, step: int) -> None:
        """Drop what was taken in of a step that is taken again."""
        self._pending = [entry for entry in self._pending if entry[1] != step]
        self._inputs = [entry for entry in self._inputs if entry[0] != step]

    def forget(self, step: int) -> None:
        """Drop the inputs kept for a diagnosis; the steps up to this one were finite."""
        self._inputs = [entry for entry in self._inputs if entry[0] > step]

    def _compare(self, loss: float, step: int, samples: list[int]) -> None:
        if len(self._recent) >= MIN_LOSSES:
            usual = statistics.median(self._recent)
            deviation = 1.4826 * statistics.median(abs(value - usual) for value in self._recent)
            if loss > max(FACTOR * usual, usual + DEVIATIONS * deviation):
                self._on_spike(step, loss, usual, samples)
        self._recent.append(loss)


class GradientNorms:
    """The norms of all gradients of optimizer step `step`, without waiting for them.

    `total` is the norm of all together, a scalar on their device.
    """

    def __init__(self, model: nn.Module, step: int) -> None:
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients = list(found.values())
        narrow = any(gradient.dtype != torch.float32 for gradient in gradients)
        norms = torch.stack(  # [gradients]
            torch._foreach_norm(gradients, dtype=torch.float32 if narrow else None)
        )
        norms = norms.full_tensor() if isinstance(norms, DTensor) else norms
        self.step = step
        self.total = torch.linalg.vector_norm(norms)
        self._names, self._found = list(found), HostCopy(torch.cat([norms, self.total[None]]))

    def bad(self) -> list[str]:
        """The parameters whose gradients are not finite."""
        *norms, _ = self._found.read().tolist()
        return [name for name, norm in zip(self._names, norms, strict=True) if not math.isfinite(norm)]

    def check(self) -> None:
        """Raises NonFiniteLossError, naming the parameters, unless gradients and norm are finite."""
        *_, total = self._found.read().tolist()
        if not math.isfinite(total):
            names = self.bad()
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise NonFiniteLossError(
                f"step {self.step}: expected finite gradients, found NaN or infinity in "
                f"{shown or 'their norm'}; stopped before the optimizer step"
            )


def write_spike(
    file: Path, step: int, loss: float, usual: float, samples: list[int], keys: list[str]
) -> None:
    """Append a spike to `loss_spikes.jsonl`, and warn of it."""
    found = {"step": step, "loss": loss, "usual": usual, "samples": samples, "keys": keys}
    with open(file, "a", encoding="utf-8") as spikes:
        spikes.write(json.dumps(found) + "\n")
    message = "step %d: loss %.4g where %.4g is usual; its samples are in %s"
    logger.warning(message, step, loss, usual, SPIKES_FILE)


def write_diagnosis(
    file: Path,
    error: NonFiniteLossError,
    step: int,
    model: nn.Module,
    batches: list[dict[str, Any]],
    gradients: GradientNorms | None,
    forward: Callable[[dict[str, Any]], Tensor] | None,
    keys: Callable[[list[int]], list[str]],
) -> Path:
    """Write a diagnosis: step, samples, the first layer whose output is not finite, gradients, dtypes.

    `forward` computes the loss of a micro-batch once more, without gradients (None: do not).
    """
    samples = [index for batch in batches for index in batch["index"]]
    found = {
        "error": str(error),
        "step": step,
        "samples": [{"index": i, "key": key} for i, key in zip(samples, keys(samples), strict=True)],
        "first_layer": _first_bad_layer(model, batches, forward) if forward else None,
        "inputs": {
            name: [_finite(batch[key]) for batch in batches]
            for name, key in (("eva", "eva"), ("clip", "clip"), ("noise", "noise"), ("time", "u_time"))
        },
        "weights": [
            {"name": name, "dtype": str(p.dtype)}
            for name, p in model.named_parameters()
            if not _finite(p.detach())
        ],
        "gradients": [
            {"name": name, "dtype": str(model.get_parameter(name).dtype)}
            for name in (gradients.bad() if gradients else [])
        ],
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


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
