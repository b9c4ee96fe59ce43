"""Batches cut into pieces where memory runs out: the same samples of an optimizer step, in more passes.

A step in which memory runs out is taken again from its beginning, with the same draws, and batches stay cut
from there on. Its gradients are the mean over the step's samples as before: those that a run with so much
smaller batches, and so much more accumulation, takes from there on.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blip3o_dit.training import fsdp
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.memory import ways_to_fit

if TYPE_CHECKING:
    from blip3o_dit.training.base_trainer import ExactResumeTrainer

logger = logging.getLogger(__name__)

# What torch says in errors of no class of their own: of the host's memory, and of cuBLAS's and cuDNN's.
MESSAGES = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")

TakePass = Callable[[nn.Module, dict[str, Any]], Tensor]


class MicroBatches:
    """The passes of a trainer's optimizer steps, `pieces` to a batch.

    Several processes agree at the end of each step whether all of them had the memory: each one keeps its
    gradients until then, and they are added up afterwards instead of meanwhile.

    Args:
        take_pass: forward and backward pass of a batch, which returns its share of the step's loss.
    """

    def __init__(self, trainer: ExactResumeTrainer, take_pass: TakePass) -> None:
        self._trainer, self._take_pass = trainer, take_pass
        self._several = trainer.args.world_size > 1
        self.pieces = 1
        self._batches: list[dict[str, Any]] = []
        self._done = 0
        self._lack = ""  # of memory in this step: what was said of it
        self._loss_before: Tensor | None = None
        self._metrics_before: tuple[Tensor | None, int] = (None, 0)

    def go_on(self, pieces: int) -> None:
        """As a run does whose batches were cut into so many: into as many, or the next number that fits."""
        size = self._trainer.config.batch_size
        self.pieces = next((n for n in range(pieces, size + 1) if size % n == 0), size)
        if self.pieces > 1:
            self._trainer.drop_recorded_passes()

    def begin(self, batches: list[dict[str, Any]]) -> None:
        """An optimizer step of these batches begins."""
        self._batches, self._done, self._lack = batches, 0, ""
        self._loss_before = self._trainer._tr_loss.clone()
        self._metrics_before = self._trainer.step_metrics.sums

    def step(self, model: nn.Module) -> Tensor:
        """The passes of the step's next batch; the share of the loss that was not added up yet."""
        batch = self._batches[self._done]
        self._done += 1
        loss = self._tried(model, [batch])
        if self._done == len(self._batches):
            while self._lacks_anywhere():
                self._cut()
                loss = self._tried(model, self._batches)
            if self._several:
                self._add_up_gradients()
        return loss

    def _tried(self, model: nn.Module, batches: list[dict[str, Any]]) -> Tensor:
        """The passes of these batches, until memory lacks; all but the last one's loss is added up."""
        loss = torch.zeros_like(self._trainer._tr_loss)
        if self._lack:
            return loss
        try:
            with self._trainer.accelerator.no_sync(model) if self._several else nullcontext():
                for number, part in enumerate(part for batch in batches for part in self._parts(batch)):
                    if number:
                        self._trainer._tr_loss += loss
                    loss = self._take_pass(model, part)
        except (RuntimeError, MemoryError) as error:
            if not is_lack_of_memory(error):
                raise
            self._lack = str(error).split("\n")[0] or type(error).__name__
        return loss

    def _parts(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """A batch in pieces; the Trainer divides a loss by the passes of its step."""
        self._trainer.current_gradient_accumulation_steps = len(self._batches) * self.pieces
        if self.pieces == 1:
            return [batch]
        size = len(batch["index"]) // self.pieces
        return [
            {
                name: value[start : start + size] if isinstance(value, Tensor | list) else value
                for name, value in batch.items()
            }
            for start in range(0, size * self.pieces, size)
        ]

    def _lacks_anywhere(self) -> bool:
        if not self._several:
            return bool(self._lack)
        return bool(self._trainer.processes.sum(torch.tensor([bool(self._lack)], dtype=torch.int32)).item())

    def _cut(self) -> None:
        """Smaller pieces, and everything as it was when the step began.

        Raises:
            ValueError: when the pieces are single samples already.
        """
        trainer, size = self._trainer, self._trainer.config.batch_size
        step = trainer.state.global_step + 1
        lack, self._lack = self._lack or "another process had none left", ""
        self.pieces = next_divisor(size, self.pieces)
        if not self.pieces:
            raise ValueError(
                f"step {step}: expected memory for a pass of one sample, found {lack}; "
                + ways_to_fit(trainer.config)
            )
        logger.warning(
            "step %d: not enough memory for its passes (%s): from here on a batch of %d samples is taken in "
            "%d passes of %d",
            *(step, lack, size, self.pieces, size // self.pieces),
        )
        assert self._loss_before is not None
        trainer.drop_recorded_passes()
        trainer._tr_loss.copy_(self._loss_before)
        trainer.step_metrics.sums = self._metrics_before
        trainer.losses.withdraw(step)
        trainer.unwrapped_model.zero_grad()
        gc.collect()
        if trainer.args.device.type == "cuda":
            torch.cuda.empty_cache()

    def _add_up_gradients(self) -> None:
        """Their mean over the processes, as DistributedDataParallel takes it."""
        parameters = self._trainer.unwrapped_model.parameters()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_div_(gradients, self._trainer.args.world_size)
        for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            work.wait()


def may_cut(config: TrainingConfig, processes: int) -> bool:
    """Whether a run that runs out of memory goes on with smaller passes: as it says, else one process."""
    asked = config.auto_micro_batch
    return processes == 1 and not fsdp.asked_for() if asked is None else asked


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, a GPU's or the host's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(m in str(error) for m in MESSAGES)


def next_divisor(size: int, pieces: int) -> int:
    """The least number of equal pieces of `size` samples that are at most half as large; 0: there is none."""
    return next((n for n in range(2 * pieces, size + 1) if size % n == 0), 0)
