"""What a training computes in its steps, noted so that another one is the same bits or is told where it left.

Each step's loss and gradient norm, and digests of the parts of the first steps in the order in which they are
computed: batch, noise, path, each block, prediction, loss, gradients, weights, averages.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from blip3o_dit.flow.path import FlowBatch, PathPoint
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.training.base_trainer import ExactResumeTrainer

FIGURES = ("loss", "gradient norm")  # of each step
TRACED = 3  # first steps whose parts are noted: gates and output start at zero, and let the third through


@dataclass(frozen=True)
class Part:
    """What stands for the numbers of one part of a step.

    Two numbers of a random sign each stand for all: the difference of two parts has about the size of the
    difference of theirs (Johnson and Lindenstrauss).
    """

    checksum: str
    norm: float
    sketch: tuple[float, ...]

    @classmethod
    def of(cls, *tensors: Tensor) -> Part:
        flat = [tensor.detach().cpu().flatten() for tensor in tensors]
        checksum = 0
        for tensor in flat:
            checksum = zlib.crc32(tensor.view(torch.uint8).numpy(), checksum)
        numbers = torch.cat([tensor.double() for tensor in flat]).numpy()
        place = np.arange(len(numbers), dtype=np.uint64)
        signs = [_signs(place, multiplier) for multiplier in _MULTIPLIERS]
        sketch = tuple(float(f"{numbers @ sign:.10g}") for sign in signs)
        return cls(f"{checksum:08x}", float(f"{np.linalg.norm(numbers):.10g}"), sketch)

    @classmethod
    def read(cls, line: str) -> Part:
        checksum, *numbers = line.split()
        norm, *sketch = map(float, numbers)
        return cls(checksum, norm, tuple(sketch))

    def written(self) -> str:
        return " ".join([self.checksum, *(f"{number:.10g}" for number in (self.norm, *self.sketch))])

    def moved(self, other: Part) -> float:
        """About how far the other one is from this, relative."""
        apart = np.square(np.subtract(self.sketch, other.sketch)).mean() ** 0.5
        return float(apart / self.norm) if self.norm else float(apart)


_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)


def _signs(place: np.ndarray, multiplier: int) -> np.ndarray:
    """1 or -1 for each place, by a hash of it."""
    mixed = (place + np.uint64(1)) * np.uint64(multiplier)
    mixed ^= mixed >> np.uint64(29)
    return 1.0 - 2.0 * ((mixed * np.uint64(multiplier)) >> np.uint64(63))


@dataclass
class Trace:
    """What a training computed: figures of each step, parts of the first steps and at the end."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    parts: list[dict[str, Part]] = field(default_factory=list)
    end: dict[str, Part] = field(default_factory=dict)

    @property
    def figures(self) -> tuple[list[float], list[float]]:
        return self.losses, self.norms

    def to_json(self) -> dict[str, Any]:
        steps = zip(*self.figures, strict=True)
        return {
            ", ".join(FIGURES): [f"{_hex(loss)} {_hex(norm)}" for loss, norm in steps],
            "first steps": [_written(parts) for parts in self.parts],
            "end": _written(self.end),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Trace:
        steps = [tuple(map(float.fromhex, line.split())) for line in found[", ".join(FIGURES)]]
        return cls(
            losses=[loss for loss, _ in steps],
            norms=[norm for _, norm in steps],
            parts=[_read(parts) for parts in found["first steps"]],
            end=_read(found["end"]),
        )

    def difference(self, found: Trace) -> str:
        """The first thing in which `found` is not this trace, bit for bit; "" for the same.

        A shorter trace is compared with the beginning of this one.
        """
        for step in range(len(found.losses)):
            if step < min(len(self.parts), len(found.parts)):
                moved = _first_moved(self.parts[step], found.parts[step])
                if moved:
                    return f"step {step + 1}: {moved}"
            for what, mine, theirs in (
                ("loss", self.losses, found.losses),
                ("norm", self.norms, found.norms),
            ):
                if mine[step] != theirs[step]:
                    return f"step {step + 1}: {what} was {mine[step]!r}, is {theirs[step]!r}"
        to_the_end = len(found.losses) == len(self.losses)
        moved = _first_moved(self.end, found.end) if to_the_end else ""
        return f"after the last step: {moved}" if moved else ""

    def distance(self, found: Trace, steps: int | None = None) -> float:
        """The largest relative difference of a loss or a gradient norm of so many first steps."""
        mine, theirs = (np.array(trace.figures)[:, :steps] for trace in (self, found))
        return float((np.abs(mine - theirs) / np.abs(mine)).max())


def _hex(number: float) -> str:
    """As `float.hex`, without the zeros at the end of a float32."""
    return re.sub(r"\.?0*p", "p", number.hex())


def _written(parts: Mapping[str, Part]) -> dict[str, str]:
    return {name: part.written() for name, part in parts.items()}


def _read(parts: Mapping[str, str]) -> dict[str, Part]:
    return {name: Part.read(line) for name, line in parts.items()}


def _first_moved(mine: Mapping[str, Part], theirs: Mapping[str, Part]) -> str:
    if list(mine) != list(theirs):
        return f"its parts were {', '.join(mine)}; they are {', '.join(theirs)}"
    for name, part in mine.items():
        if part.checksum != theirs[name].checksum:
            return f"{name} moved by {part.moved(theirs[name]):.1g} relative"
    return ""


class Enough(Exception):
    """As many steps as were asked for are taken."""


class Tracer(TrainerCallback):
    """Notes what a trainer computes, in the order in which it does; ends the training after `steps`."""

    def __init__(self, trainer: ExactResumeTrainer, steps: int) -> None:
        self.trainer, self.steps = trainer, steps
        self.trace = Trace()
        self._parts: dict[str, Part] = {}
        self._watch_batches(trainer)
        self._watch_network(trainer.unwrapped_model)
        trainer.add_callback(self)

    @property
    def _traced(self) -> bool:
        return self.trainer.state.global_step < TRACED

    def note(self, name: str, *tensors: Tensor | None) -> None:
        """Of blocks that are computed again in the backward pass, the first time counts."""
        given = [tensor for tensor in tensors if tensor is not None]
        if given and self._traced and name not in self._parts:
            self._parts[name] = Part.of(*given)

    def _watch_batches(self, trainer: Any) -> None:
        plain_loss, plain_clip = trainer.compute_loss, trainer._clip_grad_norm
        path = "_lesson" if hasattr(trainer, "_lesson") else "flow_batch"
        plain_path = getattr(trainer, path)

        def compute_loss(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            self.note("batch", *(inputs[name] for name in ("eva", "clip") if name in inputs))
            self.note("noise", inputs["noise"])
            loss = plain_loss(model, inputs, *args, **kwargs)
            self.note("loss", loss)
            self.trace.losses.append(loss.item())
            return loss

        def flow_batch(*args: Any, **kwargs: Any) -> FlowBatch[PathPoint]:
            flow = plain_path(*args, **kwargs)
            self.note("times", flow.sample.t)
            self.note("source's guess", flow.source.mean, flow.source.std)
            self.note("points on the path", flow.sample.x_t)
            self.note("velocity on the path", flow.sample.velocity)
            self.note("condition", flow.condition)
            return flow

        def clip_grad_norm(model: nn.Module) -> Tensor:
            for name, parameters in groups(trainer.unwrapped_model).items():
                self.note(f"gradient of {name}", *(p.grad for p in parameters if p.grad is not None))
            norm = plain_clip(model)
            self.note("gradient norm", norm)
            self.trace.norms.append(norm.item())
            return norm

        trainer.compute_loss, trainer._clip_grad_norm = compute_loss, clip_grad_norm
        setattr(trainer, path, flow_batch)

    def _watch_network(self, model: BLIP3oDiTModel) -> None:
        named: dict[str, nn.Module] = {
            "encoded condition": model.dit.caption_projection,
            "time embedding": model.dit.time_caption_embed,
            "prediction": model.dit,
        }
        named |= {f"block {number}'s output": block for number, block in enumerate(model.dit.layers, 1)}
        for name, module in named.items():
            module.register_forward_hook(lambda _, __, output, name=name: self.note(name, output))

    def on_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        self.note("weights", *self.trainer.unwrapped_model.parameters())

    def on_step_end(self, *_: Any, **kwargs: Any) -> None:
        if self.trainer.state.global_step <= TRACED:
            self.trace.parts.append({**self._parts, **self._averages()})
            self._parts = {}
        if self.trainer.state.global_step == self.steps:
            self.trace.end = {"weights": Part.of(*self.trainer.unwrapped_model.parameters())}
            self.trace.end |= self._averages()
            raise Enough

    def _averages(self) -> dict[str, Part]:
        ema = self.trainer.ema
        return {} if ema is None else {"averaged weights": Part.of(*ema.weights.values())}


def groups(model: BLIP3oDiTModel) -> dict[str, list[nn.Parameter]]:
    """The network's parameters by the layer, or the block, that has them."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.dit.named_parameters():
        layer, number, *_ = name.split(".")
        found.setdefault(f"block {int(number) + 1}" if layer == "layers" else layer, []).append(parameter)
    return found
