"""Checkpoints that are written while the run goes on.

Between two steps a checkpoint's tensors are copied to memory of the host that is allocated once; a thread
writes them, takes checksums, flushes and renames. At most one is under way, and until it is renamed the one
before it is the newest whole one: what a killed run leaves is what it leaves without this.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import save_file
from torch import Tensor

from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.training import fsdp
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.disk import checkpoint_bytes
from blip3o_dit.training.memory import GIB, forecast, resident, room_on
from blip3o_dit.utils.atomic import written_aside
from blip3o_dit.utils.distributed import Processes

# Pinned memory is taken in powers of two, of which such blocks waste nothing: of what was foreseen, and more.
BLOCK, EXTRA = GIB, 2**24
ALIGNMENT = 64  # bytes
LEFT_FREE = 2 * GIB  # of the host's memory, beside a GPU
OF_WEIGHTS = {"format": "pt"}  # what transformers writes into files of weights, and asks for

Metadata = Mapping[str, str] | None
# What writes tensors into a folder that is being filled.
PutTensors = Callable[[Mapping[str, Tensor], Path], None]
TensorFile = tuple[Mapping[str, Tensor], Path, Metadata]

logger = logging.getLogger(__name__)


class CheckpointFiles:
    """Writes checkpoints, at once or, when `go_on` was called, in the background.

    As a context around a run it waits in the end for what is under way.

    Raises:
        WriteError: from whatever is called after a checkpoint could not be written.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._goes_on = False
        self._staging: Staging | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None
        self._name = ""
        self._later: list[TensorFile] | None = None

    def go_on(self, size: int) -> None:
        """From now on the run goes on while a checkpoint of about `size` bytes is written; all call this."""
        self._goes_on = True
        if self._processes.is_main:
            self._staging = Staging(pinned=self._processes.device.type == "cuda")
            self._under_way = self._thread.submit(self._staging.reserve, size + size // 32)

    @contextmanager
    def checkpoint(self, final: Path, then: Callable[[], None]) -> Iterator[Path]:
        """A new folder to fill, tensors by `put`; it becomes `final` when it is whole, after which `then` is
        called, both on the first process. All take part: weights may be shared out over them."""
        self.wait(f"{final.name} waits until {self._name} is written")
        if self._staging is not None:
            with ExitStack() as writing:
                aside = writing.enter_context(written_aside(final))
                with self._collected(self._staging) as files:
                    yield aside
                self._name = final.name
                self._under_way = self._thread.submit(_finish, writing.pop_all(), files, then)
        elif self._processes.is_main:
            with written_aside(final) as aside:
                yield aside
            then()
        else:
            yield final
        if not self._goes_on:
            self._processes.barrier()

    @contextmanager
    def _collected(self, staging: Staging) -> Iterator[list[TensorFile]]:
        """Inside, `put` writes nothing: what it is given is staged, and is in the list."""
        self._later = []
        try:
            yield self._later
        finally:
            self._later = None
        staging.arrive()

    def put(self, tensors: Mapping[str, Tensor], path: Path, metadata: Metadata = None) -> None:
        """A safetensors file in the folder that is being filled."""
        if self._later is None or self._staging is None:
            _write(tensors, path, metadata)
        else:
            copies = self._staging.copied(tensors, first=not self._later)
            self._later.append((copies, path, metadata))

    def check(self) -> None:
        """Raises the error that ended a checkpoint in the background, if one did."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self, meanwhile: str = "") -> None:
        """Until nothing is under way; `meanwhile` is said where that takes time."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            if meanwhile and self._name and not under_way.done():
                logger.info("%s", meanwhile)
            under_way.result()

    def __enter__(self) -> CheckpointFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except OSError as lost:
            if error is None:
                raise
            logger.warning("%s", lost)  # the run's own error is what ends it
        finally:
            self._thread.shutdown()


class Staging:
    """Memory of the host for copies of tensors, in blocks that are allocated once.

    Args:
        pinned: what a GPU copies to at its full rate, and without being waited for.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._blocks: list[Tensor] = []  # bytes
        self._block = self._used = 0  # the block that is being filled, and its bytes that are taken

    def reserve(self, size: int) -> None:
        """Allocate as much, and have the system give it."""
        size -= sum(block.numel() for block in self._blocks)
        while size > 0:
            self._allocate(min(BLOCK, size))
            size -= BLOCK

    def copied(self, tensors: Mapping[str, Tensor], *, first: bool) -> dict[str, Tensor]:
        """Copies, there after `arrive`; with `first` they take the place of all earlier ones."""
        if first:
            self._block = self._used = 0
        return {name: self._copied(tensor.detach()) for name, tensor in tensors.items()}

    def arrive(self) -> None:
        """Wait for the copies."""
        if self._pinned:
            torch.cuda.current_stream().synchronize()

    def _copied(self, tensor: Tensor) -> Tensor:
        place = self._place(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor, non_blocking=self._pinned)

    def _place(self, size: int) -> Tensor:
        """So many bytes that nothing else has."""
        while self._block < len(self._blocks):
            block = self._blocks[self._block]
            if self._used + size <= block.numel():
                start, self._used = self._used, -(-(self._used + size) // ALIGNMENT) * ALIGNMENT
                return block[start : start + size]
            self._block, self._used = self._block + 1, 0
        self._allocate(max(EXTRA, size))
        return self._place(size)

    def _allocate(self, size: int) -> None:
        block = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        self._blocks.append(block if self._pinned else block.zero_())


def may_go_on(config: TrainingConfig, model: BLIP3oDiTConfig, device: torch.device, processes: int) -> bool:
    """Whether this run is to go on while a checkpoint is written: as it says, else on a GPU; and only where
    a copy of one fits into the host's memory. Called when the model is there, and nothing else is yet."""
    asked = config.async_checkpoints
    wanted = device.type == "cuda" and not fsdp.asked_for() if asked is None else asked
    if not wanted:
        return False
    room = room_on(torch.device("cpu"))
    free = room.size - resident() - LEFT_FREE
    if device.type == "cpu":
        needed = forecast(config, model, device, processes=processes)
        free += LEFT_FREE - (needed.total - needed.program - needed.weights - needed.averages)
    size = checkpoint_bytes(config, model)
    if size > free:
        logger.info(
            "the run waits for its checkpoints: a copy of one takes %.1f GiB of memory, %.1f GiB are left",
            size / GIB,
            max(0, free) / GIB,
        )
    return size <= free


def _finish(writing: ExitStack, files: list[TensorFile], then: Callable[[], None]) -> None:
    """The thread's part: write, take checksums, flush, rename."""
    with writing:
        for tensors, path, metadata in files:
            _write(tensors, path, metadata)
    then()


def _write(tensors: Mapping[str, Tensor], path: Path, metadata: Metadata) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata=dict(metadata) if metadata else None)
