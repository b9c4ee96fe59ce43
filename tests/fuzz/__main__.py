"""Fuzz for as long as you like: `python -m tests.fuzz --minutes 30 --seed 1`. Exits with 1 on a finding."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "0"  # a look-up on the hub must show as one
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.fuzz.judge import Tally, run_trials
from tests.fuzz.makers import MAKERS

BATCH = 500


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=MAKERS, nargs="+", default=list(MAKERS))
    parser.add_argument("--only", type=int, help="one input, judged and left in ./fuzz-input")
    parser.add_argument("--most", type=int, default=2**31, help="inputs of each format")
    arguments = parser.parse_args()
    if arguments.only is not None:
        return _repeat(arguments.format[0], arguments.seed, arguments.only)
    tallies: dict[str, list[Tally]] = {name: [] for name in arguments.format}
    end = time.monotonic() + 60 * arguments.minutes
    for first in range(0, arguments.most, BATCH):
        for name in arguments.format:
            if time.monotonic() > end and first:
                return _report(tallies)
            numbers = range(first, min(first + BATCH, arguments.most))
            with tempfile.TemporaryDirectory() as folder:
                tallies[name].append(
                    run_trials(name, arguments.seed, numbers, MAKERS[name](Path(folder), arguments.seed))
                )
    return _report(tallies)


def _repeat(name: str, seed: int, number: int) -> int:
    folder = Path("fuzz-input").resolve()
    folder.mkdir()
    tally = run_trials(name, seed, range(number, number + 1), MAKERS[name](folder, seed))
    return _report({name: [tally]})


def _report(tallies: dict[str, list[Tally]]) -> int:
    findings = [finding for batches in tallies.values() for tally in batches for finding in tally.findings]
    print(f"{'format':<16}{'inputs':>8}{'accepted':>10}{'refused':>9}{'findings':>10}{'slowest':>10}")
    for name, batches in tallies.items():
        total, accepted, refused = (
            sum(getattr(t, f) for t in batches) for f in ("total", "accepted", "refused")
        )
        slowest = max((tally.slowest for tally in batches), default=0.0)
        found = total - accepted - refused
        print(f"{name:<16}{total:>8}{accepted:>10}{refused:>9}{found:>10}{slowest:>8.2f} s")
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
