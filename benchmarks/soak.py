"""Soak: a training killed, stopped, corrupted and short of disk at seeded moments; is it still the same run?

Each disturbance hits a process of its own that continues the run by `--resume_from_checkpoint auto`, or as a
launcher starts it again, without a word. Its checkpoints are waited for or not, bfloat16 is multiplied or
emulated, and in some runs memory lacks from a step on. When a run is complete its weights, averages,
optimizer state and logged figures must be those of a run that nobody disturbed; then the next one begins.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row
from blip3o_dit.data.store import StoreWriter
from blip3o_dit.model.layers import BFLOAT16_VARIABLE
from blip3o_dit.training.checkpoint import checkpoints, newest_whole
from blip3o_dit.utils.distributed import RESTARTS_VARIABLE

SIZES: dict[str, Any] = dict(model_dim=64, num_layers=2, num_heads=2, batch_size=8, eval_batch_size=8)
STEPS = dict(max_steps=24, logging_steps=5, save_steps=3, eval_steps=6, eval_samples=4, save_total_limit=3)
SETTINGS = SIZES | STEPS | dict(eval_inference_steps=2, source_samples=64, device="cpu", learning_rate=1e-3)
LACKS_FROM, MOST = 8, 4  # the step from which on memory lacks for passes of more samples

# Where a run can be hit: the module, the class or None, and the function on whose n-th call it is.
PHASES: dict[str, tuple[str, str | None, str]] = {
    "loading": ("blip3o_dit.data.store", "EmbeddingStore", "_fetch"),
    "forward": ("blip3o_dit.training.trainer", "BLIP3oTrainer", "compute_loss"),
    "backward": ("blip3o_dit.training.trainer", "BLIP3oTrainer", "_clip_grad_norm"),
    "optimizer step": ("blip3o_dit.training.ema", "ExponentialMovingAverage", "update"),
    "evaluation": ("blip3o_dit.model.blip3o_dit", "BLIP3oDiTModel", "generate"),
    "saving": ("blip3o_dit.training.trainer", "BLIP3oTrainer", "_write_checkpoint"),
    "saving the optimizer": ("blip3o_dit.training.base_trainer", None, "save_optimizer"),
    "writing a file": ("blip3o_dit.training.background", None, "_write"),
    "checksums": ("blip3o_dit.utils.checksums", None, "flush"),
    "renaming": ("blip3o_dit.utils.atomic", None, "publish"),
    "removing old ones": ("blip3o_dit.training.base_trainer", None, "keep_newest"),
    "the final model": ("blip3o_dit.utils.atomic", None, "publish_files"),
}
CALLS = {"loading": 30, "forward": 22, "backward": 22, "optimizer step": 22, "evaluation": 4, "checksums": 60}
CALLS |= {"writing a file": 36}
WRITING = ("saving", "saving the optimizer", "writing a file", "checksums", "renaming", "the final model")
KINDS = ("kill", "kill", "stop", "corrupt", "full disk", "lost disk", "kill by time")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--runs", type=int, help="so many runs; no time limit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kills", type=int, help="only SIGKILLs, so many, spread over the phases; no time limit"
    )
    parser.add_argument("--folder", type=Path, help="for the runs (default: a temporary folder)")


def run(arguments: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        soak = Soak(Path(folder), arguments.seed)
        until = time.monotonic() + 60 * arguments.minutes
        while _goes_on(soak, arguments, until):
            soak.disturbed_run(only_kills=arguments.kills is not None, most=arguments.kills)
    rows: list[Row] = [{"disturbance": kind, "times": n} for kind, n in sorted(soak.counts.items())]
    rows.append({"disturbance": "runs that ended like the undisturbed one", "times": soak.equal})
    rows.append({"disturbance": "runs that did not", "times": soak.different})
    if soak.different:
        raise SystemExit(f"{soak.different} runs differ from the undisturbed one: seed {arguments.seed}")
    return rows


def _goes_on(soak: Soak, arguments: argparse.Namespace, until: float) -> bool:
    if arguments.kills or arguments.runs:
        return soak.kills < (arguments.kills or 0) or soak.equal + soak.different < (arguments.runs or 0)
    return time.monotonic() < until


@dataclass(frozen=True)
class Mode:
    """How the processes of a run do it. The first two change its bits.

    Args:
        bfloat16: "native" or "emulated".
        lacks_memory: from a step on.
        background: checkpoints are written while it goes on.
        restarted: by a launcher, not by a flag.
    """

    bfloat16: str
    lacks_memory: bool
    background: bool = False
    restarted: bool = False

    @property
    def of_its_bits(self) -> Mode:
        return Mode(self.bfloat16, self.lacks_memory)

    def __str__(self) -> str:
        words = {"lacks memory": self.lacks_memory, "in the background": self.background}
        words["restarted"] = self.restarted
        return ", ".join([self.bfloat16, *(name for name, given in words.items() if given)])


class Soak:
    """Disturbed runs beside those that are not.

    Args:
        folder: for the store and the runs.
        seed: names every disturbance.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.equal = self.different = self.kills = 0
        self.store = folder / "store"
        write_store(self.store)
        self._references: dict[Mode, Path] = {}

    def reference(self, mode: Mode) -> Path:
        """The run of these bits that nobody disturbs."""
        if mode not in self._references:
            output = self._folder / f"undisturbed-{len(self._references)}"
            status = in_a_process(self.store, output, None, mode)
            if status != 0:
                raise RuntimeError(f"the undisturbed run ended with {status}: {log_of(output)}")
            self._references[mode] = output
        return self._references[mode]

    def disturbed_run(self, *, only_kills: bool, most: int | None = None) -> None:
        """One run from its beginning to its end, disturbed until it happens to get through."""
        output, chance = self._folder / f"run-{self.equal + self.different}", self._random
        mode = Mode(chance.choice(("native", "emulated")), *(chance.random() < 0.5 for _ in range(3)))
        for attempt in itertools.count():
            disturbance = self._choose(only_kills) if most is None or self.kills < most else None
            over = bool(checkpoints(output)) and newest_whole(output) is None  # as who finds all damaged must
            status = in_a_process(self.store, output, disturbance, mode, attempt, over=over)
            if status == 0:
                break
            self._note(disturbance, status, output)
            if disturbance and disturbance["kind"] == "corrupt":
                corrupt(output, self._random)
        self.counts[f"mode: {mode}"] += 1
        if same_run(self.reference(mode.of_its_bits), output):
            self.equal += 1
        else:
            self.different += 1
        print(
            f"run {self.equal + self.different}: {attempt} disturbances, {mode}; {self.equal} equal",
            flush=True,
        )
        shutil.rmtree(output)

    def _choose(self, only_kills: bool) -> dict[str, Any]:
        kind = "kill" if only_kills else self._random.choice(KINDS)
        phase = self._random.choice(WRITING if kind == "lost disk" else list(PHASES))
        call = self._random.randint(1, CALLS.get(phase, 3))
        return {"kind": kind, "phase": phase, "call": call, "seconds": self._random.uniform(0.0, 4.0)}

    def _note(self, disturbance: dict[str, Any] | None, status: int, output: Path) -> None:
        expected = {"stop": {75}, "full disk": {74}, "lost disk": {74}}
        allowed = {-signal.SIGKILL} if disturbance else set()
        allowed = expected.get(disturbance["kind"], allowed) if disturbance else allowed
        if disturbance and (disturbance["kind"], disturbance["phase"]) == ("stop", "loading"):
            allowed = allowed | {-signal.SIGTERM}  # before the first step there is nothing to save
        if status not in allowed:
            raise RuntimeError(f"{disturbance}: ended with {status}: {log_of(output)}")
        assert disturbance is not None
        by_time = disturbance["kind"] == "kill by time"
        self.counts[disturbance["kind"] if by_time else f"{disturbance['kind']}: {disturbance['phase']}"] += 1
        self.kills += status == -signal.SIGKILL


