"""The user's specification, block by block, run from the repository root.

Each block stands here as it is written there. What differs when it runs: the paths, flags after it that make
the network small or let a run of a few steps log and save, and `--bf16` for `--fp16`, which needs a GPU.
Everything runs on the CPU, also on a machine with a GPU, unless a test says otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import os
import pickle
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from matplotlib.image import imread
from safetensors.torch import load_file

from blip3o_dit.cli import generate
from blip3o_dit.cli.train import main
from blip3o_dit.config import BLIP3oDiTConfig, FlowMatchingConfig, TrainingConfig
from blip3o_dit.model import nextdit
from blip3o_dit.training.trainer import BLIP3oTrainer

ROOT = Path(__file__).parents[1]
HAS_GPU = torch.cuda.is_available()
SAMPLES, HELD_OUT, STEPS = 24, 2, 30
SMALL = shlex.split("--model_dim 32 --num_layers 1 --num_heads 2")
# The default source is fitted once, in the quick start: at full width it takes seconds.
SMALL_AND_QUICK = [*SMALL, *shlex.split("--source ridge")]
RUN_FILES = (
    *("model.safetensors", "config.json", "training_config.json"),
    *("training_log.jsonl", "training_curves.png", "trainer_state.json"),
)
FIDELITY = (
    *("cosine_similarity_mean", "cosine_similarity_std", "pooled_cosine_similarity_mean"),
    *("l2_distance_mean", "l2_distance_std", "norm_ratio_mean", "r2"),
)

# Set by launchers, by a Trainer in this process or by the user's shell; a command starts without them.
FOREIGN_VARIABLES = re.compile(
    r"(ACCELERATE|WANDB|TORCHELASTIC|FSDP|GROUP|ROLE)_.*"
    r"|(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|NETRC|BLIP3O_DIT_TRACEBACK"
)

PROJECT_STRUCTURE = """
src/__init__.py
src/modules/__init__.py
src/modules/config/__init__.py
src/modules/config/blip3o_config.py
src/modules/models/__init__.py
src/modules/models/blip3o_dit.py
src/modules/models/lumina_nextdit2d.py
src/modules/losses/__init__.py
src/modules/losses/flow_matching_loss.py
src/modules/datasets/__init__.py
src/modules/datasets/blip3o_dataset.py
src/modules/trainers/__init__.py
src/modules/trainers/blip3o_trainer.py
src/modules/inference/__init__.py
src/modules/inference/blip3o_inference.py
train_blip3o_dit.py
requirements.txt
"""

VERIFY_INSTALLATION = """
python -c "from src.modules.models.blip3o_dit import BLIP3oDiTModel; print('✅ Installation successful')"
"""

TEST_DATASET = """
python -c "from src.modules.datasets.blip3o_dataset import test_blip3o_dataset; test_blip3o_dataset('path/to/blip3o_grid_embeddings.pkl')"
"""  # noqa: E501

QUICK_START = r"""
python train_blip3o_dit.py \
  --embeddings_path path/to/blip3o_grid_embeddings.pkl \
  --output_dir ./checkpoints/blip3o-dit \
  --num_epochs 10 \
  --batch_size 32 \
  --learning_rate 1e-4
"""

FULL_CONFIGURATION = r"""
python train_blip3o_dit.py \
  --embeddings_path path/to/blip3o_grid_embeddings.pkl \
  --output_dir ./checkpoints/blip3o-dit-large \
  \
  --model_dim 1792 \
  --num_layers 24 \
  --num_heads 28 \
  --gradient_checkpointing \
  \
  --num_epochs 20 \
  --batch_size 16 \
  --eval_batch_size 32 \
  --gradient_accumulation_steps 4 \
  --learning_rate 5e-5 \
  --weight_decay 0.01 \
  --warmup_steps 2000 \
  \
  --sigma_min 1e-4 \
  --sigma_max 1.0 \
  --prediction_type v_prediction \
  --regularization_weight 0.0 \
  \
  --eval_split 0.1 \
  --normalize_embeddings \
  --num_workers 4 \
  \
  --fp16 \
  --logging_steps 100 \
  --save_steps 1000 \
  --eval_steps 1000 \
  \
  --wandb_project blip3o-experiments \
  --wandb_run_name large-model-v1
"""

DEBUG = r"""
python train_blip3o_dit.py \
  --embeddings_path path/to/blip3o_grid_embeddings.pkl \
  --output_dir ./debug \
  --debug
