"""BLIP3oInference: a trained model, ready to generate and to be measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from blip3o_dit.data.dataset import choose_samples
from blip3o_dit.data.embeddings import Embeddings, batches, check_sizes, open_embeddings
from blip3o_dit.data.statistics import ChannelStatistics, streamed_statistics
from blip3o_dit.data.towers import towers_of
from blip3o_dit.flow.loss import BLIP3oFlowMatchingLoss
from blip3o_dit.flow.solvers import ADAPTIVE_SOLVER
from blip3o_dit.inference.generated_store import GeneratedStore, PieceWork
from blip3o_dit.inference.output import POOLED, TOKENS, check_output, is_file_output, write_arrays
from blip3o_dit.metrics.fidelity import FidelitySums
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.layers import has_native_matmul
from blip3o_dit.model.loading import EMA_VARIANT, pick_weights
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.utils.distributed import Processes, join_processes, pick_device
from blip3o_dit.utils.stateless_random import stateless_normal, stateless_permutation, stateless_uniform
from blip3o_dit.utils.validation import check_name, checked_integer

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
        batch_size, seed = checked_integer("batch_size", batch_size, low=1), checked_integer("seed", seed)
        source = self.open(dataset_path)
        indices = self.choose(source, split, num_samples)
        output = None if output_path is None else Path(output_path)
        store = None
        if output is not None and output.resolve() == source.path.resolve():
            raise ValueError(f"{output}: expected another place than that of the data, found the same")
        if output is not None and not is_file_output(output):
            store = GeneratedStore(output, self.model.config.data_sizes, encoder=_encoder_of(source))
        sampling: dict[str, Any] = {
            "solver": solver,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "seed": seed,
        }
        sums = FidelitySums(self._target_mean(source, split)) if compute_metrics else None
        size, to_file = batch_size, output is not None and store is None
        if store is not None:
            size = store.shard_size(len(indices), batch_size=batch_size, processes=self.processes.count)

        def generate(eva: Tensor, batch: Sequence[int]) -> Tensor:
            return self.generate(eva, num_inference_steps, sample_index=batch, **sampling)

        def measure(generated: Tensor, clip: Tensor) -> Tensor | None:
            return None if sums is None else sums.of(generated, self.model.l2_normalize_if_configured(clip))

        with self._claimed(output, store, overwrite, pooled), self.bar(len(indices), progress) as bar:
            work = PieceWork(
                source,
                indices,
                batch_size=batch_size,
                size=size,
                generate=generate,
                measure=measure,
                store=store,
                keep=to_file or (store is None if return_arrays is None else return_arrays),
                pooled=pooled,
                advance=bar.update,
            )
            tokens, entries = self._collect(work, sums, bar)
            if not self.processes.is_main:
                return {}
            results = _arrays(source, indices, tokens, pooled=pooled) if work.keep else {}
            results["config"] = self.describe_sampling(num_inference_steps, **sampling) | {
                "split": split,
                "num_samples": len(indices),
            }
            results["generation_metrics"] = None if sums is None else sums.result()
            if store is not None:
                store.finish(entries, results["config"])
            elif output is not None:
                write_arrays(output, results)
        return results

    def describe_sampling(self, num_inference_steps: int | None, **sampling: Any) -> dict[str, Any]:
        """How samples are taken, for the record beside them."""
        return {
            "model_path": str(self.model_path),
            "weights": self.weights,
            **sampling,
            **self._steps(sampling["solver"], num_inference_steps),
            "normalize_embeddings": self.model.config.normalize_embeddings,
        }

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
            noise = stateless_normal(piece, clip.shape[1:], seed=seed, stream="evaluation noise")
            u_time = stateless_uniform(piece, seed=seed, stream="evaluation time")
            flow = self.model.flow_batch(eva, clip, noise, u_time)
            loss = float(loss_fn(flow.predict(self.model), flow.sample).flow_matching_loss)
            generated = self.generate(eva, num_inference_steps, sample_index=piece, **sampling)
            return loss, sums.of(generated, self.model.l2_normalize_if_configured(clip))

        with self.bar(len(indices), progress) as bar:
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
        """What is kept, [n, N, C] or pooled [n, C], and the entries of the shards; on the first process."""
        source, count = work.source, len(work.indices)
        kept = work.keep and self.processes.is_main
        shape = (source.target_dim,) if work.pooled else (source.num_tokens, source.target_dim)
        tokens = np.empty((count if kept else 0, *shape), dtype=np.float32)
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

    @contextmanager
    def _claimed(
        self, output: Path | None, store: GeneratedStore | None, overwrite: bool, pooled: bool
    ) -> Iterator[None]:
        """The output claimed by the first process before any process writes to it."""
        with ExitStack() as claims:
            if output is not None and self.processes.is_main:
                check_output(output, overwrite=overwrite, pooled=pooled)
                if store is not None:
                    claims.enter_context(store.claimed(overwrite=overwrite))
            self.processes.barrier()
            yield

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

    def bar(self, total: int, progress: bool) -> tqdm:
        hidden = not progress or not self.processes.is_main
        return tqdm(total=total, desc="generating", unit="sample", disable=hidden)

    def open(self, path: str | Path | Embeddings) -> Embeddings:
        """Embeddings at `path`, or open already, refused (ValueError) unless they have the model's sizes."""
        source = open_embeddings(path) if isinstance(path, str | Path) else path
        check_sizes(source, self.model.config.data_sizes, self.model_path)
        return source

    def choose(self, source: Embeddings, split: str, num_samples: int | None) -> list[int]:
        """Indices, ascending, of one side of the split that the training run made.

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


def _arrays(
    source: Embeddings, indices: Sequence[int], generated: np.ndarray, *, pooled: bool
) -> dict[str, Any]:
    """What was generated for these samples, with their keys and captions, and unless pooled their tokens."""
    records = source.records(indices)
    about = {
        "keys": [record["key"] for record in records],
        "captions": [record.get("caption") for record in records],
    }
    if pooled:
        return {POOLED: generated, **about}
    eva = np.empty((len(indices), source.num_tokens, source.condition_dim), dtype=np.float32)
    clip = np.empty(generated.shape, dtype=np.float32)
    for rows in batches(range(len(indices)), 256):
        fetched = source.fetch(indices[rows.start : rows.stop])
        eva[rows.start : rows.stop], clip[rows.start : rows.stop] = (side.numpy() for side in fetched)
    return {TOKENS: generated, "eva_embeddings": eva, "target_clip_embeddings": clip, **about}


def _encoder_of(source: Embeddings) -> dict[str, Any] | None:
    """The tower that made the conditions, where the embeddings name it."""
    towers = towers_of(source)
    return None if towers is None else towers["encoders"]["eva"]