def write_store(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    eva, clip = (torch.randn(80, 4, width, generator=generator) for width in (12, 8))
    with StoreWriter(path, num_tokens=4, condition_dim=12, target_dim=8, shard_size=16) as writer:
        writer.append(eva, clip, [{"key": str(i)} for i in range(len(eva))])


def in_a_process(
    store: Path,
    output: Path,
    disturbance: dict[str, Any] | None,
    mode: Mode,
    attempt: int = 0,
    *,
    over: bool = False,
) -> int:
    """Continue (or begin) the run in a fresh process; returns its exit status, negative for a signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["blip3o_dit.training.run", "blip3o_dit.cli.train"])
    process = context.Process(target=train_disturbed, args=(store, output, disturbance, mode, attempt, over))
    process.start()
    if disturbance and disturbance["kind"] == "kill by time":
        process.join(disturbance["seconds"])
        process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def train_disturbed(
    store: Path, output: Path, disturbance: dict[str, Any] | None, mode: Mode, attempt: int, over: bool
) -> None:
    """What the process does: the command line's `train`, hit by the disturbance."""
    from blip3o_dit.cli.main import main

    os.environ[BFLOAT16_VARIABLE] = mode.bfloat16
    torch.set_num_threads(1)
    output.mkdir(exist_ok=True)
    with open(f"{output}.txt", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if disturbance is not None and disturbance["kind"] != "kill by time":
        arm(disturbance)
    words = ["train", "--embeddings_path", str(store), "--output_dir", str(output)]
    words += ["--bf16", "--async_checkpoints" if mode.background else "--no_async_checkpoints"]
    words += ["--overwrite"] if over else []
    if mode.restarted:
        os.environ[RESTARTS_VARIABLE] = str(attempt)
    else:
        words += ["--resume_from_checkpoint", "auto"]
    if mode.lacks_memory:
        let_memory_lack()
    for name, value in SETTINGS.items():
        words += [f"--{name}", str(value)]
    sys.exit(main(words))


def arm(disturbance: dict[str, Any]) -> None:
    """Have the n-th call of the phase's function hit the process."""
    module, class_name, name = PHASES[disturbance["phase"]]
    owner: Any = sys.modules.get(module) or __import__(module, fromlist=["_"])
    owner = getattr(owner, class_name) if class_name else owner
    plain, calls = getattr(owner, name), [0]
    inside = random.Random(disturbance["call"])

    def hit(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] != disturbance["call"]:
            return plain(*args, **kwargs)
        if disturbance["kind"] == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        elif disturbance["kind"] == "full disk":
            fill_the_disk()
        elif disturbance["kind"] == "lost disk":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        else:  # somewhere inside the call, not always where it begins
            moment = threading.Timer(inside.uniform(0.0, 0.02), os.kill, (os.getpid(), signal.SIGKILL))
            moment.start()
            result = plain(*args, **kwargs)
            moment.join()
            return result
        return plain(*args, **kwargs)

    setattr(owner, name, hit)


def let_memory_lack() -> None:
    """From a step on, for passes of too many samples."""
    from blip3o_dit.training.trainer import BLIP3oTrainer

    plain = BLIP3oTrainer.compute_loss

    def compute_loss(self: BLIP3oTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= LACKS_FROM and len(inputs["index"]) > MOST:
            raise MemoryError
        return plain(self, model, inputs, *args, **kwargs)

    BLIP3oTrainer.compute_loss = compute_loss  # type: ignore[method-assign]


def fill_the_disk() -> None:
    """From now on files end after some bytes, as on a full disk: needs no privileges, harms nobody else.

    Python ignores the signal that comes with it.
    """
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def corrupt(output: Path, chance: random.Random) -> None:
    """Change a byte of, or cut short, a file of the newest checkpoint."""
    newest = sorted(output.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
    files = sorted(file for file in newest[-1].iterdir()) if newest else []
    if not files:
        return
    file = chance.choice(files)
    content = bytearray(file.read_bytes())
    if chance.random() < 0.5:
        content = content[: chance.randrange(len(content))]
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def same_run(a: Path, b: Path, steps: int = STEPS["max_steps"]) -> bool:
    """Whether two finished runs have the same weights, averages, optimizer state and logged figures."""
    last = f"checkpoint-{steps}"
    names = ["model.safetensors", "model.ema.safetensors", f"{last}/optimizer.safetensors"]
    names += [f"{last}/optimizer.json", f"{last}/progress.json"]
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names) and figures(
        a
    ) == figures(b)


def figures(output: Path) -> list[dict[str, float]]:
    """The log without what is about time."""
    timed = ("samples_per_second", "steps_per_second", "seconds_per_step", "runtime", "mfu", "data_wait")
    lines = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line.items() if not name.endswith(timed)} for line in lines]


def log_of(output: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"{output}.txt").read_text()[-2000:]
    return ""
