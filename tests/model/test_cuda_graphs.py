"""CUDA graphs, with CUDA imitated: what is recorded where, which memory is shared, how many are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_dit.model import cuda_graphs
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.cuda_graphs import GraphedPredict
from blip3o_dit.model.encoded_condition import EncodedCondition
from tests.conftest import randomize, tiny_config


class Stream:
    def __init__(self, device: Any) -> None:
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        assert other.device == self.device


class Graph:
    """Replays the call that was made while it was recorded, into the output that this call gave."""

    def __init__(self) -> None:
        self.call: Any = None

    def replay(self) -> None:
        predict, arguments, output = self.call
        output.copy_(predict(*arguments))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """torch.cuda on a CPU; what was asked of it."""
    asked: dict[str, list[Any]] = {"devices": [], "pools": [], "recorded on": [], "recording": [None]}

    @contextmanager
    def device(name: Any) -> Iterator[None]:
        asked["devices"].append(name)
        yield
        asked["devices"].append(None)

    @contextmanager
    def graph(graph: Graph, pool: Any, stream: Stream) -> Iterator[None]:
        assert asked["devices"][-1] is not None  # inside `device`
        asked["pools"].append(pool)
        asked["recorded on"].append(stream.device)
        asked["recording"][0] = graph
        yield
        asked["recording"][0] = None

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        yield

    fakes = {"Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph, "graph_pool_handle": object}
    for name, fake in (fakes | {"device": device, "graph": graph, "stream": stream}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return asked


def graphed(model: BLIP3oDiTModel, cuda: dict[str, list[Any]]) -> GraphedPredict:
    plain = model.dit.predict

    def predict(x: Tensor, t: Tensor, encoded: EncodedCondition) -> Tensor:
        output = plain(x, t, encoded)
        if cuda["recording"][0] is not None:
            cuda["recording"][0].call = (plain, (x, t, encoded), output)
        return output

    return GraphedPredict(predict)


@pytest.mark.parametrize("flow", [None, {"source": "ridge"}])
def test_graphs_generate_the_same_over_changing_batches_and_guidance(
    cuda: dict[str, list[Any]], flow: dict[str, str] | None
) -> None:
    model = BLIP3oDiTModel(tiny_config(flow_matching=flow)).eval()
    randomize(model)
    if flow:
        model.source_weight.normal_(0, 0.2)
    sizes = [(2, 1.0), (3, 1.0), (2, 3.0), (3, 1.0), (4, 3.0), (2, 1.0)]
    eva = [torch.randn(batch, 9, 12) for batch, _ in sizes]
    expected = [
        model.generate(tokens, num_inference_steps=2, guidance_scale=guidance, solver="heun")
        for tokens, (_, guidance) in zip(eva, sizes, strict=True)
    ]
    model._predict = graphed(model, cuda)
    for tokens, (_, guidance), wanted in zip(eva, sizes, expected, strict=True):
        found = model.generate(tokens, num_inference_steps=2, guidance_scale=guidance, solver="heun")
        assert torch.equal(found, wanted)
    assert len(cuda["pools"]) == 4 and len(set(map(id, cuda["pools"]))) == 1
    assert set(cuda["recorded on"]) == {torch.device("cpu")} == set(cuda["devices"]) - {None}


def test_the_longest_unused_recording_makes_room(
    cuda: dict[str, list[Any]], tiny_model: BLIP3oDiTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_RECORDINGS", 2)
    predict = tiny_model._predict = graphed(tiny_model, cuda)
    for batch in (1, 2, 1, 3, 1):  # 3 takes the place of 2
        tiny_model.generate(torch.randn(batch, 9, 12), num_inference_steps=1)
    assert len(cuda["pools"]) == 3 and len(predict._recordings) == 2
    tiny_model.generate(torch.randn(2, 9, 12), num_inference_steps=1)
    assert len(cuda["pools"]) == 4 and len(predict._recordings) == 2
