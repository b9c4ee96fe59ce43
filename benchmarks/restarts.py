"""torchrun --max-restarts: a worker killed, or hanging, every few steps; does the run end with its bits?

Two processes on a CPU. In each attempt one of them, drawn by the seed, is killed or hangs some steps after
the checkpoint that the attempt began with, until there were as many disturbances as asked for. Seconds are
from the disturbance to the end of the next attempt's first step: launcher, imports, reading the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import Row
from benchmarks.soak import SETTINGS, same_run, write_store
from blip3o_dit.utils.distributed import restarts

HANG_EVERY, PATIENCE = 5, 30.0  # which disturbance is one, and how long it is borne
SPARE = 3  # restarts, for steps that take as long on a busy machine
EVENTS = "events.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--disturbances", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="for the runs (default: a temporary folder)")


def run(arguments: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        write_store(folder / "store")
        for name in ("undisturbed", "disturbed"):
            _launched(folder / name, name == "disturbed", arguments)
        steps = steps_for(arguments.disturbances)
        equal = same_run(folder / "undisturbed", folder / "disturbed", steps)
        events = [json.loads(line) for line in (folder / f"disturbed-{EVENTS}").read_text().splitlines()]
        said = (folder / "disturbed.txt").read_text()
    disturbed = [event for event in events if event["what"] != "step"]
    rows: list[Row] = []
    for what in ("killed", "hangs"):
        mine = [event for event in disturbed if event["what"] == what]
        back = [
            min(e["at"] for e in events if e["what"] == "step" and e["at"] > event["at"]) for event in mine
        ]
        seconds = [later - event["at"] for later, event in zip(back, mine, strict=True)]
        named = sum(
            said.count(f"rank {event['rank']} has not finished step {event['step']} ") for event in mine
        )
        rows.append(
            {
                "disturbance": f"a worker {what}",
                "times": len(mine),
                "named": named if what == "hangs" else None,
                "median s until the next step": statistics.median(seconds) if seconds else None,
            }
        )
    rows.append({"disturbance": "the run ended with the bits of the undisturbed one", "times": int(equal)})
    if not equal:
        raise SystemExit(f"the runs differ: seed {arguments.seed}\n{said[-3000:]}")
    return rows


def steps_for(disturbances: int) -> int:
    """Enough that the run is not done before all of them: each lets it get on by 3 steps at most."""
    return 3 * disturbances + 6


def _launched(output: Path, disturbed: bool, arguments: argparse.Namespace) -> None:
    """One training under torchrun, which may restart it as often as it is disturbed."""
    disturbances = arguments.disturbances
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    restarts = str(disturbances + SPARE)
    words += [str(arguments.processes), "--max-restarts", restarts, "-m", "benchmarks.restarts"]
    words += [str(output), str(disturbances), str(arguments.seed), str(int(disturbed))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(f"{output}.txt", "w") as log:
        status = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if status:
        raise RuntimeError(f"torchrun ended with {status}: {Path(f'{output}.txt').read_text()[-3000:]}")


def work(output: Path, disturbances: int, seed: int, disturbed: int) -> int:
    """What each worker does: the command line's `train`, disturbed in this attempt or not."""
    from blip3o_dit.cli.main import main
    from blip3o_dit.training.trainer import BLIP3oTrainer

    attempt, rank = restarts(), int(os.environ["RANK"])
    chance = random.Random(f"{seed} {attempt}")
    whose, after = chance.randrange(int(os.environ["WORLD_SIZE"])), chance.randint(2, 4)
    plain, first = BLIP3oTrainer.compute_loss, []

    def note(what: str, step: int) -> None:
        with open(f"{output}-{EVENTS}", "a") as events:
            events.write(json.dumps({"what": what, "rank": rank, "step": step, "at": time.time()}) + "\n")

    def compute_loss(self: BLIP3oTrainer, *args: Any, **kwargs: Any) -> Any:
        step = self.state.global_step + 1
        first.append(step)
        if rank == 0 and step == first[0] + 1 and first.count(step) == 1:
            note("step", step - 1)
        if disturbed and attempt < disturbances and rank == whose and step == first[0] + after:
            if attempt % HANG_EVERY == HANG_EVERY - 1:
                note("hangs", step)
                time.sleep(3600)
            note("killed", step)
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *args, **kwargs)

    BLIP3oTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
    words = ["train", "--embeddings_path", str(output.parent / "store"), "--output_dir", str(output)]
    words += ["--rank_timeout", str(PATIENCE), "--async_checkpoints"]
    for name, value in (SETTINGS | {"batch_size": 4, "max_steps": steps_for(disturbances)}).items():
        words += [f"--{name}", str(value)]
    return main(words)


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1]), *map(int, sys.argv[2:])))
