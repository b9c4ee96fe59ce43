"""Run a function in several processes that know of each other, as under torchrun.

The processes are forked from one that has imported everything once, which takes longer than the tests do.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate.state import PartialState

ROOT = Path(__file__).parents[2]
# How many are several; BLIP3O_DIT_TEST_PROCESSES=64 takes a minute more.
SEVERAL = int(os.environ.get("BLIP3O_DIT_TEST_PROCESSES", "2"))
PRELOADED = ["blip3o_dit.training.run", "blip3o_dit.evaluation.evaluate", "tests.helpers.training_jobs"]


def launch(job: Callable[..., Any], processes: int, *arguments: Any, method: str = "forkserver") -> list[Any]:
    """What `job(*arguments)` returns in each process, by rank.

    `method` "fork" is quicker, for what does not train: the Trainer's state of this process is copied then.
    """
    context = get_context(method)
    context.set_forkserver_preload(PRELOADED)
    results: Any = context.SimpleQueue()
    port = _free_port()
    started = [
        context.Process(target=_run, args=(results, rank, processes, port, job, arguments), daemon=True)
        for rank in range(processes)
    ]
    with patch.dict(os.environ, PYTHONPATH=f"{ROOT / 'src'}{os.pathsep}{ROOT}"):  # for what is preloaded
        for process in started:
            process.start()
    found = {}
    for _ in started:
        rank, result, error = results.get()
        if error:  # the others would wait for it
            for process in started:
                process.kill()
            raise AssertionError(f"process {rank}: {error}")
        found[rank] = result
    for process in started:
        process.join()
    return [found[rank] for rank in range(processes)]


def _run(
    results: Any, rank: int, processes: int, port: int, job: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    PartialState._reset_state()
    try:
        result, error = job(*arguments), None
    except BaseException:  # noqa: BLE001 - it is raised again in the process that launched this one
        result, error = None, traceback.format_exc()
    results.put((rank, result, error))


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])
