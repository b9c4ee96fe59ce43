"""BLIP3oInference: a trained model, ready to generate and to be measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from blip3o_dit.config import TrainingConfig, check_name
from blip3o_dit.data.dataset import split_samples
from blip3o_dit.data.source import check_sizes, open_embeddings
from blip3o_dit.data.store import EmbeddingSource, StoreWriter, batches, dump_atomically
from blip3o_dit.distributed import Processes, join_processes, pick_device
from blip3o_dit.evaluation.metrics import FidelitySums
from blip3o_dit.flow.loss import BLIP3oFlowMatchingLoss
from blip3o_dit.flow.solvers import ADAPTIVE_SOLVER
from blip3o_dit.flow.times import training_times
from blip3o_dit.model.blip3o_dit import EMA_VARIANT, BLIP3oDiTModel, pick_weights
from blip3o_dit.model.precision import multiplies
from blip3o_dit.randomness import named_normal, named_uniform

SPLITS = ("all", "train", "eval")

Found = TypeVar("Found")


class BLIP3oInference:
    """A trained model from an output folder or a checkpoint.

    Under a launcher (torchrun, accelerate launch) `generate_from_dataset` and `evaluate_model` share their
    batches out over its processes, all of which must call them; the results are those of one process.

    Args:
        model_path: folder with `config.json` and `model.safetensors`.
        device: "auto" (a GPU when there is one), "cpu", "cuda", "cuda:1", ...
        dtype: of the weights; None takes bfloat16 where the processor multiplies it, float32 elsewhere. The
            network computes in it, or in float32 where it would be emulated; the solver's state is float32.
        weights: "auto" takes the averaged weights when the folder has them, "ema" insists on them,
            "raw" takes those of the last step.
        compile: `BLIP3oDiTModel.compile_for_generation`, worth its minute for long generations.
        alone: work alone also under a launcher.

    Raises:
        FileNotFoundError, ValueError: one line: no model there, weights that do not fit, no such device.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        weights: str = "auto",
        compile: bool = False,
        alone: bool = False,
    ) -> None:
        self.model_path = Path(model_path)
        self.processes = Processes(device=pick_device(device)) if alone else join_processes(device)
        self.device = self.processes.device
        self.weights = pick_weights(self.model_path, weights)
        if dtype is None:
            dtype = torch.bfloat16 if multiplies(torch.bfloat16, self.device) else torch.float32
        model: Any = BLIP3oDiTModel.read(
            self.model_path, dtype=dtype, variant=EMA_VARIANT if self.weights == "ema" else None
        )
        self.model: BLIP3oDiTModel = model.to(self.device)
        if compile:
            self.model.compile_for_generation()

    def generate(
        self,
        eva_embeddings: Tensor | np.ndarray,
        num_inference_steps: int | None = None,
        *,
        solver: str | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        sample_index: Sequence[int] | None = None,
    ) -> Tensor:
        """CLIP tokens [B, N, 768] float32 on the CPU, for conditions [B, N, 1280].

        Conditions and results are in the units of the training data; see `BLIP3oDiTModel.generate`.
        """
        generated = self.model.generate(
            torch.as_tensor(eva_embeddings),
            num_inference_steps=num_inference_steps,
            solver=solver,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            seed=seed,
            sample_index=sample_index,
        )
        return generated.cpu()

    def generate_from_dataset(
        self,
        dataset_path: str | Path,
        num_samples: int | None = None,
        batch_size: int = 8,
        num_inference_steps: int | None = None,
        output_path: str | Path | None = None,
        compute_metrics: bool = True,
        *,
        split: str = "all",
        solver: str | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        progress: bool = True,
    ) -> dict[str, Any]:
        """Generate for the samples of a store or pickle.

        Args:
            num_samples: only the first so many of the split; None means all.
            output_path: a name ending in .pkl or .pickle is written as a pickle of plain arrays, anything
                else as an embedding store whose `clip` tokens are the generated ones.
            compute_metrics: compare with the true tokens (`evaluation.metrics.FidelitySums`).
            split: "all", or the side of the training run's own split.
            num_inference_steps, solver: None means what the model was saved with; for these and the rest
                see `BLIP3oDiTModel.generate`.

        Returns: `generated_clip_embeddings` [n, N, C] and `eva_embeddings`, `target_clip_embeddings`
            (float32 arrays), `keys`, `captions`, `config`, and `generation_metrics` (a dict or None). Of
            several processes the first returns this and writes; the others return an empty dict.

        Raises:
            FileNotFoundError, ValueError: one line naming what was expected and found.
        """
        source = self.open(dataset_path)
        indices = self.choose(source, split, num_samples)
        if output_path is not None and self.processes.is_first:
            check_writable(Path(output_path))
        sums = FidelitySums(self.model.target_mean)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        sampling: dict[str, Any] = {
            "solver": solver,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "seed": seed,
        }

        def work(piece: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
            eva, clip = source.fetch(piece)
            return self.generate(eva, num_inference_steps, sample_index=piece, **sampling), eva, clip

        for _, found in self._in_batches(indices, batch_size, work, progress):
            generated, _, clip = found
            if compute_metrics:
                sums.add(generated, self.model.as_trained_on(clip))
            parts.append(found)
        if not self.processes.is_first:
            return {}
        arrays = [torch.cat(column).numpy() for column in zip(*parts, strict=True)]
        records = source.records(indices)
        results = {
            "generated_clip_embeddings": arrays[0],
            "eva_embeddings": arrays[1],
            "target_clip_embeddings": arrays[2],
            "keys": [record["key"] for record in records],
            "captions": [record.get("caption") for record in records],
            "config": {
                "model_path": str(self.model_path),
                "weights": self.weights,
                **sampling,
                **self._steps(solver, num_inference_steps),
                "split": split,
                "normalize_embeddings": self.model.config.normalize_embeddings,
            },
            "generation_metrics": sums.result() if compute_metrics else None,
        }
        if output_path is not None:
            write_results(results, records, Path(output_path))
        return results

    @torch.no_grad()
    def evaluate_model(
        self,
        dataset_path: str | Path,
        batch_size: int = 32,
        split: str = "eval",
        *,
        num_samples: int | None = None,
        num_inference_steps: int | None = None,
        solver: str | None = None,
        guidance_scale: float = 1.0,
        seed: int = 0,
        progress: bool = True,
    ) -> dict[str, float]:
        """The flow matching loss and the fidelity of generated tokens, on one side of the split.

        Returns: `flow_matching_loss`, `num_samples` and the metrics of `FidelitySums`.

        Raises:
            FileNotFoundError, ValueError: one line naming what was expected and found.
        """
        source = self.open(dataset_path)
        indices = self.choose(source, split, num_samples)
        loss_fn = BLIP3oFlowMatchingLoss.from_config(self.model.config.flow)
        sums, total = FidelitySums(self.model.target_mean), 0.0
        sampling: dict[str, Any] = {"solver": solver, "guidance_scale": guidance_scale, "seed": seed}

        def work(piece: Sequence[int]) -> tuple[float, Tensor, Tensor]:
            eva, clip = source.fetch(piece)
            loss = self._loss(loss_fn, eva, clip, piece, seed)
            return loss, self.generate(eva, num_inference_steps, sample_index=piece, **sampling), clip

        for piece, (loss, generated, clip) in self._in_batches(indices, batch_size, work, progress):
            total += len(piece) * loss
            sums.add(generated, self.model.as_trained_on(clip))
        total, sums.state = self.processes.from_first((total, sums.state))
        return {
            "flow_matching_loss": total / len(indices),
            "num_samples": float(len(indices)),
            **sums.result(),
        }

    def _steps(self, solver: str | None, num_inference_steps: int | None) -> dict[str, Any]:
        """Solver and steps as they were taken, for the record."""
        solver = solver or self.model.config.default_solver
        if num_inference_steps is None and solver != ADAPTIVE_SOLVER:
            num_inference_steps = self.model.config.default_steps
        return {"solver": solver, "num_inference_steps": num_inference_steps}

    def _in_batches(
        self, indices: list[int], batch_size: int, work: Callable[[Sequence[int]], Found], progress: bool
    ) -> Iterator[tuple[Sequence[int], Found]]:
        """(indices, work(indices)) of one batch after the other, on the first process."""
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
        hidden = not progress or not self.processes.is_first
        with tqdm(total=len(indices), desc="generating", unit="sample", disable=hidden) as bar:
            for piece, found in self.processes.in_order(batches(indices, batch_size), work):
                yield piece, found
                bar.update(len(piece))

    def _loss(
        self,
        loss_fn: BLIP3oFlowMatchingLoss,
        eva: Tensor,
        clip: Tensor,
        indices: Sequence[int],
        seed: int,
    ) -> float:
        condition = self.model.normalize_condition(eva.to(self.device))
        source = self.model.source_of(condition)
        x_1 = source.to_flow(self.model.normalize_target(clip.to(self.device)))
        noise = named_normal(indices, x_1.shape[1:], seed=seed, stream="evaluation noise")
        t = training_times(
            named_uniform(indices, seed=seed, stream="evaluation time"), self.model.config.flow
        )
        sample = loss_fn.sample_path(x_1, noise.to(self.device), t.to(self.device))
        prediction = self.model(source.from_flow(sample.x_t), sample.t, condition, source.mean)
        return float(loss_fn(prediction, sample).flow_matching_loss)

    def open(self, path: str | Path) -> EmbeddingSource:
        """Embeddings at `path`, refused (ValueError) when their sizes are not the model's."""
        source = open_embeddings(path)
        check_sizes(source, self.model.config.data_sizes, self.model_path)
        return source

    def choose(self, source: EmbeddingSource, split: str, num_samples: int | None) -> list[int]:
        """Indices of one side of the split that the training run made, the first `num_samples`."""
        check_name("split", split, SPLITS)
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, found {num_samples}")
        chosen: np.ndarray
        if split == "all":
            chosen = np.arange(source.num_samples)
        else:
            config = TrainingConfig.from_folder(self.model_path)
            sides = split_samples(
                source, eval_split=config.eval_split, seed=config.seed, split_by=config.split_by
            )
            chosen = sides.train if split == "train" else sides.eval
        if not len(chosen):
            raise ValueError(
                f"{source.path}: expected samples in the {split} split, found none "
                "(the model was trained with eval_split 0)"
            )
        return chosen[:num_samples].tolist()


def write_results(results: dict[str, Any], records: list[dict[str, Any]], path: Path) -> None:
    """A pickle of plain arrays (.pkl, .pickle), or an embedding store with the generated tokens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".pkl", ".pickle"):
        dump_atomically(path, results)
        return
    eva = torch.from_numpy(results["eva_embeddings"])
    generated = torch.from_numpy(results["generated_clip_embeddings"])
    writer = StoreWriter(
        path,
        num_tokens=generated.shape[1],
        condition_dim=eva.shape[2],
        target_dim=generated.shape[2],
        dtype="float32",
        encoders={"clip": {"generated_by": results["config"]}},
    )
    with writer:
        writer.append(eva, generated, records)


def check_writable(path: Path) -> None:
    """Before hours of sampling, not after them."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: expected a file or folder to write, found a device")
    existing = path.parent
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: expected a folder that can be written, found {existing}")
