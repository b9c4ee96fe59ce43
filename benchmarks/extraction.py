"""The extraction engine on mixed images, with tiny towers.

Writes thousands of images, 1 % of them broken, and shows: the exact skip list; which share of the time is
spent in the towers and the decoder; that ten SIGKILLs and two processes change no byte; that memory does not
grow with the number of images.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.extraction import extract as engine
from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.extraction.extractor import Extractor
from blip3o_dit.extraction.resume import SKIPPED_FILE
from tests.helpers.mixed_images import write_mixed_images

ROOT = Path(__file__).parent.parent
SHARD = "128"


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks extraction", description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--memory_counts", type=int, nargs=2, default=[2000, 20000])
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        images = work / "images"
        broken = write_mixed_images(images, count=arguments.count, broken=0.01, seed=0)
        whole = profile(images, work / "whole", broken)
        kill(images, work / "killed", whole, arguments.kills)
        two_processes(images, work / "two", whole)
        memory(work, arguments.memory_counts)
    return 0


def profile(images: Path, output: Path, broken: set[str]) -> Path:
    """One process, no workers: every second is the decoder's, a tower's or the engine's own."""
    seconds = {"decoder": 0.0, "towers": 0.0}
    decoded, run_towers = Extractor._decoded, Extractor.__init__

    def timed_decoded(self: Extractor, indices: Any) -> Iterator[Any]:
        stream = decoded(self, indices)
        while True:
            started = time.perf_counter()
            item = next(stream, None)
            seconds["decoder"] += time.perf_counter() - started
            if item is None:
                return
            yield item

    def with_timed_towers(
        self: Extractor, config: Any, output: Path, refs: Any, towers: Any, device: Any
    ) -> None:
        run_towers(self, config, output, refs, towers, device)
        for tower in towers.values():
            forward = tower.forward

            def timed(pixels: Any, forward: Any = forward) -> Any:
                started = time.perf_counter()
                tokens = forward(pixels)
                seconds["towers"] += time.perf_counter() - started
                return tokens

            tower.forward = timed

    Extractor._decoded, Extractor.__init__ = timed_decoded, with_timed_towers  # type: ignore[method-assign]
    started = time.perf_counter()
    config = ExtractionConfig(
        images=str(images),
        output=str(output),
        towers_from_scratch=True,
        shard_size=int(SHARD),
        workers=0,
        device="cpu",
    )
    engine.extract(config, progress=False)
    total = time.perf_counter() - started
    Extractor._decoded, Extractor.__init__ = decoded, run_towers  # type: ignore[method-assign]
    skipped = {json.loads(line)["key"] for line in (output / SKIPPED_FILE).read_text().splitlines()}
    count = EmbeddingStore(output).num_samples
    inside = sum(seconds.values()) / total
    print(f"images read {count}, skipped {len(skipped)}, skip list exact: {skipped == broken}")
    print(
        f"time {total:.1f} s: decoder {seconds['decoder'] / total:.1%}, "
        f"towers {seconds['towers'] / total:.1%}, together {inside:.1%}; {count / total:.0f} images/s"
    )
    return output


def command(images: Path, output: Path, *more: str) -> list[str]:
    words = ["extract_embeddings_production.py", str(images), "--output", str(output), *more]
    return [*words, "--towers-from-scratch", "--shard_size", SHARD, "--device", "cpu"]


def kill(images: Path, output: Path, whole: Path, kills: int) -> None:
    """SIGKILL at random moments of the work, each time started again with the same command."""
    generator = random.Random(0)
    words = [sys.executable, *command(images, output, "--workers", "1")]
    for _ in range(kills):
        before = len(list(output.glob("shard-*.entry.json")))
        process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
        wanted = before + generator.randrange(0, 3)
        while process.poll() is None and len(list(output.glob("shard-*.entry.json"))) < wanted:
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 1.0))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(words, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    print(f"killed {kills} times: same bytes as the uninterrupted run: {same(output, whole)}")


def two_processes(images: Path, output: Path, whole: Path) -> None:
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    words = [*launcher, *command(images, output, "--workers", "0")]
    subprocess.run(words, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    print(f"two processes: same bytes as one: {same(output, whole)}")


def memory(work: Path, counts: list[int]) -> None:
    """Peak resident memory of the whole process, for few and for many small images."""
    peaks = []
    for count in counts:
        images, output = work / f"images-{count}", work / f"store-{count}"
        write_mixed_images(images, count=count, broken=0.0, seed=1)
        words = [sys.executable, *command(images, output, "--workers", "0")]
        script = (
            "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
            "stderr=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, *words], cwd=ROOT, check=True, capture_output=True
        )
        peaks.append(int(done.stdout.split()[-1]) / 1024)
        shutil.rmtree(images)
        shutil.rmtree(output)
    print(
        f"peak memory: {peaks[0]:.0f} MiB for {counts[0]} images, {peaks[1]:.0f} MiB for {counts[1]} "
        f"({peaks[1] / peaks[0] - 1:+.1%})"
    )


def same(a: Path, b: Path) -> bool:
    left, right = ({f.name: f.read_bytes() for f in folder.iterdir()} for folder in (a, b))
    return left == right
