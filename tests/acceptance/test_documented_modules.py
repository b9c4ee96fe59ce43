"""The specification's files, installation check, data check, classes and settings: all but training."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from blip3o_dit.cli.command import command_parser
from blip3o_dit.flow.config import FlowMatchingConfig
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.training.config import TrainingConfig
from tests.acceptance.commands import ROOT, SAMPLES, run_command, words
from tests.acceptance.specification import (
    CUSTOM_LOSS,
    CUSTOM_MODEL,
    PROJECT_STRUCTURE,
    TEST_DATASET,
    VERIFY_INSTALLATION,
)

pytestmark = pytest.mark.usefixtures("without_a_gpu", "console_restored")


def test_project_structure() -> None:
    for name in PROJECT_STRUCTURE.split():
        assert (ROOT / name).is_file(), name
        if name.startswith("src/modules/") and not name.endswith("__init__.py"):
            module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
            assert module.__all__ and all(hasattr(module, public) for public in module.__all__)


@pytest.mark.slow
def test_installation_and_data_preparation(shared: Path) -> None:
    """Two programs in one process of their own: importing torch takes seconds."""
    programs = [words(block, shared) for block in (VERIFY_INSTALLATION, TEST_DATASET)]
    assert [program[:-1] for program in programs] == [["python", "-c"]] * 2
    result = run_command(["python", "-c", "\n".join(program[-1] for program in programs)], shared)
    assert result.returncode == 0, result.stderr
    installed, *lines = result.stdout.splitlines()
    assert installed == "✅ Installation successful"
    said = dict(line.split(": ", 1) for line in lines)
    numbers = ("samples", "tokens", "condition width (eva)", "target width (clip)")
    assert [said[name] for name in numbers] == [str(SAMPLES), "64", "1280", "768"]


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
        clip * d + d,  # patch embedder
        eva * d + d + d * d + d,  # caption projection
        256 * time + time + time * time + time,  # time
        2 * d + d * time + time,  # pooled condition
        time * d + d + d * clip + clip,  # head
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
    parser = command_parser("generate")
    assert parser.parse_args(["model", "data", "out", "--num_inference_steps", "7"]).num_inference_steps == 7
