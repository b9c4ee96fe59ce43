"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer (`--optimizer muon`).

Muon (Keller Jordan, kellerjordan.github.io/posts/muon; torch.optim.Muon) takes, instead of a matrix's
averaged gradient U S V^T, about U V^T, by five Newton-Schulz iterations. Scaled by 0.2 sqrt(max(rows,
columns)) its numbers are as large as those of AdamW's updates, so both take the same learning rate and weight
decay (arXiv 2502.16982, section 2.2: `match_rms_adamw`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.overrides import TorchFunctionMode

from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.layers import has_native_matmul
from blip3o_dit.training import fsdp


def block_matrices(model: BLIP3oDiTModel) -> Iterator[nn.Parameter]:
    """What Muon trains: the projections of attention and the feed-forward matrices, each [rows, columns].

    Not the modulations, embedders and output layers, which stay with AdamW as in Jordan's recipe.
    """
    for block in model.dit.blocks:
        for part in (block.attn1, block.attn2, block.feed_forward):
            yield from (parameter for parameter in part.parameters() if parameter.ndim == 2)


def check_muon(optimizer: str) -> None:
    """Refuse (ValueError) Muon under a launcher that shards weights: it takes matrices as a whole."""
    if optimizer == "muon" and fsdp.asked_for():
        raise ValueError("optimizer: muon takes matrices as a whole, expected no FSDP, found it")


class MuonWithAdamW(Optimizer):
    """AdamW, from which Muon has taken over the matrices of the blocks.

    Schedules, clipping and checkpoints see the groups and states of both, AdamW's first.

    Args:
        adamw: over all parameters of `model`; it is not used by itself any more.
        model: whose blocks' matrices Muon takes.
        weight_decay: of these matrices.
    """

    def __init__(self, adamw: AdamW, model: BLIP3oDiTModel, weight_decay: float) -> None:
        matrices = list(block_matrices(model))
        taken = {id(matrix) for matrix in matrices}
        for group in adamw.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in taken]
        rate = adamw.defaults["lr"]
        muon = Muon(matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        super().__init__([*adamw.param_groups, *muon.param_groups], {})
        self._adamw, self._muon = adamw, muon

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of both. `closure` is what other optimizers take; expected None."""
        assert closure is None
        groups = self.param_groups  # a state that was read back brings new ones
        self._adamw.param_groups, self._muon.param_groups = groups[:-1], groups[-1:]
        self._adamw.state = self._muon.state = self.state
        self._adamw.step()
        native = has_native_matmul(torch.bfloat16, groups[-1]["params"][0].device)
        with nullcontext() if native else _InFloat32():
            self._muon.step()


class _InFloat32(TorchFunctionMode):
    """Keeps Muon's iterations in the gradient's float32: where bfloat16 products are emulated they would
    take 20 to 30 times as long."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.bfloat16:
            return args[0].clone()  # the iteration begins in place
        return func(*args, **(kwargs or {}))