"""

RESUME = r"""
python train_blip3o_dit.py \
  --embeddings_path path/to/blip3o_grid_embeddings.pkl \
  --output_dir ./checkpoints/blip3o-dit \
  --resume_from_checkpoint ./checkpoints/blip3o-dit/checkpoint-5000
"""

DRY_RUN = r"""
python train_blip3o_dit.py \
  --embeddings_path path/to/blip3o_grid_embeddings.pkl \
  --output_dir ./debug \
  --debug \
  --dry_run  # Just test setup without training
"""

CONFIGURE_DISTRIBUTED = "accelerate config"

DISTRIBUTED = r"""
accelerate launch train_blip3o_dit.py \
  --embeddings_path path/to/blip3o_grid_embeddings.pkl \
  --output_dir ./checkpoints/blip3o-dit-distributed \
  --batch_size 16 \
  --gradient_accumulation_steps 2
"""

PYTHON_API = """
from src.modules.inference.blip3o_inference import BLIP3oInference
import torch

# Load trained model
inference = BLIP3oInference("./checkpoints/blip3o-dit")

# Generate CLIP embeddings from EVA-CLIP conditioning
eva_embeddings = torch.randn(4, 64, 1280)  # Batch of 4 samples
generated_clip = inference.generate(
    eva_embeddings=eva_embeddings,
    num_inference_steps=50
)

print(f"Generated CLIP embeddings: {generated_clip.shape}")  # [4, 64, 768]
"""

BATCH_GENERATION = """
from src.modules.inference.blip3o_inference import BLIP3oInference

inference = BLIP3oInference("./checkpoints/blip3o-dit")

# Generate samples from dataset
results = inference.generate_from_dataset(
    dataset_path="path/to/blip3o_grid_embeddings.pkl",
    num_samples=100,
    batch_size=8,
    num_inference_steps=50,
    output_path="./results/generated_samples.pkl",
    compute_metrics=True
)

print("Generation metrics:", results['generation_metrics'])
"""

MODEL_EVALUATION = """
# Evaluate model with flow matching loss
eval_metrics = inference.evaluate_model(
    dataset_path="path/to/blip3o_grid_embeddings.pkl",
    batch_size=32,
    split="eval"
)

print("Evaluation metrics:", eval_metrics)
"""

CUSTOM_MODEL = """
from src.modules.config.blip3o_config import BLIP3oDiTConfig
from src.modules.models.blip3o_dit import BLIP3oDiTModel

# Create custom configuration
config = BLIP3oDiTConfig(
    model_dim=2048,
    num_layers=32,
    num_heads=32,
    gradient_checkpointing=True,
)

# Create model
model = BLIP3oDiTModel(config)
"""

CUSTOM_LOSS = """
from src.modules.losses.flow_matching_loss import BLIP3oFlowMatchingLoss

loss_fn = BLIP3oFlowMatchingLoss(
    sigma_min=1e-5,
    sigma_max=2.0,
    prediction_type="v_prediction",
    regularization_weight=0.1,
)
"""


def placed(text: str, folder: Path) -> str:
    """`text` with its paths under `folder`."""
    text = text.replace("path/to/blip3o_grid_embeddings.pkl", f"{folder}/blip3o_grid_embeddings.pkl")
    return text.replace("./", f"{folder}/")


def words(block: str, folder: Path) -> list[str]:
    """The words of a shell block as bash sees them, with its paths under `folder`."""
    return [placed(word, folder) for word in shlex.split(block.replace("\\\n", ""), comments=True)]


def run_command(command: list[str], home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run from the repository root, without a GPU, with nothing from this process's own runs."""
    program, *arguments = command
    environment = {name: value for name, value in os.environ.items() if not FOREIGN_VARIABLES.fullmatch(name)}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(home / "huggingface")}
    path = sys.executable if program == "python" else str(Path(sys.executable).parent / program)
    return subprocess.run(
        [path, *arguments],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        encoding="utf-8",
        timeout=180,
    )


def run_here(block: str, folder: Path, *more: str) -> int:
    """The training script of a block in this process, which has loaded torch already."""
    program, script, *arguments = words(block, folder)
    assert (program, script) == ("python", "train_blip3o_dit.py")
    return main([*arguments, *more])


def log_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]


