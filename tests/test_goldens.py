"""Four trainings compute what they computed when tests/goldens.json was recorded; no operation of a step may
change by one part in 2^22 unseen, and what moved first is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import goldens
from benchmarks.goldens import RUNS, compare, here, read_records
from benchmarks.traces import Part, Trace
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.flow.path import AffineSource

FACTOR = 1 + 2**-22  # two steps of float32

Change = Callable[[Any], object]  # of a trainer


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return goldens.write_store(tmp_path_factory.mktemp("goldens") / "store")


@pytest.mark.parametrize("name", RUNS)
def test_a_training_computes_what_it_did(name: str, store: EmbeddingStore, tmp_path: Path) -> None:
    ok, said = compare(name, goldens.trace(name, store, tmp_path), read_records(), here())
    assert ok, f"{name}: {said}"


def output_of(layer: str) -> Change:
    return lambda trainer: trainer.model.get_submodule(layer).register_forward_hook(
        lambda _, __, output: output * FACTOR
    )


def gradient_of(parameter: str) -> Change:
    return lambda trainer: trainer.model.get_parameter(parameter).register_hook(lambda grad: grad * FACTOR)


def inputs(name: str) -> Change:
    def change(trainer: Any) -> None:
        plain = trainer._prepare_inputs

        def prepare(batch: dict[str, Any]) -> dict[str, Any]:
            found = plain(batch)
            return found | {name: found[name] * FACTOR}

        trainer._prepare_inputs = prepare

    return change


def source(trainer: Any, mean: float = 1.0, std: float = 1.0) -> None:
    plain = trainer.source_folds.source_distribution

    def changed(*args: Any, **kwargs: Any) -> AffineSource:
        found = plain(*args, **kwargs)
        return AffineSource(found.mean * mean, found.std * std)

    trainer.source_folds = SimpleNamespace(source_distribution=changed)


def queries(trainer: Any) -> None:
    """Of the first block, as they are projected."""
    block = trainer.model.dit.layers[0]
    plain = block.project

    def project(*args: Any) -> Any:
        first, *rest = plain(*args)
        return first * FACTOR, *rest

    block.project = project


def target_deviation(trainer: Any) -> None:
    trainer.model.target_std.mul_(FACTOR)


def loss(trainer: Any) -> None:
    plain = trainer.loss_fn

    def changed(*args: Any) -> Any:
        found = plain(*args)
        return replace(found, loss=found.loss * FACTOR)

    changed.path = plain.path  # type: ignore[attr-defined]
    trainer.loss_fn = changed
    trainer.step_metrics.add = lambda *_: None


def update(trainer: Any) -> None:
    """What the optimizer adds to the weights."""
    plain = trainer.create_optimizer

    def create_optimizer(*args: Any) -> Any:
        optimizer = plain(*args)
        weights = list(trainer.model.parameters())
        before: list[torch.Tensor] = []

        def keep(*_: Any) -> None:
            before[:] = [weight.detach().clone() for weight in weights]

        def change(*_: Any) -> None:
            for weight, old in zip(weights, before, strict=True):
                weight.data = old + (weight.data - old) * FACTOR

        optimizer.register_step_pre_hook(keep)
        optimizer.register_step_post_hook(change)
        return optimizer

    trainer.create_optimizer = create_optimizer


def setting(name: str) -> Change:
    return lambda trainer: setattr(trainer.args, name, getattr(trainer.args, name) * FACTOR)


def average(trainer: Any) -> None:
    plain = trainer.ema._decay
    trainer.ema._decay = lambda step: plain(step) * FACTOR


def teacher(trainer: Any) -> None:
    trainer.teacher.dit.norm_out.register_forward_hook(lambda _, __, output: output * FACTOR)


# What is changed, and where it is first seen. What begins at zero, a block's gates and the prediction, shows
# in its gradient first.
CHANGES: dict[str, tuple[Change, str]] = {
    "noise": (inputs("noise"), "step 1: noise"),
    "times": (inputs("u_time"), "step 1: times"),
    "source's mean": (lambda trainer: source(trainer, mean=FACTOR), "step 1: source's guess"),
    "source's deviation": (lambda trainer: source(trainer, std=FACTOR), "step 1: source's guess"),
    "target's deviation": (target_deviation, "step 1: points on the path"),
    "projection of the condition": (output_of("dit.caption_projection"), "step 1: encoded condition"),
    "time embedding": (output_of("dit.time_caption_embed"), "step 1: time embedding"),
    "embedding of the points": (output_of("dit.patch_embedder"), "step 1: block 1's output"),
    "embedding of the guess": (output_of("dit.guess_embedder"), "step 1: block 1's output"),
    "queries": (queries, "step 2: gradient of block 1"),
    "norm of the keys": (output_of("dit.layers.0.attn1.norm_k"), "step 2: gradient of block 1"),
    "attention's output": (output_of("dit.layers.1.attn2.to_out.0"), "step 2: gradient of block 2"),
    "feed-forward": (output_of("dit.layers.1.feed_forward"), "step 2: gradient of block 2"),
    "block 1": (output_of("dit.layers.0"), "step 1: block 1's output"),
    "block 2": (output_of("dit.layers.1"), "step 1: block 2's output"),
    "prediction": (output_of("dit.norm_out"), "step 1: gradient of norm_out"),
    "loss": (loss, "step 1: loss"),
    "gradient": (gradient_of("dit.norm_out.linear_2.weight"), "step 1: gradient of norm_out"),
    "gradient in a block": (gradient_of("dit.layers.0.norm1.linear.weight"), "step 2: gradient of block 1"),
    "learning rate": (setting("learning_rate"), "step 1: weights"),
    "update": (update, "step 1: weights"),
    "average": (average, "step 1: averaged weights"),
}
OF_OTHERS: dict[str, tuple[str, Change, str]] = {
    "teacher": ("distillation", teacher, "step 1: points on the path"),
    "clipping": ("paper", setting("max_grad_norm"), "step 2: weights"),
}


@pytest.fixture(scope="module")
def first_steps(store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trace]:
    """What was recorded of a training here, or what it computes where nothing was."""
    kept: dict[str, Trace] = {}

    def find(name: str) -> Trace:
        recorded = [record["runs"][name] for record in read_records() if record["where"] == here()]
        if name not in kept:
            folder = tmp_path_factory.mktemp(name)
            kept[name] = (
                Trace.from_json(recorded[0]) if recorded else goldens.trace(name, store, folder, steps=3)
            )
        return kept[name]

    return find


@pytest.mark.parametrize("changed", [*CHANGES, *OF_OTHERS])
def test_one_part_in_four_million_is_seen_and_traced(
    changed: str, first_steps: Callable[[str], Trace], store: EmbeddingStore, tmp_path: Path
) -> None:
    name, change, place = OF_OTHERS[changed] if changed in OF_OTHERS else ("default", *CHANGES[changed])
    found = goldens.trace(name, store, tmp_path, steps=3, change=change)
    difference = first_steps(name).difference(found)
    assert difference.startswith(f"{place} moved by "), difference


def test_how_far_a_part_moved_is_about_what_is_said() -> None:
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    moved = numbers + 1e-5 * torch.randn(1000, generator=torch.Generator().manual_seed(1))
    part = Part.read(Part.of(numbers).written())
    assert part.checksum == Part.of(numbers[:400], numbers[400:]).checksum != Part.of(moved).checksum
    assert 2e-6 < part.moved(Part.of(moved)) < 5e-5


STEP = {"noise": "0 1 1 1", "loss": "1 2 2 2"}


def imitated(loss: float = 0.5) -> Trace:
    lines = [f"{loss.hex()} {(0.25).hex()}"] * 3
    return Trace.from_json({"loss, gradient norm": lines, "first steps": [STEP], "end": STEP})


def test_elsewhere_figures_agree_within_a_tolerance() -> None:
    where = here()
    records = [{"where": where | {"processor": "another"}, "runs": {"default": imitated().to_json()}}]
    assert compare("default", imitated(), [records[0] | {"where": where}], where) == (
        True,
        "the same bits, 3 steps",
    )
    ok, said = compare("default", imitated(0.5 + 1e-7), records, where)
    assert ok and "relative to the nearest: first steps 2e-07 (at most 1e-05)" in said
    ok, said = compare("default", imitated(0.5 + 1e-4), records, where)
    assert not ok and said.endswith("; step 1: loss was 0.5, is 0.5001")
    ok, said = compare("default", imitated(), [], where)
    assert not ok and said.endswith("goldens.json, found none")


def test_other_parts_and_other_ends_are_differences() -> None:
    first, second = imitated(), imitated()
    del second.parts[0]["noise"]
    assert first.difference(second) == "step 1: its parts were noise, loss; they are loss"
    second = imitated()
    second.end["noise"] = Part.read("2 1 1 0")
    assert first.difference(second) == "after the last step: noise moved by 0.7 relative"


def test_the_command_records_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was recorded with other libraries goes, what another processor computed with these stays."""
    file = tmp_path / "goldens.json"
    runs = {name: imitated().to_json() for name in RUNS}
    others = [here() | {"processor": "another"}, here() | {"torch": "1.0"}]
    file.write_text(json.dumps([{"where": where, "runs": runs} for where in others]))
    monkeypatch.setattr(goldens, "FILE", file)
    monkeypatch.setattr(goldens, "trace", lambda *_: imitated(0.75))
    assert goldens.main([]) == 1
    assert goldens.main(["--record"]) == 0
    kept = [record["where"] for record in json.loads(file.read_text())]
    assert sorted(where["processor"] for where in kept) == sorted([here()["processor"], "another"])
    assert others[1] not in kept
    capsys.readouterr()
    assert goldens.main([]) == 0
    assert capsys.readouterr().out.count("the same bits, 3 steps") == len(RUNS)
