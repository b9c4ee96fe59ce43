"""A trained model as one file that runs without this package: torch.export's .pt2, or ONNX.

Inside are the conditions' normalisation, the source, every network call of the solver and the way back to the
units of the data. Outside stays the noise: numbers of a generator cannot be the same in every runtime.

What is traced are the plain layers (`transformer.py`), with the loop over the steps unrolled.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from blip3o_dit import __version__
from blip3o_dit.flow.solvers import SOLVERS
from blip3o_dit.inference.output import check_file, check_writable
from blip3o_dit.inference.request import describe_model
from blip3o_dit.model.blip3o_dit import GENERATION_STREAM, BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.model.cpu_kernels import make_plain
from blip3o_dit.model.generation import Guidance, checked_sampling, tokens_from_noise
from blip3o_dit.model.loading import find_weights, pick_weights, variant_of
from blip3o_dit.model.quantization import is_quantized
from blip3o_dit.utils.atomic import files_aside
from blip3o_dit.utils.hub import model_folder
from blip3o_dit.utils.progress import working
from blip3o_dit.utils.stateless_random import DRAWS_VERSION
from blip3o_dit.utils.validation import check_name, package_missing

PT2, ONNX = ".pt2", ".onnx"
INPUTS, OUTPUT = ("condition", "noise"), "tokens"

# What the file says of itself, as JSON: an extra file of .pt2, an entry of ONNX's metadata_props.
METADATA, METADATA_FILE = "blip3o_dit", "blip3o_dit.json"

OPSET = 18
# A protobuf message ends at 2 GiB: larger weights go into a file beside, FILE.data.
MAX_BYTES_INSIDE = 3 * 2**29


def export_model(
    model_path: str | Path,
    path: str | Path,
    *,
    weights: str = "auto",
    num_inference_steps: int | None = None,
    solver: str | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a model folder as the file that the ending of `path` says, .pt2 or .onnx, in float32.

    The file's inputs are `condition` [B, L, C_eva] in the units of the data and `noise` [B, N, C], N(0, 1);
    its output is `tokens` [B, N, C] in the units of the data. B is any number from 1. `generate`
    takes the noise `stateless_normal(sample_index, (N, C), seed=seed, stream=GENERATION_STREAM)`.

    Args:
        weights: "auto" takes the averaged ones when the folder has them, "ema" insists on them, "raw" takes
            those of the last step.
        num_inference_steps, solver, guidance_scale, guidance_interval: as `BLIP3oDiTModel.generate`, but for
            the solver that chooses its steps.

    Returns: what the file says of itself.

    Raises:
        FileNotFoundError, ValueError: one line: no model there, another ending, a file that is there, a
            package that is missing, sampling that does not fit the model.
    """
    path = Path(path)
    _check_target(path, overwrite)
    model_path = model_folder(model_path, weights=weights)
    find_weights(model_path, weights)
    config = BLIP3oDiTConfig.from_pretrained(model_path)
    solver, steps, guidance = checked_sampling(
        config, num_inference_steps, solver, guidance_scale, guidance_interval
    )
    check_name("solver", solver, tuple(SOLVERS))
    weights = pick_weights(model_path, weights)
    variant = variant_of(weights)
    model = BLIP3oDiTModel.load_for_inference(model_path, dtype=torch.float32, variant=variant)
    metadata = _metadata(config, solver, steps, guidance) | {"model": describe_model(model_path, weights)}
    with working("tracing the network's calls"):
        program = trace(model, solver, steps, guidance)
    path.parent.mkdir(parents=True, exist_ok=True)
    with working(f"writing {path.name}"):
        {PT2: _write_pt2, ONNX: _write_onnx}[path.suffix](program, metadata, path)
    return metadata


def trace(model: BLIP3oDiTModel, solver: str, steps: int, guidance: Guidance) -> ExportedProgram:
    """A generation by a model on the CPU as a graph, of (condition, noise) with any batch.

    The model loses its faster layers.

    Raises:
        ValueError: for quantised weights.
    """
    if is_quantized(model):
        raise ValueError("export: expected weights as they were trained, found quantised ones")
    config = model.config
    guided = guidance.in_steps(steps, config.flow.time_shift)
    sampler = _Sampler(model.requires_grad_(False), guidance.scale, guided, solver).eval()
    example = (
        torch.zeros(2, config.num_tokens, config.eva_embedding_size),
        torch.zeros(2, config.num_tokens, config.in_channels),
    )
    batch = {0: Dim("batch")}
    make_plain(model)
    with torch.no_grad():
        program = torch.export.export(sampler, example, dynamic_shapes=(batch, batch), strict=False)
    for node in program.graph.nodes:  # where this code lies on this machine is nobody's business
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    return program


class _Sampler(nn.Module):
    """`tokens_from_noise` as a module, with all that is no tensor settled."""

    def __init__(
        self, model: BLIP3oDiTModel, guidance_scale: float, guided: Sequence[bool], solver: str
    ) -> None:
        super().__init__()
        self.model = model
        self.settings = guidance_scale, guided, solver

    def forward(self, condition: Tensor, noise: Tensor) -> Tensor:
        scale = self.model.config.flow.noise_scale
        return tokens_from_noise(self.model, noise, condition, *self.settings, scale)


def _check_target(path: Path, overwrite: bool) -> None:
    if path.suffix not in (PT2, ONNX):
        raise ValueError(f"{path}: expected a name that ends in {PT2} or {ONNX}, found {path.suffix!r}")
    check_writable(path)
    check_file(path, overwrite)
    if path.suffix == ONNX:
        check_file(_data_file(path), overwrite)
        for package in ("onnx", "onnxscript"):
            if importlib.util.find_spec(package) is None:
                raise package_missing(f"{path}", package)


def _metadata(config: BLIP3oDiTConfig, solver: str, steps: int, guidance: Guidance) -> dict[str, Any]:
    tokens, condition, target = config.data_sizes
    return {
        "version": __version__,
        "sizes": {"num_tokens": tokens, "condition_dim": condition, "target_dim": target},
        "units": "those of the training data, condition and tokens"
        + (", whose tokens are of length 1" if config.normalize_embeddings else ""),
        "sampling": {
            "solver": solver,
            "num_inference_steps": steps,
            "guidance_scale": guidance.scale,
            "guidance_interval": [guidance.low, guidance.high],
        },
        "noise": {"distribution": "N(0, 1)", "stream": GENERATION_STREAM, "draws": DRAWS_VERSION},
    }


def _write_pt2(program: ExportedProgram, metadata: dict[str, Any], path: Path) -> None:
    with files_aside(path) as folder:
        torch.export.save(program, folder / path.name, extra_files={METADATA_FILE: json.dumps(metadata)})


def _write_onnx(program: ExportedProgram, metadata: dict[str, Any], path: Path) -> None:
    with _quiet_converter():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=[OUTPUT],
            optimize=False,  # the runtime does so when it reads the file; here it takes minutes
            verbose=False,
        )
    assert converted is not None
    converted.model.metadata_props[METADATA] = json.dumps(metadata)
    for node in converted.model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    with files_aside(path) as folder:
        converted.save(folder / path.name, external_data=size > MAX_BYTES_INSIDE)
        beside = (folder / _data_file(path).name).exists()
    if not beside:
        _data_file(path).unlink(missing_ok=True)  # of the larger model that this one replaced


@contextmanager
def _quiet_converter() -> Iterator[None]:
    """Without its words on packages that are not needed, and on parts of its own that will go."""
    chatter = logging.getLogger("torch.onnx")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.setLevel(level)


def _data_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")