def run_with_enter(command: list[str], home: Path) -> tuple[int, str]:
    """Run on a terminal and press Enter at each question; returns the exit status and what was shown."""
    terminal, other_end = pty.openpty()
    environment = os.environ | {"HF_HOME": str(home / "huggingface")}
    path = str(Path(sys.executable).parent / command[0])
    process = subprocess.Popen(
        [path, *command[1:]],
        env=environment,
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
        start_new_session=True,
    )
    os.close(other_end)
    shown, deadline = b"", time.monotonic() + 60
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    shown += os.read(terminal, 1 << 16)
                except OSError:  # how Linux says that the other end was closed
                    break
            elif shown:
                os.write(terminal, b"\r")
        return process.wait(timeout=10), shown.decode()
    finally:
        process.kill()
        os.close(terminal)


def json_of(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def snapshot(folder: Path) -> dict[str, int]:
    """When each file below was last written."""
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*")}


def assert_whole_run(output: Path) -> None:
    """The files of a finished run, readable, and their sizes as the data and flags ask."""
    missing = [name for name in RUN_FILES if not (output / name).is_file()]
    assert not missing
    config = json_of(output / "config.json")
    weights = load_file(output / "model.safetensors")
    width = config["model_dim"]
    assert weights["dit.patch_embedder.proj.weight"].shape == (width, 768)
    assert weights["dit.caption_projection.linear_1.weight"].shape == (width, 1280)
    assert weights["dit.norm_out.linear_2.weight"].shape == (768, width)
    assert config["input_size"] == 8
    assert all(tensor.isfinite().all() for tensor in weights.values())
    picture = imread(output / "training_curves.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 300 and picture.std() > 0


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def _logging() -> Any:
    """A command's console handler holds the stream of the test that ran it."""
    yield
    logger = logging.getLogger("blip3o_dit")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)


@pytest.fixture(scope="session")
def content() -> dict[str, Any]:
    """The documented pickle's content: targets that the conditions determine, as far as noise lets them."""
    generator = np.random.default_rng(0)
    eva = generator.standard_normal((SAMPLES, 64, 1280), dtype=np.float32)
    mixing = generator.standard_normal((1280, 768), dtype=np.float32) / math.sqrt(1280)
    return {
        "eva_blip3o_embeddings": eva,
        "clip_blip3o_embeddings": eva @ mixing + 0.5,
        "captions": [f"caption {row}" for row in range(SAMPLES)],
        "keys": [f"sample{row:05d}" for row in range(SAMPLES)],
        "config": {"tokens": 64},
    }


@pytest.fixture(scope="session")
def shared(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pickle, where the specification's paths lead."""
    folder = tmp_path_factory.mktemp("specification")
    with open(folder / "blip3o_grid_embeddings.pkl", "wb") as file:
        pickle.dump(content, file)
    return folder


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> Path:
    """A folder of a test's own with the same pickle."""
    (tmp_path / "blip3o_grid_embeddings.pkl").symlink_to(shared / "blip3o_grid_embeddings.pkl")
    return tmp_path


@pytest.fixture(scope="session")
def quick_start(shared: Path) -> SimpleNamespace:
    """The one trained model: ten passes of three steps, checkpoints in the middle of a pass."""
    flags = shlex.split("--batch_size 8 --logging_steps 2 --save_steps 10 --eval_steps 10")
    result = run_command([*words(QUICK_START, shared), *SMALL, *flags], shared)
    assert result.returncode == 0, result.stderr
    return SimpleNamespace(folder=shared, output=shared / "checkpoints/blip3o-dit", result=result)


def test_project_structure() -> None:
    for name in PROJECT_STRUCTURE.split():
        assert (ROOT / name).is_file(), name
        if name.startswith("src/modules/") and not name.endswith("__init__.py"):
            module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
            assert module.__all__ and all(hasattr(module, public) for public in module.__all__)


@pytest.mark.slow
def test_installation(shared: Path) -> None:
    result = run_command(words(VERIFY_INSTALLATION, shared), shared)
    assert (result.returncode, result.stdout) == (0, "✅ Installation successful\n"), result.stderr


@pytest.mark.slow
def test_data_preparation(shared: Path) -> None:
    result = run_command(words(TEST_DATASET, shared), shared)
    assert result.returncode == 0, result.stderr
    said = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    numbers = ("samples", "tokens", "condition width (eva)", "target width (clip)")
    assert [said[name] for name in numbers] == [str(SAMPLES), "64", "1280", "768"]


@pytest.mark.slow
def test_quick_start(quick_start: SimpleNamespace) -> None:
    assert_whole_run(quick_start.output)
    config = json_of(quick_start.output / "training_config.json")
    assert (config["num_epochs"], config["learning_rate"], config["batch_size"]) == (10, 1e-4, 8)
    assert json_of(quick_start.output / "trainer_state.json")["global_step"] == STEPS
    checkpoints = sorted(path.name for path in quick_start.output.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]
    assert f"{SAMPLES} samples of 64 tokens, 1280 -> 768 wide" in quick_start.result.stderr
    assert "1 process(es)" in quick_start.result.stderr


@pytest.mark.slow
def test_monitoring(quick_start: SimpleNamespace) -> None:
    """The documented series are in the log, also without Weights & Biases."""
    log = log_of(quick_start.output)
    training = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in training] == list(range(2, STEPS + 1, 2))
    named = (
        *("loss", "flow_matching_loss", "regularization_loss"),
        *("cosine_similarity", "l2_distance", "snr_db"),
        *("output_norm", "grad_norm", "learning_rate", "epoch"),
    )
    for entry in training:
        assert all(math.isfinite(entry[name]) for name in named)
    evaluations = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [10, 20, 30]
    for entry in evaluations:
        assert all(math.isfinite(entry[f"eval_{name}"]) for name in ("loss", *FIDELITY))
    # On the same draws each time; those of a training step are its own.
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision",
    ["--bf16", pytest.param("--fp16", marks=pytest.mark.skipif(not HAS_GPU, reason="needs a GPU"))],
)
def test_full_configuration(folder: Path, precision: str) -> None:
    """All flags at once; Weights & Biases has no key, so it records offline and says so."""
    home = folder / "home"
    home.mkdir()
    variables = {"HOME": str(home), "NETRC": str(home / "netrc")}
    if precision == "--fp16":
        variables["CUDA_VISIBLE_DEVICES"] = "0"
    command = words(FULL_CONFIGURATION.replace("--fp16", precision), folder)
    result = run_command([*command, *SMALL_AND_QUICK, "--logging_steps", "5"], home, **variables)
    assert result.returncode == 0, result.stderr
    output = folder / "checkpoints/blip3o-dit-large"
    assert_whole_run(output)

    asked = dict(
        num_epochs=20,
        batch_size=16,
        eval_batch_size=32,
        gradient_accumulation_steps=4,
        gradient_checkpointing=True,
        learning_rate=5e-5,
        weight_decay=0.01,
        warmup_steps=2000,
        sigma_min=1e-4,
        sigma_max=1.0,
        prediction_type="v_prediction",
        regularization_weight=0.0,
        eval_split=0.1,
        normalize_embeddings=True,
        num_workers=4,
        fp16=precision == "--fp16",
        bf16=precision == "--bf16",
        save_steps=1000,
        eval_steps=1000,
        wandb_project="blip3o-experiments",
        wandb_run_name="large-model-v1",
    )
    config = json_of(output / "training_config.json")
    assert {name: config[name] for name in asked} == asked
    assert json_of(output / "config.json")["normalize_embeddings"] is True

    # 22 samples in batches of 16 are two batches a pass, which make one optimizer step.
    training = [entry for entry in log_of(output) if "loss" in entry]
    assert [entry["step"] for entry in training] == [5, 10, 15, 20]
    assert training[-1]["learning_rate"] == pytest.approx(5e-5 * 19 / 2000)
    assert [entry["step"] for entry in log_of(output) if "eval_loss" in entry] == [20]

    said = [line for line in result.stderr.splitlines() if "recording offline" in line]
    assert len(said) == 1 and "no API key" in said[0]
    (record,) = output.glob("wandb/offline-run-*/run-*.wandb")
    recorded = record.read_bytes()
    # The run's project and name are fields 3 and 8 of its protobuf record; the command line is in it too.
    assert b"\x1a\x12blip3o-experiments" in recorded and b"\x42\x0elarge-model-v1" in recorded
    assert b"flow_matching_loss" in recorded
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_gradient_checkpointing_is_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of a run shows it: count the calls, one a block, in a dry run of the full configuration."""
    calls = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return torch.utils.checkpoint.checkpoint(*arguments, **options)

    monkeypatch.setattr(nextdit, "checkpoint", counted)
    block = FULL_CONFIGURATION.replace("--fp16", "--bf16")
    flags = shlex.split("--num_layers 3 --num_workers 0 --dry_run")
    assert run_here(block, folder, *SMALL_AND_QUICK, *flags) == 0
    assert len(calls) == 3


def test_fp16_without_a_gpu_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, before anything else is said (of Weights & Biases, which has no key) or written."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.setenv(name, "")  # so that what the command sets is taken back after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    before = snapshot(folder)
    status = run_here(FULL_CONFIGURATION, folder, *SMALL_AND_QUICK)
    said = capsys.readouterr().err.splitlines()
    assert status != 0
    assert "--fp16" in said[-1] and "--bf16" in said[-1]
    assert snapshot(folder) == before
    assert len(said) == 1, said


@pytest.mark.slow
def test_debug_then_dry_run(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The two debug blocks, one after the other into the same folder."""
    assert run_here(DEBUG, folder) == 0
    output = folder / "debug"
    assert_whole_run(output)
    steps = json_of(output / "trainer_state.json")["global_step"]
    assert 1 <= steps <= 50
    assert sum(tensor.numel() for tensor in load_file(output / "model.safetensors").values()) < 5e6
    log = log_of(output)
    assert any("loss" in entry for entry in log) and any("eval_r2" in entry for entry in log)

    before = snapshot(folder)
    caplog.clear()
    assert run_here(DRY_RUN, folder, "--source", "noise") == 0
    assert "nothing was trained or written" in caplog.text
    assert snapshot(folder) == before
    # What cannot work fails in the dry run as it would in the run.
    assert run_here(DRY_RUN, folder, "--source", "noise", "--num_heads", "5") != 0
    assert "num_heads" in capsys.readouterr().err


