"""The processes that a launcher started together: collectives, shared-out work, and checks of the launch.

Whole batches are dealt out in turn: a batch holds the same samples whatever the number of processes, and so
gives the same numbers. Results are collected on the first process, in the order in which one process alone
would have computed them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from torch import Tensor

# The first process fits baselines and writes files while the others wait for it; torch would give up on it
# after ten minutes. A process that died ends the wait too: the launcher stops the rest.
MAX_WAIT = timedelta(days=1)

# Where launchers say how many processes there are: torchrun and accelerate, MPI's, and srun.
SIZE_VARIABLES = (
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)

RESTARTS_VARIABLE = "TORCHELASTIC_RESTART_COUNT"

_CPU = torch.device("cpu")

Piece = TypeVar("Piece")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process among `count`: its rank, and the device it computes on. By default it is alone."""

    rank: int = 0
    count: int = 1
    device: torch.device = _CPU

    @property
    def is_main(self) -> bool:
        """Whether this is the process that collects, writes and reports."""
        return self.rank == 0

    def shard(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, bool]]:
        """This process's pieces, and whether each one counts.

        All processes get equally many, as calls of a model whose weights are sharded must be: a process that
        has none left repeats the last piece, which then does not count.
        """
        for start in range(0, len(pieces), self.count):
            mine = start + self.rank
            yield pieces[min(mine, len(pieces) - 1)], mine < len(pieces)

    def map_in_order(
        self, pieces: Iterable[Piece], work: Callable[[Piece], Result]
    ) -> Iterator[tuple[Piece, Result]]:
        """(piece, work(piece)) in the order of the pieces, on the first process; the others get none.

        Collective: all processes must call it, with the same pieces.
        """
        waiting = iter(pieces)
        while together := list(islice(waiting, self.count)):
            mine = work(together[self.rank]) if self.rank < len(together) else None
            yield from zip(together, self.gather(mine), strict=False)  # the last round may be short

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, on the CPU."""
        if self.count == 1:
            return tensor.cpu()
        return reduce(tensor.to("cpu" if self.device.type == "mps" else self.device), "sum").cpu()

    def broadcast(self, value: Any) -> Any:
        """The first process's value, on all of them."""
        return value if self.count == 1 else broadcast_object_list([value])[0]

    def barrier(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            PartialState().wait_for_everyone()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, on the first one; elsewhere nothing (accelerate would send all to all)."""
        if self.count == 1:
            return [value]
        found: list[Any] | None = [None] * self.count if self.is_main else None
        torch.distributed.gather_object(value, found)
        return found or []


SINGLE_PROCESS = Processes()


def join_processes(device: str = "auto") -> Processes:
    """The processes that a launcher (torchrun, accelerate launch) started, each with its own device.

    Raises:
        ValueError: for a device that is not there, or processes that do not see each other.
    """
    wanted = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        check_launch(1)
        return Processes(device=wanted)
    state = PartialState(cpu=wanted.type == "cpu", timeout=MAX_WAIT)
    check_launch(state.num_processes)
    own = state.device if wanted == torch.device("cuda") else wanted
    return Processes(state.process_index, state.num_processes, own)


def pick_device(name: str) -> torch.device:
    """ "auto" -> a GPU when there is one. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected {name}, found {torch.cuda.device_count()} CUDA GPUs")
    return device


def check_launch(world_size: int) -> None:
    """Refuse a launch whose processes would each work alone into the same folder.

    Raises:
        ValueError: when the launcher started another number of processes than the program sees.
    """
    name, launched = launched_processes()
    if launched != world_size:
        raise ValueError(
            f"{name}: the launcher started {launched} processes, this program sees {world_size}; "
            "on a machine without GPUs set ACCELERATE_USE_CPU=true, or use "
            "torchrun --standalone --nproc_per_node N (WORLD_SIZE=1 says that each is to work alone)"
        )


def check_alone(program: str) -> None:
    """Refuse (ValueError) to run in several processes a program that supports only one."""
    name, launched = launched_processes()
    if launched != 1:
        raise ValueError(f"{name}: {program} works in one process, the launcher started {launched}")


def launched_processes() -> tuple[str, int]:
    """The variable in which the launcher says how many processes it started, and the number."""
    name = next((name for name in SIZE_VARIABLES if os.environ.get(name)), SIZE_VARIABLES[0])
    value = os.environ.get(name) or "1"
    if not value.isdecimal():
        raise ValueError(f"{name}: expected a number of processes, found {value!r}")
    return name, int(value)


def restarts() -> int:
    """How often torchrun, or a launcher built on it, has started these processes again."""
    return int(os.environ.get(RESTARTS_VARIABLE) or 0)


def meet_again(*, on_cpu: bool, timeout: float) -> None:
    """Have processes that torchrun started again find each other, before anything else looks for them.

    torchrun keeps one store for all of its attempts (torch 2.13), in which gloo finds the addresses of
    processes that are dead, and waits for them: each attempt needs names of its own.
    """
    if not restarts() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(address, port, count, is_master=False)
    if not on_cpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(
        "gloo" if on_cpu else "cuda:nccl,cpu:gloo",
        store=torch.distributed.PrefixStore(f"restart-{restarts()}", store),
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=timeout),
    )


def launcher_began() -> float:
    """When the launcher began that started this process, in seconds since 1970: not what lies between them,
    which is started again with it and has its variables."""
    ancestors = psutil.Process().parents()
    launchers = (one for one in ancestors if RESTARTS_VARIABLE not in one.environ())
    return next(launchers, ancestors[-1]).create_time()


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
