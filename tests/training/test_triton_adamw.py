"""The kernel for split weights beside torch's AdamW, by Triton's interpreter; `make gpu-check` runs it."""

from __future__ import annotations

from tests.helpers.interpreted import needs_triton, run_interpreted

# Clipping inside a step, a step that is not taken, weight decay; no tensor fills its programs.
ROWS = """
import torch
from torch import nn
from blip3o_dit.training import triton_adamw
from blip3o_dit.training.split_weights import SplitAdamW, joined, split

torch.manual_seed(0)
starts = [torch.randn(70, 40), 1e-3 * torch.randn(500), torch.zeros(3)]

def made(moments):
    parameters, remainders = [], {}
    for start in starts:
        weight, remainder = split(start.clone())
        parameters.append(nn.Parameter(weight))
        remainders[parameters[-1]] = remainder
    settings = dict(lr=1e-3, weight_decay=0.1)
    return parameters, SplitAdamW(parameters, remainders=remainders, moments=moments, **settings)

for moments in (torch.float32, torch.bfloat16):
    (plain, expected), (parameters, found) = made(moments), made(moments)
    for scale, skipped in ((None, 0.0), (3.0, 0.0), (None, 1.0), (2.0, 0.0)):
        for own, other in zip(parameters, plain):
            own.grad = other.grad = torch.randn(own.shape).bfloat16()
            found._begin(own)
        scale, skipped = None if scale is None else torch.tensor(scale), torch.tensor(skipped)
        expected.grad_scale, expected.found_inf = scale, skipped
        expected.step()
        before = [own.detach().clone() for own in parameters]
        group = found.param_groups[0]
        triton_adamw.step(parameters, found._remainders, found.state, group, scale, skipped)
        if skipped:
            assert all(torch.equal(own, old) for own, old in zip(parameters, before))
    for own, other in zip(parameters, plain):
        state, wanted = found.state[own], expected.state[other]
        assert float(state["step"]) == float(wanted["step"]) == 3
        exact = joined(own.detach(), found._remainders[own])
        right = joined(other.detach(), expected._remainders[other])
        weight, remainder = split(exact)
        assert torch.equal(weight, own.detach()) and torch.equal(remainder, found._remainders[own])
        narrow = moments == torch.bfloat16  # whose second moments are rounded by other random numbers
        torch.testing.assert_close(exact, right, rtol=0, atol=3e-5 if narrow else 5e-7)
        for name in ("exp_avg", "exp_avg_sq"):
            ours, theirs = state[name].float(), wanted[name].float()
            near = dict(rtol=0.02, atol=2e-3) if narrow else dict(rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(ours, theirs, **near)

# Rounded at random, a second moment keeps its mean: nearest rounding would not let it fall by a thousandth.
weight = nn.Parameter(torch.zeros(20_000, dtype=torch.bfloat16))
remainders = {weight: torch.zeros(20_000, dtype=torch.int16)}
optimizer = SplitAdamW([weight], remainders=remainders, moments=torch.bfloat16)
optimizer._begin(weight)
optimizer.state[weight]["exp_avg_sq"].fill_(1.0)
weight.grad = torch.zeros_like(weight)
for _ in range(3):
    triton_adamw.step([weight], remainders, optimizer.state, optimizer.param_groups[0], None, None)
assert abs(float(optimizer.state[weight]["exp_avg_sq"].double().mean()) - 0.999**3) < 1e-4
"""


@needs_triton
def test_the_interpreted_kernel_is_fused_adamw() -> None:
    run_interpreted(ROWS)
