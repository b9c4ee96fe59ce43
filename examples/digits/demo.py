"""The whole road on real pictures, in a few minutes on two cores: `make demo`.

1,797 handwritten digits -> two small vision towers -> an embedding store -> training -> CLIP tokens
generated for held-out pictures, and decoded to pictures -> a table beside baselines, and a figure.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from blip3o_dit.cli.command import set_up_logging
from blip3o_dit.data.dataset import Split, split_permutation
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.decoder import DecoderTrainingConfig, TokenDecoder, load_decoder, train_decoder
from blip3o_dit.evaluation.baselines import PositionMean
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.evaluation.evaluate import evaluate_models
from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.extraction.extract import extract
from blip3o_dit.extraction.shown_images import pictures_of_store
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.ridge import TokenRidge
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.curves import LOG_FILE, read_log
from blip3o_dit.training.run import train
from examples.digits.figure import draw_demo_figure
from examples.digits.towers import ClipTower, EvaTower, digit_towers, load_digit_pictures, save_tower

# What the table and the picture show: label, group and name in metrics.json.
SHOWN_METRICS = (
    ("energy score", "conditional", "energy_score"),
    ("R2", "best_guess", "r2"),
    ("cosine", "sample", "cosine_similarity_mean"),
    ("accuracy", "use", "probe_accuracy"),
)
SHOWN_METHODS = ("DiT", "ridge 3x3", "ridge", "position mean")
SEED = 0
EVAL_SPLIT = 0.2

logger = logging.getLogger("blip3o_dit.demo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of the DiT")
    parser.add_argument("--decoder_steps", type=int, default=250, help="optimizer steps of the decoder")
    parser.add_argument("--tower_steps", type=int, default=250, help="optimizer steps per tower")
    arguments = parser.parse_args()
    set_up_logging()
    started = time.monotonic()

    output = arguments.output_dir
    pictures, labels = load_digit_pictures()
    split = split_permutation(len(pictures), eval_split=EVAL_SPLIT, seed=SEED)
    logger.info("1/6  two vision towers, trained on %d digits of %d", len(split.train), len(pictures))
    towers = digit_towers(pictures, labels, split.train, seed=SEED, steps=arguments.tower_steps)

    logger.info("2/6  extracting the tokens of all pictures")
    store = extract_store(output, pictures, labels, towers)

    logger.info("3/6  training the diffusion transformer on %s", store.path)
    model = train(training_config(output, store, arguments.steps), overwrite=True)

    logger.info("4/6  training a decoder, which turns CLIP tokens into pictures")
    decoder = trained_decoder(output, store, arguments.decoder_steps)

    logger.info("5/6  measuring it on the %d held-out digits, beside baselines", len(split.eval))
    found = evaluate_models(
        [model],
        store.path,
        output,
        EvaluationConfig(
            seed=SEED,
            device="cpu",
            curve_samples=64,
            shown=8,
            batch_size=120,
            draw_samples=120,
        ),
        pictures=pictures_of_store(store.manifest),
        decoder=decoder,
        command="make demo",
    )

    logger.info("6/6  drawing")
    scores = shown_scores(found)
    plot(output, model, store, (pictures, labels), split, scores, decoder)
    print("\n" + table(scores) + "\n\n" + "\n".join(found["summary"]) + "\n" + CAUTION)
    print(f"\nThe report: {output / 'report.html'}\nThe picture: {output / 'demo.png'}")
    print(f"{time.monotonic() - started:.0f} s in all, results in {output}")


def extract_store(
    output: Path, pictures: np.ndarray, labels: np.ndarray, towers: tuple[EvaTower, ClipTower]
) -> EmbeddingStore:
    """Picture files and tower checkpoints on disk, and the store that the extraction makes of them."""
    folder = output / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        name = f"digit-{index:04d}.png"
        Image.fromarray(picture).save(folder / name)
        lines.append(json.dumps({"path": name, "caption": f"a handwritten {label}", "label": str(label)}))
    (folder / "digits.jsonl").write_text("\n".join(lines) + "\n")
    for side, tower in zip(("eva", "clip"), towers, strict=True):
        save_tower(tower, output / "towers" / side)
    shutil.rmtree(output / "store", ignore_errors=True)  # an earlier demo's, of other towers perhaps
    store = extract(
        ExtractionConfig(
            images=str(folder / "digits.jsonl"),
            output=str(output / "store"),
            eva=str(output / "towers" / "eva"),
            clip=str(output / "towers" / "clip"),
            tokens=16,
            batch_size=128,
            workers=1,
            device="cpu",
        )
    )
    assert store is not None  # one process
    return store


def training_config(output_dir: Path, store: EmbeddingStore, steps: int) -> TrainingConfig:
    return TrainingConfig(
        embeddings_path=str(store.path),
        output_dir=str(output_dir / "model"),
        model_dim=192,
        num_layers=3,
        num_heads=6,
        max_steps=steps,
        batch_size=32,
        learning_rate=1.5e-3,
        warmup_steps=min(50, steps),
        ema_decay=0.99,
        eval_split=EVAL_SPLIT,
        seed=SEED,
        logging_steps=max(1, steps // 24),
        eval_steps=max(1, steps // 6),
        save_steps=steps,
        device="cpu",
    )


def trained_decoder(output: Path, store: EmbeddingStore, steps: int) -> TokenDecoder:
    config = DecoderTrainingConfig(steps=steps, eval_split=EVAL_SPLIT, seed=SEED, device="cpu")
    images = output / "pictures" / "digits.jsonl"
    train_decoder(store, images, output / "decoder", config, overwrite=True)
    return load_decoder(output / "decoder")


CAUTION = (
    "These towers are tiny and know only digits: the figures show that the pipeline works, and\n"
    "say nothing of how well real EVA-CLIP tokens determine real CLIP tokens."
)


def shown_scores(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Method -> metric -> value, of the evaluation's result."""
    methods = {method["name"]: method["metrics"] for method in found["methods"]}
    return {
        name: {label: methods[name][group][metric]["value"] for label, group, metric in SHOWN_METRICS}
        for name in SHOWN_METHODS
    }


