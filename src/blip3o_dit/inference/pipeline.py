"""BLIP3oInference: a trained model, ready to generate and to be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.dataset import choose_samples
from blip3o_dit.data.embeddings import Embeddings, batches, check_sizes, open_embeddings
from blip3o_dit.data.statistics import ChannelStatistics, streamed_statistics
from blip3o_dit.flow.loss import BLIP3oFlowMatchingLoss
from blip3o_dit.inference.from_dataset import DatasetGeneration, check_apart
from blip3o_dit.inference.output import is_file_output
from blip3o_dit.inference.progress import SampleBar
from blip3o_dit.inference.request import (
    Sampling,
    choose_indices,
    describe_data,
    describe_model,
    describe_request,
)
from blip3o_dit.metrics.fidelity import FidelitySums
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.layers import has_native_matmul
from blip3o_dit.model.loading import pick_weights, variant_of
from blip3o_dit.model.quantization import check_quantize
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.utils.distributed import Processes, join_processes, pick_device
from blip3o_dit.utils.hub import model_folder
from blip3o_dit.utils.progress import working
from blip3o_dit.utils.stateless_random import stateless_normal, stateless_uniform
from blip3o_dit.utils.validation import checked_integer

# Most samples that the targets' mean and deviation are measured on, as in training by default.
STATISTICS_SAMPLES = TrainingConfig.statistics_samples


class BLIP3oInference:
    """A trained model from an output folder or a checkpoint.

    Under a launcher (torchrun, accelerate launch) `generate_from_dataset` and `evaluate_model` share their
    batches out over its processes, all of which must call them; the results are those of one process.

    Args:
        model_path: folder with `config.json` and `model.safetensors`, or `owner/name` on the hub (see
            `model_folder`).
        device: "auto" (a GPU when there is one), "cpu", "cuda", "cuda:1", ...
        dtype: of the weights; None takes bfloat16 where the processor multiplies it, float32 elsewhere. The
            network computes in it, or in float32 where it would be emulated; the solver's state is float32.
        weights: "auto" takes the averaged weights when the folder has them, "ema" insists on them,
            "raw" takes those of the last step.
        quantize: "int8" or "fp8" keeps the blocks' weights in one byte each (docs/generation.md).
        compile: `BLIP3oDiTModel.compile_for_generation`, for long generations on a CPU.
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
        quantize: str | None = None,
        compile: bool = False,
        alone: bool = False,
    ) -> None:
        self.model_path = model_folder(model_path, weights=weights)
        found_there = self.model_path != Path(model_path)
        self.name = str(model_path) if found_there else str(self.model_path.resolve())
        self.processes = Processes(device=pick_device(device)) if alone else join_processes(device)
        self.device = self.processes.device
        dtype, self.quantize = pick_dtype(dtype, self.device), quantize
        if quantize is not None:
            check_quantize(quantize, dtype, self.device)
        self.weights = pick_weights(self.model_path, weights)
        model: Any = BLIP3oDiTModel.load_for_inference(
            self.model_path,
            dtype=dtype,
            variant=variant_of(self.weights),
            quantize=quantize,
        )
        self.model: BLIP3oDiTModel = model.to(self.device)
        if compile:
            self.model.compile_for_generation()
        else:
            self.model.record_generation()

    def generate(
        self,
        eva_embeddings: Tensor | np.ndarray,
        num_inference_steps: int | None = None,
        *,
        solver: str | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        noise_scale: float | None = None,
        seed: int = 0,
        sample_index: Sequence[int] | None = None,
    ) -> Tensor:
        """CLIP tokens [B, N, 768] float32 on the CPU, for conditions [B, N, 1280].

        Conditions and results are in the units of the training data; see `BLIP3oDiTModel.generate`.
        """
        generated = self.model.generate(
            eva_embeddings,
            num_inference_steps=num_inference_steps,
            solver=solver,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            noise_scale=noise_scale,
            seed=seed,
            sample_index=sample_index,
        )
        return generated.cpu()

    def generate_from_dataset(
        self,
        dataset_path: str | Path | Embeddings,
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
        noise_scale: float | None = None,
        seed: int = 0,
        return_arrays: bool | None = None,
        pooled: bool = False,
        overwrite: bool = False,
        progress: bool = True,
    ) -> dict[str, Any]:
        """Generate for the samples of a store or pickle.

        Args:
            dataset_path: where they are, or embeddings that are open already.
            num_samples: only so many of the split; see `choose`. None means all.
            output_path: a name ending in .pkl, .pickle or .npz is written as a file of plain arrays, anything
                else as an embedding store whose `clip` tokens are the generated ones. A store is written
                shard by shard, in memory that does not grow with the number of samples; each of several
                processes writes shards of its own.
            compute_metrics: compare with the true tokens (`FidelitySums`).
            num_inference_steps, solver and the rest: see `BLIP3oDiTModel.generate`.
            return_arrays: return tokens, keys and captions; None does unless a store is written, and for a
                file they are returned in any case.
            pooled: one vector a sample, the mean over its tokens, instead of tokens; into a file.
            overwrite: replace an output of the same kind. Without it nothing is sampled when there is one.

        Returns: `config` and `generation_metrics` (a dict or None), and with arrays
            `generated_clip_embeddings` [n, N, C], `eva_embeddings` and `target_clip_embeddings`, float32,
            `keys` and `captions`; pooled, `pooled_clip_embeddings` [n, C] in place of the tokens. Of several
            processes the first returns this; the others return an empty dict.

        Raises:
            FileNotFoundError, ValueError: one line naming what was expected and found.
        """
        source, output = self.open(dataset_path), None if output_path is None else Path(output_path)
        check_apart(output, source)
        indices = self.choose(source, split, num_samples)
        sampling = Sampling(
            num_inference_steps=num_inference_steps,
            solver=solver,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            noise_scale=noise_scale,
            seed=checked_integer("seed", seed),
        )
        data = describe_data(source, indices, split=split, num_samples=num_samples) if output else {}
        how: dict[str, Any] = {
            "batch_size": checked_integer("batch_size", batch_size, low=1),
            "pooled": pooled,
        }
        job = DatasetGeneration(
            inference=self,
            source=source,
            indices=indices,
            output=output,
            request=self.request(data, sampling, metrics=compute_metrics, **how) if output else {},
            generate=lambda eva, batch: self.generate(eva, sample_index=batch, **asdict(sampling)),
            sums=FidelitySums(self._target_mean(source, split)) if compute_metrics else None,
            overwrite=overwrite,
            keep=output is None or is_file_output(output) if return_arrays is None else return_arrays,
            **how,
        )
        about = self.describe_sampling(sampling) | {"split": split, "num_samples": len(indices)}
        return job.run(about, lambda: self.sample_bar(len(indices), sampling, progress))

    def describe_sampling(self, sampling: Sampling) -> dict[str, Any]:
        """How samples are taken, for the record beside them."""
        taken = asdict(sampling.resolved(self.model.config))
        steps = taken.pop("num_inference_steps")
        return {
            "model_path": str(self.model_path),
            "weights": self.weights,
            **{name: taken[name] for name in ("solver", "guidance_scale", "guidance_interval", "seed")},
            "noise_scale": taken["noise_scale"],
            "num_inference_steps": steps,
            "normalize_embeddings": self.model.config.normalize_embeddings,
        }

    def request(self, data: dict[str, Any], sampling: Sampling, **how: Any) -> dict[str, Any]:
        """What tells a generation by this model from others; see `describe_request`."""
        return describe_request(
            describe_model(self.model_path, self.weights),
            data,
            sampling.resolved(self.model.config),
            dtype=self.model.dtype,
            quantize=self.quantize,
            device=self.device,
            **how,
        )

    @torch.no_grad()
    def evaluate_model(
        self,
        dataset_path: str | Path | Embeddings,
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

        Returns: `flow_matching_loss`, `num_samples` and the metrics of `FidelitySums`; for the samples see
            `choose`.

        Raises:
            FileNotFoundError, ValueError: one line naming what was expected and found.
        """
        batch_size, seed = checked_integer("batch_size", batch_size, low=1), checked_integer("seed", seed)
        source = self.open(dataset_path)
        indices = self.choose(source, split, num_samples)
        loss_fn = BLIP3oFlowMatchingLoss.from_config(self.model.config.flow)
        sums, total = FidelitySums(self._target_mean(source, split)), 0.0
        sampling: dict[str, Any] = {"solver": solver, "guidance_scale": guidance_scale, "seed": seed}

        def work(piece: Sequence[int]) -> tuple[float, Tensor]:
            eva, clip = source.fetch(piece)
            noise = stateless_normal(
                piece, clip.shape[1:], seed=seed, stream="evaluation noise", device=self.device
            )
            u_time = stateless_uniform(piece, seed=seed, stream="evaluation time")
            flow = self.model.flow_batch(eva, clip, noise, u_time)
            loss = float(loss_fn(flow.predict(self.model), flow.sample).flow_matching_loss)
            generated = self.generate(eva, num_inference_steps, sample_index=piece, **sampling)
            return loss, sums.of(generated, self.model.l2_normalize_if_configured(clip))

        shown = progress and self.processes.is_main
        with working("measuring", len(indices), "sample", lasting=False, shown=shown) as count:
            for piece, (loss, added) in self.processes.map_in_order(batches(indices, batch_size), work):
                total += len(piece) * loss
                sums.state += added
                count(len(piece))
        total, sums.state = self.processes.broadcast((total, sums.state))
        return {
            "flow_matching_loss": total / len(indices),
            "num_samples": float(len(indices)),
            **sums.result(),
        }

    def _target_mean(self, source: Embeddings, split: str) -> Tensor:
        """Mean of the training targets per channel, [C], which R2 is about: the model's own; for a model
        without statistics that of `source`, of its training side if `split` is one of the sides."""
        if self.model.has_statistics:
            return self.model.target_mean
        found = None
        if self.processes.is_main:
            train = np.asarray(self.choose(source, "all" if split == "all" else "train", None))
            normalize = self.model.config.normalize_embeddings
            found = target_statistics(source, train, normalize=normalize).mean
        return self.processes.broadcast(found)

    def sample_bar(self, total: int, sampling: Sampling, progress: bool) -> SampleBar:
        """For a generation to the end: with a line that says how long it will take."""
        shown = progress and self.processes.is_main
        calls = sampling.calls(self.model.config)
        return SampleBar(total, calls, processes=self.processes.count, shown=shown)

    def open(self, path: str | Path | Embeddings) -> Embeddings:
        """Embeddings at `path`, or open already, refused (ValueError) unless they have the model's sizes."""
        source = open_embeddings(path) if isinstance(path, str | Path) else path
        check_sizes(source, self.model.config.data_sizes, self.model_path)
        return source

    def choose(self, source: Embeddings, split: str, num_samples: int | None) -> list[int]:
        """See `choose_indices`."""
        return choose_indices(self.model_path, source, split, num_samples)


def pick_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """Of the weights: as asked for, else bfloat16 where the device multiplies it."""
    if dtype is not None:
        return dtype
    return torch.bfloat16 if has_native_matmul(torch.bfloat16, device) else torch.float32


def target_statistics(
    source: Embeddings, train: np.ndarray, *, normalize: bool = False, seed: int = 0
) -> ChannelStatistics:
    """Mean and deviation of the targets (with `normalize`, L2-normalised) over these samples, at most
    `STATISTICS_SAMPLES`, chosen by the seed."""
    chosen = choose_samples(train, max_samples=STATISTICS_SAMPLES, seed=seed)
    return streamed_statistics(source, chosen, normalize=normalize)[1]
