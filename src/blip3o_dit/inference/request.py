"""What a generation is asked for, so that it can be told from others, and which samples those are.

version     of this package
model       which weights, and a digest of them and of the configuration
data        a digest of the embeddings or pictures, and which samples of them
sampling    solver, steps, guidance, seed, precision
output      tokens or one vector a sample, with metrics or without
noted       what may be another in a continued generation: it changes last bits only
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip3o_dit import __version__
from blip3o_dit.data.embeddings import Embeddings
from blip3o_dit.flow.solvers import ADAPTIVE_SOLVER, SOLVERS
from blip3o_dit.model.config import CONFIG_FILE, BLIP3oDiTConfig
from blip3o_dit.model.loading import variant_of, weights_files
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.utils.checksums import digests_of
from blip3o_dit.utils.json_files import short_repr
from blip3o_dit.utils.stateless_random import DRAWS_VERSION, stateless_permutation
from blip3o_dit.utils.validation import check_name, checked_integer

SPLITS = ("all", "train", "eval")

NOTED = "noted"
# What is said of a digest, by its name and by what it is of.
_DIGESTS = ("sha256", "chosen")
# In requests of earlier versions.
_NOT_SAID = {"sampling.noise_scale": 1.0}
_OTHERS = {"data": "other data", "fitted": "other data to fit on", "code": "another version of the code"}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How samples are taken: arguments of `BLIP3oDiTModel.generate`, with its defaults."""

    num_inference_steps: int | None = None
    solver: str | None = None
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    noise_scale: float | None = None
    seed: int = 0

    def resolved(self, config: BLIP3oDiTConfig) -> Sampling:
        """With the solver, the steps and the scale of the noise that this model takes by default."""
        solver, steps = self.solver or config.default_solver, self.num_inference_steps
        if steps is None and solver != ADAPTIVE_SOLVER:
            steps = config.default_steps
        scale = config.flow.noise_scale if self.noise_scale is None else self.noise_scale
        return replace(self, solver=solver, num_inference_steps=steps, noise_scale=scale)

    def calls(self, config: BLIP3oDiTConfig) -> int | None:
        """Network calls that a sample takes; None where the solver chooses them."""
        here = self.resolved(config)
        if here.solver not in SOLVERS or here.num_inference_steps is None:
            return None
        return here.num_inference_steps * SOLVERS[here.solver].calls_per_step


def choose_indices(
    model: Path, source: Embeddings, split: str = "all", num_samples: int | None = None
) -> list[int]:
    """Indices, ascending, of one side of the split that the training run at `model` made.

    `num_samples` of them are those that a fixed permutation puts first: neighbours in a store are often
    alike. The seed of the noise has no part in it: other seeds give the same samples other noise.
    """
    check_name("split", split, SPLITS)
    if num_samples is not None:
        num_samples = checked_integer("num_samples", num_samples, low=1)
    chosen: np.ndarray
    if split == "all":
        chosen = np.arange(source.num_samples)
    else:
        sides = TrainingConfig.from_folder(model).split(source)
        chosen = sides.train if split == "train" else sides.eval
    if not len(chosen):
        raise ValueError(
            f"{source.path}: expected samples in the {split} split, found none "
            "(the model was trained with eval_split 0)"
        )
    if num_samples is not None:
        order = stateless_permutation(len(chosen), seed=0, stream="chosen samples")
        chosen = np.sort(chosen[order[:num_samples]])
    return chosen.tolist()


def describe_model(folder: Path, weights: str) -> dict[str, Any]:
    """`weights` are "ema" or "raw"."""
    files = weights_files(folder, variant_of(weights))
    names = [CONFIG_FILE, *(file.name for file in files)]
    return {"weights": weights, "sha256": _digest(sorted(digests_of(folder, names).items()))}


def describe_data(source: Embeddings, indices: Sequence[int], **choice: Any) -> dict[str, Any]:
    """Embeddings and the samples of them that are generated; `choice` says how these were chosen."""
    own = getattr(source, "fingerprint", None)
    chosen = hashlib.sha256(np.asarray(indices, dtype=np.int64).tobytes()).hexdigest()
    sha256 = own() if callable(own) else str(source.path.resolve())
    return {"sha256": sha256, **choice, "samples": len(indices), "chosen": chosen}


def describe_request(
    model: dict[str, Any],
    data: dict[str, Any],
    sampling: Sampling,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int,
    quantize: str | None = None,
    **output: Any,
) -> dict[str, Any]:
    """All of it, as JSON gives it back. `sampling` is resolved."""
    request = {
        "version": __version__,
        "draws": DRAWS_VERSION,
        "model": model,
        "data": data,
        "sampling": asdict(sampling) | {"dtype": str(dtype).removeprefix("torch."), "quantize": quantize},
        "output": output,
        NOTED: {"batch_size": batch_size, "device": device.type},
    }
    found: dict[str, Any] = json.loads(json.dumps(request))
    return found


def differences(found: Any, wanted: dict[str, Any], *, leave_out: Sequence[str] = (NOTED,)) -> list[str]:
    """What is another there, in words."""
    there, here = _NOT_SAID | _flat(found), _flat(wanted)
    names = [name for name in here if there.get(name) != here[name]]
    names = [name for name in names if name.partition(".")[0] not in leave_out]
    digests = [name for name in names if name.rpartition(".")[2] in _DIGESTS]
    shown = [name for name in names if name not in digests]
    if shown:  # it says more than a digest does
        digests = [name for name in digests if name.startswith("model")]
    return [_difference(name, there, here) for name in (*shown, *digests)]


def _difference(name: str, there: dict[str, Any], here: dict[str, Any]) -> str:
    of, last = name.partition(".")[0], name.rpartition(".")[2]
    if last in _DIGESTS:
        return "other samples" if last == "chosen" else _OTHERS.get(of, "another model")
    return f"{last} is {short_repr(there.get(name))} there, {short_repr(here[name])} here"


def noted_changes(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """In the same words, what changes last bits only."""
    return differences({"x": found.get(NOTED)}, {"x": wanted[NOTED]})


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, its names joined by dots."""
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.")
    return found


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
