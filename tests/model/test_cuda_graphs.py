"""CUDA graphs, with CUDA imitated: what is recorded when, which memory is shared, how many are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_dit.model import blip3o_dit, cuda_graphs, generation, transformer
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.cuda_graphs import CUDAGraphs
from blip3o_dit.utils.stateless_random import draw_names
from tests.conftest import randomize, tiny_config


class Graph:
    """Replays the call that was made while it was recorded, into the output that this call gave."""

    def __init__(self) -> None:
        self.call: Any = None

    def replay(self) -> None:
        function, inputs, output = self.call
        output.copy_(function(*inputs))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """torch.cuda on a CPU; what was asked of it."""
    asked: dict[str, list[Any]] = {"devices": [], "pools": [], "recording": [None]}

    @contextmanager
    def device(name: Any) -> Iterator[None]:
        asked["devices"].append(name)
        yield
        asked["devices"].append(None)

    @contextmanager
    def graph(graph: Graph, pool: Any) -> Iterator[None]:
        assert asked["devices"][-1] is not None  # inside `device`
        asked["pools"].append(pool)
        asked["recording"][0] = graph
        yield
        asked["recording"][0] = None

    fakes = {"CUDAGraph": Graph, "graph_pool_handle": object, "device": device, "graph": graph}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return asked


def recorded(model: BLIP3oDiTModel, cuda: dict[str, list[Any]]) -> CUDAGraphs:
    """What `record_generation` gives a model on a GPU."""
    graphs = model._graphs = CUDAGraphs()
    plain = graphs.run

    def run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], device: Any, key: Any) -> Tensor:
        def watched(*given: Tensor) -> Tensor:
            output = function(*given)
            if cuda["recording"][0] is not None:
                cuda["recording"][0].call = (function, given, output)
            return output

        return plain(watched, inputs, device, key)

    graphs.run = run  # type: ignore[method-assign]
    return graphs


@pytest.mark.parametrize("flow", [None, {"source": "ridge"}])
def test_recordings_generate_the_same_over_changing_requests(
    cuda: dict[str, list[Any]], flow: dict[str, str] | None
) -> None:
    """A shape's first batch is computed plainly, its second recorded, further ones replayed."""
    model = BLIP3oDiTModel(tiny_config(flow_matching=flow)).eval()
    randomize(model)
    if flow:
        model.source_weight.normal_(0, 0.2)
    plain, steps = model.generate, dict(num_inference_steps=2, solver="heun")
    requests = [(2, 1.0, {}), (3, 1.0, {}), (2, 3.0, {}), (2, 3.0, {"guidance_interval": (0.4, 1.0)})]
    batches = [(torch.randn(b, 9, 12), dict(guidance_scale=g, **more)) for b, g, more in 3 * requests]
    expected = [plain(eva, **steps, **settings) for eva, settings in batches]
    recorded(model, cuda)
    for (eva, settings), wanted in zip(batches, expected, strict=True):
        assert torch.equal(model.generate(eva, **steps, **settings), wanted)
    assert len(cuda["pools"]) == len(requests) and len(set(map(id, cuda["pools"]))) == 1
    assert set(cuda["devices"]) - {None} == {torch.device("cpu")}


def test_a_recording_is_of_the_weights_where_they_are(
    cuda: dict[str, list[Any]], tiny_model: BLIP3oDiTModel
) -> None:
    """Changed in place they count; moved, they are recorded again."""
    graphs, eva = recorded(tiny_model, cuda), torch.randn(2, 9, 12)
    for _ in range(2):
        before = tiny_model.generate(eva, num_inference_steps=1)
    with torch.no_grad():
        tiny_model.dit.norm_out.linear_2.weight.mul_(2.0)
    assert not torch.equal(tiny_model.generate(eva, num_inference_steps=1), before)
    assert len(graphs._recordings) == 1
    tiny_model.double().float()
    tiny_model.generate(eva, num_inference_steps=1)
    assert tiny_model._graphs is not graphs and len(tiny_model._graphs._recordings) == 1


def test_the_longest_unused_recording_makes_room(
    cuda: dict[str, list[Any]], tiny_model: BLIP3oDiTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_RECORDINGS", 2)
    graphs = recorded(tiny_model, cuda)

    def generate(batch: int) -> None:
        tiny_model.generate(torch.randn(batch, 9, 12), num_inference_steps=1)

    for batch in (1, 1, 2, 2, 1, 3, 3, 1):  # 3 takes the place of 2
        generate(batch)
    assert len(cuda["pools"]) == 3 and len(graphs._recordings) == 2
    generate(2)  # plainly
    generate(2)
    assert len(cuda["pools"]) == 4 and len(graphs._recordings) == 2


class Operations(TorchDispatchMode):
    """Their names, and those that bring a tensor from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        devices = {held.device for held in (*args, found) if isinstance(held, Tensor) and held.ndim}
        self.names.append(str(func))
        self.copies += [str(func)] if len(devices) > 1 else []
        return found


FLOWS: list[dict[str, Any]] = [
    {"condition_dropout": 0.1},
    {"source": "ridge_context_spread", "source_components": 4, "prediction_type": "preconditioned"},
    {"prediction_type": "preconditioned", "student_steps": 2},
]


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_what_is_recorded_stays_on_its_device(
    flow: dict[str, Any], guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording may not copy between devices or ask for a number, which tensors without values refuse."""
    for module in (transformer, blip3o_dit):  # tensors without values know no autocast
        monkeypatch.setattr(module, "without_autocast", lambda _: nullcontext())
    monkeypatch.setattr(transformer, "compute_dtype", lambda weight: weight.dtype)
    model = BLIP3oDiTModel(tiny_config(flow_matching=flow, default_steps=2)).eval().to("meta")
    how: dict[str, Any] = dict(steps=2, solver="euler", noise_scale=0.9, progress=None)
    names = draw_names([0, 1, 2], seed=0, stream="test")
    inputs = names.to("meta"), torch.randn(3, 9, 12, device="meta")
    with Operations() as operations, torch.no_grad():
        generation._solve(model, *inputs, guidance=generation.Guidance(guidance, 0.0, 1.0), **how)
    assert not operations.copies


@pytest.mark.parametrize("flow", FLOWS)
def test_a_replayed_generation_leaves_little_to_the_host(
    cuda: dict[str, list[Any]], flow: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise's names, are the conditions finite, both inputs in, the output out; noise is drawn and units
    are converted in the recording."""
    model = BLIP3oDiTModel(tiny_config(flow_matching=flow, default_steps=2)).eval()
    recorded(model, cuda)
    eva = torch.randn(3, 9, 12)
    for _ in range(2):
        model.generate(eva)
    monkeypatch.setattr(Graph, "replay", lambda _: None)
    with Operations() as operations:
        model.generate(eva)
    assert len(operations.names) <= 15, operations.names


def test_steps_that_are_shown_are_not_recorded(
    cuda: dict[str, list[Any]], tiny_model: BLIP3oDiTModel
) -> None:
    recorded(tiny_model, cuda)
    for _ in range(3):
        tiny_model.generate(torch.randn(1, 9, 12), num_inference_steps=2, progress=list)
    assert not cuda["pools"]