def plot(
    output: Path,
    model: Path,
    store: EmbeddingStore,
    digits: tuple[np.ndarray, np.ndarray],
    split: Split,
    scores: dict[str, dict[str, float]],
    decoder: TokenDecoder,
) -> None:
    """`demo.png`: eight held-out digits, their tokens, true and generated, as pictures; curve and scores."""
    pictures, labels = digits
    wanted = (0, 2, 3, 4, 5, 6, 8, 9)
    shown = split.eval[[int(np.flatnonzero(labels[split.eval] == digit)[0]) for digit in wanted]]
    eva, clip = store.fetch(shown)
    inference = BLIP3oInference(model, device="cpu")
    generated = inference.generate(eva, seed=SEED, sample_index=shown.tolist())
    sampler = inference.model.config
    rows: dict[str, torch.Tensor] = {
        "true CLIP tokens": clip,
        "DiT": generated,
        "ridge": TokenRidge.fit(store, split.train).predict(eva),
        "position mean": PositionMean.fit(store, split.train).predict(eva),
    }
    log = read_log(model / LOG_FILE)
    draw_demo_figure(
        output / "demo.png",
        pictures=pictures[shown],
        labels=labels[shown],
        rows={name: tokens.numpy() for name, tokens in rows.items()},
        decoded={name: decoder.decode(tokens).numpy() for name, tokens in rows.items()},
        training_curve={"training": curve(log, "loss"), "held-out": curve(log, "eval_loss")},
        metrics=scores,
        title_note=(
            f"1,797 scikit-learn digits, {len(split.eval)} held out; one generated sample each, "
            f"{sampler.default_steps} {sampler.default_solver} steps; colours: 3 principal components"
        ),
    )


def curve(log: list[dict], name: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], entry[name]) for entry in log if name in entry]
    return [step for step, _ in points], [value for _, value in points]


def table(scores: dict[str, dict[str, float]]) -> str:
    metrics = list(next(iter(scores.values())))
    lines = [f"{'on held-out digits':<20}" + "".join(f"{name:>18}" for name in metrics)]
    for method, values in scores.items():
        lines.append(f"{method:<20}" + "".join(f"{values[name]:>18.3f}" for name in metrics))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
