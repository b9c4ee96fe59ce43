"""BLIP3oInference: a trained model, ready to generate and to be measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from blip3o_dit.data.dataset import choose_samples
from blip3o_dit.data.embeddings import Embeddings, batches, check_sizes, open_embeddings
from blip3o_dit.data.statistics import ChannelStatistics, streamed_statistics
from blip3o_dit.flow.loss import BLIP3oFlowMatchingLoss
from blip3o_dit.flow.solvers import ADAPTIVE_SOLVER
from blip3o_dit.inference.generated_store import GeneratedStore, PieceWork
from blip3o_dit.metrics.fidelity import FidelitySums
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.layers import has_native_matmul
from blip3o_dit.model.loading import EMA_VARIANT, pick_weights
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.utils.atomic import dump_atomically
from blip3o_dit.utils.distributed import Processes, join_processes, pick_device
from blip3o_dit.utils.stateless_random import stateless_normal, stateless_permutation, stateless_uniform
from blip3o_dit.utils.validation import check_name

SPLITS = ("all", "train", "eval")

# Most samples that the targets' mean and deviation are measured on, as in training by default.
STATISTICS_SAMPLES = TrainingConfig.statistics_samples


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
            dtype = torch.bfloat16 if has_native_matmul(torch.bfloat16, self.device) else torch.float32
        model: Any = BLIP3oDiTModel.load_for_inference(
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
        return_arrays: bool | None = None,
        progress: bool = True,
    ) -> dict[str, Any]:
        """Generate for the samples of a store or pickle.

        Args:
            num_samples, split: see `choose`.
            output_path: a name ending in .pkl or .pickle is written as a pickle of plain arrays, anything
                else as an embedding store whose `clip` tokens are the generated ones. A store is written
                shard by shard, in memory that does not grow with the number of samples; each of several
                processes writes shards of its own.
            compute_metrics: compare with the true tokens (`FidelitySums`).
            num_inference_steps, solver and the rest: see `BLIP3oDiTModel.generate`.
            return_arrays: return tokens, keys and captions; None does unless a store is written, and for a
                pickle they are returned in any case.

        Returns: `config` and `generation_metrics` (a dict or None), and with arrays
            `generated_clip_embeddings` [n, N, C], `eva_embeddings` and `target_clip_embeddings`, float32,
            `keys` and `captions`. Of several processes the first returns this; the others return an empty
            dict.

        Raises:
            FileNotFoundError, ValueError: one line naming what was expected and found.
        """
        _check_batch_size(batch_size)
        source = self.open(dataset_path)
        indices = self.choose(source, split, num_samples)
        output = None if output_path is None else Path(output_path)
        store = self._store_to_write(output)
        sampling: dict[str, Any] = {
            "solver": solver,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "seed": seed,
        }
        sums = FidelitySums(self._target_mean(source, split)) if compute_metrics else None
        size, to_pickle = batch_size, output is not None and store is None
        if store is not None:
            size = store.shard_size(len(indices), batch_size=batch_size, processes=self.processes.count)

        def generate(eva: Tensor, batch: Sequence[int]) -> Tensor:
            return self.generate(eva, num_inference_steps, sample_index=batch, **sampling)

        def measure(generated: Tensor, clip: Tensor) -> Tensor | None:
            return None if sums is None else sums.of(generated, self.model.l2_normalize_if_configured(clip))

        with self._bar(len(indices), progress) as bar:
            work = PieceWork(
                source,
                indices,
                batch_size=batch_size,
                size=size,
                generate=generate,
                measure=measure,
                store=store,
                keep=to_pickle or (store is None if return_arrays is None else return_arrays),
                advance=bar.update,
            )
            tokens, entries = self._collect(work, sums, bar)
        if not self.processes.is_main:
            return {}
        results: dict[str, Any] = {}
        if work.keep:
            results = {"generated_clip_embeddings": tokens, **_everything_of(source, indices)}
        results["config"] = {
            "model_path": str(self.model_path),
            "weights": self.weights,
            **sampling,
            **self._steps(solver, num_inference_steps),
            "split": split,
            "num_samples": len(indices),
            "normalize_embeddings": self.model.config.normalize_embeddings,
        }
        results["generation_metrics"] = None if sums is None else sums.result()
        if store is not None:
            store.finish(entries, results["config"])
        elif output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            dump_atomically(output, results)
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

        Returns: `flow_matching_loss`, `num_samples` and the metrics of `FidelitySums`; for the samples see
            `choose`.

        Raises:
            FileNotFoundError, ValueError: one line naming what was expected and found.
        """
        _check_batch_size(batch_size)
        source = self.open(dataset_path)
        indices = self.choose(source, split, num_samples)
        loss_fn = BLIP3oFlowMatchingLoss.from_config(self.model.config.flow)
        sums, total = FidelitySums(self._target_mean(source, split)), 0.0
        sampling: dict[str, Any] = {"solver": solver, "guidance_scale": guidance_scale, "seed": seed}

        def work(piece: Sequence[int]) -> tuple[float, Tensor]:
            eva, clip = source.fetch(piece)
            noise = stateless_normal(piece, clip.shape[1:], seed=seed, stream="evaluation noise")
            u_time = stateless_uniform(piece, seed=seed, stream="evaluation time")
            flow = self.model.flow_batch(eva, clip, noise, u_time)
            loss = float(loss_fn(flow.predict(self.model), flow.sample).flow_matching_loss)
            generated = self.generate(eva, num_inference_steps, sample_index=piece, **sampling)
            return loss, sums.of(generated, self.model.l2_normalize_if_configured(clip))

        with self._bar(len(indices), progress) as bar:
            for piece, (loss, added) in self.processes.map_in_order(batches(indices, batch_size), work):
                total += len(piece) * loss
                sums.state += added
                bar.update(len(piece))
        total, sums.state = self.processes.broadcast((total, sums.state))
        return {
            "flow_matching_loss": total / len(indices),
            "num_samples": float(len(indices)),
            **sums.result(),
        }

    def _collect(
        self, work: PieceWork, sums: FidelitySums | None, bar: tqdm
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """The tokens that are kept, [n, N, C], and the entries of the shards; on the first process."""
        source, count = work.source, len(work.indices)
        kept = work.keep and self.processes.is_main
        tokens = np.empty((count if kept else 0, source.num_tokens, source.target_dim), dtype=np.float32)
        entries = []
        pieces = batches(range(count), work.size)
        for number, (piece, found) in enumerate(self.processes.map_in_order(pieces, work)):
            if found.entry is not None:
                entries.append(found.entry)
            for added in found.added:
                assert sums is not None
                sums.state += added
            if found.tokens is not None:
                tokens[piece.start : piece.stop] = found.tokens.numpy()
            if number % self.processes.count:  # another process's, which does not show on this one's bar
                bar.update(len(piece))
        return tokens, entries

    def _store_to_write(self, output: Path | None) -> GeneratedStore | None:
        """The store that `output` names, claimed by the first process; None for a pickle or no output."""
        if output is None:
            return None
        is_pickle = output.suffix in (".pkl", ".pickle")
        store = None if is_pickle else GeneratedStore(output, self.model.config.data_sizes)
        if self.processes.is_main:
            check_writable(output)
            if store is not None:
                store.claim()
        self.processes.barrier()
        return store

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

    def _steps(self, solver: str | None, num_inference_steps: int | None) -> dict[str, Any]:
        """Solver and steps as they were taken, for the record."""
        solver = solver or self.model.config.default_solver
        if num_inference_steps is None and solver != ADAPTIVE_SOLVER:
            num_inference_steps = self.model.config.default_steps
        return {"solver": solver, "num_inference_steps": num_inference_steps}

    def _bar(self, total: int, progress: bool) -> tqdm:
        hidden = not progress or not self.processes.is_main
        return tqdm(total=total, desc="generating", unit="sample", disable=hidden)

    def open(self, path: str | Path) -> Embeddings:
        """Embeddings at `path`, refused (ValueError) when their sizes are not the model's."""
        source = open_embeddings(path)
        check_sizes(source, self.model.config.data_sizes, self.model_path)
        return source

    def choose(self, source: Embeddings, split: str, num_samples: int | None) -> list[int]:
        """Indices, ascending, of one side of the split that the training run made.

        `num_samples` of them are those that a fixed permutation puts first: neighbours in a store are often
        alike. The seed of the noise has no part in it: other seeds give the same samples other noise.
        """
        check_name("split", split, SPLITS)
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, found {num_samples}")
        chosen: np.ndarray
        if split == "all":
            chosen = np.arange(source.num_samples)
        else:
            sides = TrainingConfig.from_folder(self.model_path).split(source)
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


def target_statistics(
    source: Embeddings, train: np.ndarray, *, normalize: bool = False, seed: int = 0
) -> ChannelStatistics:
    """Mean and deviation of the targets (with `normalize`, L2-normalised) over these samples, at most
    `STATISTICS_SAMPLES`, chosen by the seed."""
    chosen = choose_samples(train, max_samples=STATISTICS_SAMPLES, seed=seed)
    return streamed_statistics(source, chosen, normalize=normalize)[1]


def _everything_of(source: Embeddings, indices: Sequence[int]) -> dict[str, Any]:
    """Tokens, keys and captions of these samples, in memory once."""
    shape = (len(indices), source.num_tokens)
    eva = np.empty((*shape, source.condition_dim), dtype=np.float32)
    clip = np.empty((*shape, source.target_dim), dtype=np.float32)
    for rows in batches(range(len(indices)), 256):
        fetched = source.fetch(indices[rows.start : rows.stop])
        eva[rows.start : rows.stop], clip[rows.start : rows.stop] = (side.numpy() for side in fetched)
    records = source.records(indices)
    return {
        "eva_embeddings": eva,
        "target_clip_embeddings": clip,
        "keys": [record["key"] for record in records],
        "captions": [record.get("caption") for record in records],
    }


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")


def check_writable(path: Path) -> None:
    """Before hours of sampling, not after them."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: expected a file or folder to write, found a device")
    existing = path.parent
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: expected a folder that can be written, found {existing}")