@pytest.mark.slow
def test_dry_run_writes_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = snapshot(folder)
    assert run_here(DRY_RUN, folder) == 0
    assert "nothing was trained or written" in caplog.text
    assert snapshot(folder) == before


@pytest.mark.slow
def test_resume(quick_start: SimpleNamespace, folder: Path) -> None:
    """An interrupted run goes on from its checkpoint, sizes included, and ends as if uninterrupted."""
    output = folder / "checkpoints/blip3o-dit"
    checkpoint = output / "checkpoint-10"
    shutil.copytree(quick_start.output / "checkpoint-10", checkpoint)
    whole_log = log_of(quick_start.output)
    logged = [entry for entry in whole_log if entry["step"] <= 16]  # the last six steps are lost
    (output / "training_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in logged))
    before = snapshot(checkpoint)

    assert run_here(RESUME.replace("checkpoint-5000", "checkpoint-10"), folder) == 0
    assert_whole_run(output)
    assert snapshot(checkpoint) == before
    assert json_of(output / "trainer_state.json")["global_step"] == STEPS
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [
        *("checkpoint-10", "checkpoint-20", "checkpoint-30"),
    ]
    assert json_of(output / "config.json") == json_of(quick_start.output / "config.json")

    series = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_r2")
    log, expected = (
        [{name: entry.get(name) for name in series} for entry in whole if "train_runtime" not in entry]
        for whole in (log_of(output), whole_log)
    )
    assert log == expected
    for file in ("model.safetensors", "model.ema.safetensors"):
        resumed, uninterrupted = load_file(output / file), load_file(quick_start.output / file)
        assert resumed.keys() == uninterrupted.keys()
        assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)


@pytest.mark.slow
def test_python_api(quick_start: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(placed(PYTHON_API, quick_start.folder), names)
    generated = names["generated_clip"]
    assert generated.shape == (4, 64, 768) and generated.dtype == torch.float32
    assert generated.isfinite().all() and generated.std() > 0
    assert "Generated CLIP embeddings: torch.Size([4, 64, 768])" in capsys.readouterr().out


@pytest.mark.slow
def test_batch_generation_and_evaluation(
    quick_start: SimpleNamespace, content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The data set has fewer than the 100 samples asked for: all of them."""
    names: dict[str, Any] = {}
    exec(placed(BATCH_GENERATION, quick_start.folder), names)
    results = names["results"]
    with open(quick_start.folder / "results/generated_samples.pkl", "rb") as file:
        written = pickle.load(file)
    arrays = ("generated_clip_embeddings", "target_clip_embeddings", "eva_embeddings")
    generated, target, eva = (results[name] for name in arrays)
    for name in arrays:
        np.testing.assert_array_equal(written[name], results[name])
    assert generated.shape == (SAMPLES, 64, 768)
    np.testing.assert_array_equal(target, content["clip_blip3o_embeddings"])
    np.testing.assert_array_equal(eva, content["eva_blip3o_embeddings"])
    assert written["keys"] == results["keys"] == content["keys"]
    assert written["captions"] == content["captions"]
    metrics = results["generation_metrics"]
    assert set(metrics) == set(FIDELITY) and written["generation_metrics"] == metrics
    lengths = np.linalg.norm(generated, axis=-1) * np.linalg.norm(target, axis=-1)
    cosine = ((generated * target).sum(-1) / lengths).mean()
    assert metrics["cosine_similarity_mean"] == pytest.approx(cosine, abs=1e-5)
    distance = np.linalg.norm(generated - target, axis=-1).mean()
    assert metrics["l2_distance_mean"] == pytest.approx(distance, rel=1e-5)
    assert f"Generation metrics: {metrics}" in capsys.readouterr().out

    exec(placed(MODEL_EVALUATION, quick_start.folder), names)
    evaluation = names["eval_metrics"]
    assert set(evaluation) == {"flow_matching_loss", "num_samples", *FIDELITY}
    assert evaluation["num_samples"] == HELD_OUT
    assert all(math.isfinite(value) for value in evaluation.values())
    assert evaluation["flow_matching_loss"] > 0
    assert f"Evaluation metrics: {evaluation}" in capsys.readouterr().out


def test_custom_model() -> None:
    names: dict[str, Any] = {}
    with torch.device("meta"):
        exec(CUSTOM_MODEL, names)
    config, model = names["config"], names["model"]
    assert (config.model_dim, config.num_layers, config.num_heads) == (2048, 32, 32)
    assert model.dit.gradient_checkpointing

    d, time, heads, inner, eva, clip = 2048, 1024, 32, 5632, 1280, 768
    attention = 3 * d * d + 2 * 2 * d  # q, k, v; two layer norms
    block = (
        heads  # gate of the cross-attention
        + 2 * attention
        + d * d  # the shared output projection
        + 3 * d * inner  # SwiGLU
        + time * 4 * d
        + 4 * d  # modulation
        + 5 * d  # RMS norms: modulated, of the condition, after attention, before and after SwiGLU
    )
    ends = (
        *(clip * d + d, eva * d + d + d * d + d),  # patch embedder, caption projection
        *(256 * time + time + time * time + time, 2 * d + d * time + time),  # time, pooled condition
        *(time * d + d, d * clip + clip),  # head
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == 32 * block + sum(ends)


def test_custom_configuration_serves_twice() -> None:
    """Building a model leaves the user's configuration as it was."""
    names: dict[str, Any] = {}
    with torch.device("meta"):
        exec(CUSTOM_MODEL.replace("2048", "64").replace("32", "2"), names)
        second = type(names["model"])(names["config"])
    assert names["config"].gradient_checkpointing
    assert names["model"].dit.gradient_checkpointing and second.dit.gradient_checkpointing


def test_custom_loss() -> None:
    names: dict[str, Any] = {}
    exec(CUSTOM_LOSS, names)
    loss_fn = names["loss_fn"]
    x_1, noise, prediction = torch.randn(3, 4, 64, 768).unbind()
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    sample = loss_fn.sample_path(x_1, noise, t)
    sigma = (2.0 * (1 - t) + 1e-5 * t)[:, None, None]
    torch.testing.assert_close(sample.x_t, t[:, None, None] * x_1 + sigma * noise)
    output = loss_fn(prediction, sample)
    velocity = x_1 + (1e-5 - 2.0) * noise
    flow_matching = (prediction - velocity).square().mean()
    penalty = prediction.square().mean()
    torch.testing.assert_close(output.flow_matching_loss, flow_matching)
    torch.testing.assert_close(output.loss, flow_matching + 0.1 * penalty)


def test_documented_settings() -> None:
    """The Configuration section: defaults, names of schedules and predictions; flags named in passing."""
    model = BLIP3oDiTConfig()
    assert (model.model_dim, model.num_layers, model.num_heads) == (1792, 24, 28)
    assert (model.eva_embedding_size, model.in_channels, model.num_tokens) == (1280, 768, 64)
    flow = FlowMatchingConfig()
    assert (flow.sigma_min, flow.sigma_max, flow.regularization_weight) == (1e-4, 1.0, 0.0)
    assert (flow.prediction_type, flow.schedule_type) == ("v_prediction", "linear")
    FlowMatchingConfig(prediction_type="epsilon", schedule_type="cosine")
    training = TrainingConfig()
    assert (training.batch_size, training.learning_rate, training.eval_split) == (32, 1e-4, 0.1)
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    assert parser.parse_args(["model", "data", "out", "--num_inference_steps", "7"]).num_inference_steps == 7


# Two processes on one machine; what `accelerate launch` is not told it asks its configuration for.
MULTI_GPU = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"


DISTRIBUTED_FLAGS = [*SMALL, *shlex.split("--source noise --max_steps 2 --logging_steps 1 --save_steps 2")]


def assert_trained_once(output: Path, said: str, *, processes: int) -> None:
    """One training into one folder, whatever started it: not as many trainings as processes."""
    assert_whole_run(output)
    described = [line for line in said.splitlines() if "process(es)" in line]
    assert len(described) == 1 and f"{processes} process(es) x batch" in described[0]
    log = log_of(output)
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2]
    assert sum("train_runtime" in entry for entry in log) == 1
    progress = json_of(output / "checkpoint-2" / "progress.json")
    settings = json_of(output / "training_config.json")
    steps = settings["batch_size"] * settings["gradient_accumulation_steps"]
    assert progress["run"]["global_batch"] == processes * steps


@pytest.mark.slow
def test_distributed_as_configured(folder: Path) -> None:
    """`accelerate config` with every question at its default, then the launch as it is written."""
    status, shown = run_with_enter(CONFIGURE_DISTRIBUTED.split(), folder)
    assert status == 0 and "configuration saved" in shown, shown
    assert (folder / "huggingface/accelerate/default_config.yaml").is_file()
    result = run_command([*words(DISTRIBUTED, folder), *DISTRIBUTED_FLAGS], folder)
    assert result.returncode == 0, result.stderr
    output = folder / "checkpoints/blip3o-dit-distributed"
    assert_trained_once(output, result.stderr, processes=1)
    config = json_of(output / "training_config.json")
    assert (config["batch_size"], config["gradient_accumulation_steps"]) == (16, 2)


@pytest.mark.slow
def test_precision_of_accelerate_config(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who answers bf16 there launches with this variable: refused, or what runs is what is written down."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    used = []
    whole = BLIP3oTrainer.train

    def watched(self: BLIP3oTrainer, *arguments: Any, **options: Any) -> Any:
        used.append(self.accelerator.mixed_precision)
        return whole(self, *arguments, **options)

    monkeypatch.setattr(BLIP3oTrainer, "train", watched)
    status = run_here(DISTRIBUTED.replace("accelerate launch", "python"), folder, *DISTRIBUTED_FLAGS)
    said = capsys.readouterr().err
    if status != 0:
        assert used == [] and "bf16" in said
        return
    config = json_of(folder / "checkpoints/blip3o-dit-distributed/training_config.json")
    assert used == ["bf16" if config["bf16"] else "no"]
    assert ("; bf16 on" if config["bf16"] else "; float32 on") in said


@pytest.fixture(scope="session")
def one_process(shared: Path) -> dict[str, Any]:
    """What one process logs of its first step, with a batch as large as two processes take together."""
    output = shared / "checkpoints/one-process"
    flags = [*DISTRIBUTED_FLAGS, *shlex.split("--batch_size 8 --output_dir"), str(output)]
    assert run_here(DISTRIBUTED.replace("accelerate launch", "python"), shared, *flags) == 0
    return log_of(output)[0]


@pytest.mark.slow
def test_two_processes(folder: Path, one_process: dict[str, Any]) -> None:
    """Two processes take the step that one process takes with batches twice as large.

    The launcher is not told to use the CPU; where it is told, and torchrun, are run by the README's test.
    """
    command = words(DISTRIBUTED.replace("accelerate launch", f"accelerate launch {MULTI_GPU}"), folder)
    result = run_command([*command, *DISTRIBUTED_FLAGS, "--batch_size", "4"], folder)
    assert result.returncode == 0, result.stderr
    output = folder / "checkpoints/blip3o-dit-distributed"
    assert_trained_once(output, result.stderr, processes=2)

    first = log_of(output)[0]
    for name in ("step", "epoch", "loss", "grad_norm", "cosine_similarity", "l2_distance"):
        assert first[name] == pytest.approx(one_process[name], rel=1e-4), name
