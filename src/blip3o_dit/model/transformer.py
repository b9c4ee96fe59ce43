"""BLIP3-o's diffusion transformer (`NextDiTCrossAttn` around a modified Lumina NextDiT), whole, top-down.

Sources: BLIP3-o (arXiv 2505.09568), Lumina-Next (arXiv 2406.18583). Parameter names are those of the
released state dict. In the shape comments B is the batch, N the target tokens, L the condition tokens,
d = model_dim, H = num_heads, G = num_kv_heads, h = head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from blip3o_dit.model.config import BLIP3oDiTConfig, default_ffn_dim
from blip3o_dit.model.linear import Linear, lay_together, products
from blip3o_dit.model.norms import LayerNorm, RMSNorm
from blip3o_dit.model.official_convention import official_timestep
from blip3o_dit.model.precision import compute_dtype, without_autocast

TIME_FREQUENCIES = 256

# What selective checkpointing keeps: everything else of a block costs next to nothing to compute again.
SAVED_OPS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


KeysValues = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
"""Cross-attention's keys and values, [B, G, L, h] each; with guidance also the null condition's value.

The null condition's tokens are all the same, so attention to them gives their value, whatever the queries:
[1, G, 1, h], for the B samples that come before the B of keys and values.
"""


@dataclass(frozen=True)
class EncodedCondition:
    """All that depends on the condition alone: computed once per sample, reused at every solver step.

    `pooled` [B, min(d, 1024)] enters the modulation; `keys_values` holds what each layer attends to.
    With an informed source, `source_mean` [B, N, in_channels] is its mean R(c) in float32, and
    `embedded_source_mean` [B, N, d] what the first layers make of it.
    """

    pooled: Tensor
    keys_values: list[KeysValues]
    source_mean: Tensor | None = None
    embedded_source_mean: Tensor | None = None

    def with_null_condition(self, null: EncodedCondition) -> EncodedCondition:
        """For a batch of the same samples twice, at first with the null condition, encoded as one sample."""
        pooled = torch.cat([null.pooled.expand_as(self.pooled), self.pooled])
        keys_values: list[KeysValues] = []
        for (keys, values, *_), (_, of_null, *_) in zip(self.keys_values, null.keys_values, strict=True):
            keys_values.append((keys, values, of_null[:, :, :1]))
        source_mean, embedded = (
            None if tensor is None else tensor.repeat(2, 1, 1)
            for tensor in (self.source_mean, self.embedded_source_mean)
        )
        return EncodedCondition(pooled, keys_values, source_mean, embedded)

    def clone(self) -> EncodedCondition:
        """The same in memory of its own."""
        return self._each(Tensor.clone)

    def tensors(self) -> list[Tensor]:
        """Everything it holds, in a fixed order."""
        held = [self.pooled, *(tensor for layer in self.keys_values for tensor in layer)]
        return [
            *held,
            *(tensor for tensor in (self.source_mean, self.embedded_source_mean) if tensor is not None),
        ]

    def _each(self, function: Callable[[Tensor], Tensor]) -> EncodedCondition:
        return EncodedCondition(
            function(self.pooled),
            [cast("KeysValues", tuple(map(function, layer))) for layer in self.keys_values],
            None if self.source_mean is None else function(self.source_mean),
            None if self.embedded_source_mean is None else function(self.embedded_source_mean),
        )


class NextDiT(nn.Module):
    """Velocity (or noise, or data) prediction for target tokens, given condition tokens.

    Inputs and outputs are float32, in the network's units, that is standardised; `BLIP3oDiTModel` converts.
    In between, the blocks compute in `compute_dtype` (see `precision.py`).

    With an informed source the network also sees the guess R(c) that the path starts from, through an
    embedding of its own that BLIP3-o does not have: what is left to find is x_t - R(c), which it can then
    read off its input, and the guess carries each token's own part of the condition to its place.
    """

    def __init__(self, config: BLIP3oDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = config.gradient_checkpointing
        self.selective_checkpointing = False  # with it, products and attention are kept
        self.patch_embedder = PatchEmbedder(config.in_channels, config.model_dim)
        if config.flow.source != "noise":
            self.guess_embedder = Linear(config.in_channels, config.model_dim)
        self.caption_projection = CaptionProjection(config.eva_embedding_size, config.model_dim)
        self.time_caption_embed = TimeCaptionEmbedding(config.model_dim, config.time_embed_dim)
        self.layers = nn.ModuleList(NextDiTBlock(config) for _ in range(config.num_layers))
        self.norm_out = OutputHead(config.model_dim, config.time_embed_dim, config.in_channels)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the blocks compute in, here and now."""
        return compute_dtype(self.patch_embedder.proj.weight)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, condition: Tensor, source_mean: Tensor | None = None
    ) -> Tensor:
        """[B, N, in_channels], t [B] in [0, 1], [B, L, eva_embedding_size] -> [B, N, in_channels]; float32.

        `source_mean` [B, N, in_channels] goes with an informed source.
        """
        dtype = self.compute_dtype
        with without_autocast(hidden_states.device):
            condition = self.caption_projection(condition.to(dtype))  # [B, L, d]
            temb = self._time_embedding(timestep, self.time_caption_embed.pool(condition))
            rope = self._rope(hidden_states)  # [N, h / 2] twice
            x = self._embed(
                hidden_states, source_mean, self._embed_guess(source_mean, dtype), dtype
            )  # [B, N, d]
            for layer in self.blocks:
                if self.gradient_checkpointing and self.training:
                    x = self._checkpoint(layer, x, condition, temb, rope)
                else:
                    x = layer(x, condition, temb, rope)
            return self.norm_out(x, temb)

    def encode_condition(self, condition: Tensor, source_mean: Tensor | None = None) -> EncodedCondition:
        """[B, L, eva_embedding_size], and the guess as in `forward` -> what `predict` needs of them."""
        dtype = self.compute_dtype
        with without_autocast(condition.device):
            condition = self.caption_projection(condition.to(dtype))  # [B, L, d]
            return EncodedCondition(
                pooled=self.time_caption_embed.pool(condition),
                keys_values=[layer.encode(condition) for layer in self.blocks],
                source_mean=source_mean,
                embedded_source_mean=self._embed_guess(source_mean, dtype),
            )

    def predict(self, hidden_states: Tensor, timestep: Tensor, encoded: EncodedCondition) -> Tensor:
        """`forward` with the condition's part already done."""
        dtype = self.compute_dtype
        with without_autocast(hidden_states.device):
            temb = self._time_embedding(timestep, encoded.pooled)
            rope = self._rope(hidden_states)  # [N, h / 2] twice
            x = self._embed(
                hidden_states, encoded.source_mean, encoded.embedded_source_mean, dtype
            )  # [B, N, d]
            for layer, keys_values in zip(self.blocks, encoded.keys_values, strict=True):
                x = layer(x, keys_values, temb, rope)
            return self.norm_out(x, temb)

    def _checkpoint(self, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
        settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing draws
        if self.selective_checkpointing:
            settings["context_fn"] = partial(create_selective_checkpoint_contexts, SAVED_OPS)
        return checkpoint(block, *inputs, **settings)

    def compile_blocks(self) -> None:
        """Compile the blocks in place: they share one compiled function, which their first call makes."""
        for layer in self.layers:
            layer.compile()

    def lay_weights_together(self) -> None:
        """Put the weights that multiply the same input behind one another (see `linear.py`)."""
        for layer in self.blocks:
            for weights in layer.joint_weights():
                lay_together(weights)

    @property
    def blocks(self) -> list[NextDiTBlock]:
        """`layers`, as what they are."""
        return cast("list[NextDiTBlock]", list(self.layers))

    def _embed(
        self, x_t: Tensor, source_mean: Tensor | None, embedded_source_mean: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """x_t [B, N, in_channels] -> the residual stream [B, N, d], float32.

        Next to a guess, x_t is taken as guess + (x_t - guess): bfloat16 holds a small difference of its own
        well, but not the difference of two large numbers.
        """
        if source_mean is None or embedded_source_mean is None:
            return self.patch_embedder(x_t.to(dtype)).float()
        return self.patch_embedder((x_t - source_mean).to(dtype)).float() + embedded_source_mean

    def _embed_guess(self, source_mean: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """[B, N, in_channels] -> [B, N, d]: the guess as itself, and as the part of x_t that it is."""
        if source_mean is None:
            return None
        source_mean = source_mean.to(dtype)
        within_x_t = self.patch_embedder(source_mean) - self.patch_embedder.proj.bias.to(
            dtype
        )  # added by _embed
        return self.guess_embedder(source_mean) + within_x_t

    def _time_embedding(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        features = sinusoidal_features(official_timestep(timestep))  # [B, 256]
        return self.time_caption_embed(features.to(pooled.dtype), pooled)  # [B, min(d, 1024)]

    def _rope(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_tables(
            math.isqrt(hidden_states.shape[1]),
            self.config.head_dim,
            self.config.rope_theta,
            hidden_states.device,
        )


class NextDiTBlock(nn.Module):
    """Self- and cross-attention under one output projection, then SwiGLU; sandwich norms, no shifts."""

    def __init__(self, config: BLIP3oDiTConfig) -> None:
        super().__init__()
        d, eps = config.model_dim, config.norm_eps
        self.gate = nn.Parameter(torch.zeros(config.num_heads))
        self.attn1 = Attention(config)
        self.attn2 = Attention(config, output_projection=True)
        self.feed_forward = FeedForward(d, config.ffn_dim or default_ffn_dim(d))
        self.norm1 = AdaptiveNorm(d, config.time_embed_dim, eps)
        self.norm1_context = RMSNorm(d, eps=eps)
        self.norm2 = RMSNorm(d, eps=eps)
        self.ffn_norm1 = RMSNorm(d, eps=eps)
        self.ffn_norm2 = RMSNorm(d, eps=eps)

    def condition_keys_values(self, condition: Tensor) -> KeysValues:
        """Projected condition [B, L, d] -> keys and values [B, G, L, h]; no rotary embedding on them."""
        k, v = products(self.norm1_context(condition), self.weights_of_condition())  # [B, L, G h]
        return self.attn2.keys(k), self.attn2.values(v)

    def encode(self, condition: Tensor) -> KeysValues:
        """`condition_keys_values`, asked for from outside of the block: sharding (FSDP) hooks in here."""
        return self.condition_keys_values(condition)

    def weights_of_hidden_states(self) -> list[Tensor]:
        """Self-attention's queries, keys and values, and cross-attention's queries."""
        own, cross = self.attn1, self.attn2
        return [own.to_q.weight, own.to_k.weight, own.to_v.weight, cross.to_q.weight]

    def weights_of_condition(self) -> list[Tensor]:
        """Cross-attention's keys and values."""
        return [self.attn2.to_k.weight, self.attn2.to_v.weight]

    def joint_weights(self) -> list[list[Tensor]]:
        """Groups of weights that multiply the same input."""
        return [
            self.weights_of_hidden_states(),
            self.weights_of_condition(),
            self.feed_forward.inner_weights(),
        ]

    def forward(
        self,
        x: Tensor,
        condition: Tensor | KeysValues,
        temb: Tensor,
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        """x [B, N, d], float32 -> [B, N, d]; `condition` is projected [B, L, d], or its keys and values.

        All that a training step takes of the block's weights is in this call, as sharding (FSDP) wants it.
        """
        encoded = self.condition_keys_values(condition) if isinstance(condition, Tensor) else condition
        h, gate_msa, scale_mlp, gate_mlp = self.norm1(x, temb)  # [B, N, d], [B, 1, d] three times
        mixed = self._attend(h, encoded, rope)  # [B, H, N, h]
        attention = self.attn2.to_out[0](mixed.transpose(1, 2).flatten(2))  # [B, N, d]
        x = x + self.norm2(attention, gate_msa.tanh())
        mlp = self.feed_forward(self.ffn_norm1(x, 1 + scale_mlp))  # [B, N, d]
        return x + self.ffn_norm2(mlp, gate_mlp.tanh())

    def _attend(self, h: Tensor, encoded: KeysValues, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Self-attention plus gated cross-attention, [B, N, d] -> [B, H, N, h]."""
        keys, values, *null = encoded
        if null:  # its half needs no queries
            q, k, v = products(h, self.weights_of_hidden_states()[:3])
            (cross_q,) = products(h[len(h) // 2 :], [self.attn2.to_q.weight])
        else:
            q, k, v, cross_q = products(h, self.weights_of_hidden_states())  # [B, N, d or G h]
        own = attend(self.attn1.queries(q, rope), self.attn1.keys(k, rope), self.attn1.values(v))
        cross = attend(self.attn2.queries(cross_q, rope), keys, values)
        gate = self.gate.tanh().to(cross.dtype).view(-1, 1, 1)
        if not null:
            return torch.addcmul(own, cross, gate)
        of_null, of_condition = own.chunk(2)
        value = null[0].repeat_interleave(own.shape[1] // null[0].shape[1], dim=1)  # [1, H, 1, h]
        return torch.cat([of_null + value * gate, torch.addcmul(of_condition, cross, gate)])


class Attention(nn.Module):
    """One attention's weights, and what follows its products: LayerNorm across all heads, rotation."""

    def __init__(self, config: BLIP3oDiTConfig, *, output_projection: bool = False) -> None:
        super().__init__()
        d, kv_dim, self.head_dim = config.model_dim, config.kv_dim, config.head_dim
        self.to_q = Linear(d, d, bias=False)
        self.to_k = Linear(d, kv_dim, bias=False)
        self.to_v = Linear(d, kv_dim, bias=False)
        self.norm_q = LayerNorm(d, eps=1e-5)
        self.norm_k = LayerNorm(kv_dim, eps=1e-5)
        if output_projection:
            self.to_out = nn.ModuleList([Linear(d, d, bias=False)])

    def queries(self, q: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Projected [B, N, d] -> [B, H, N, h], rotated."""
        return rotate(self._split_heads(self.norm_q(q)), rope)

    def keys(self, k: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Projected [B, L, G h] -> [B, G, L, h], rotated when `rope` is given."""
        keys = self._split_heads(self.norm_k(k))
        return rotate(keys, rope) if rope else keys

    def values(self, v: Tensor) -> Tensor:
        """Projected [B, L, G h] -> [B, G, L, h]."""
        return self._split_heads(v)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: linear_2(silu(linear_1 x) * linear_3 x), no biases."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(dim, inner_dim, bias=False)
        self.linear_2 = Linear(inner_dim, dim, bias=False)
        self.linear_3 = Linear(dim, inner_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = products(x, self.inner_weights(), any_layout=True)  # [B, N, inner_dim] twice
        gate = F.silu(gate)
        # Autograd keeps the product's factors; without it their memory can be used again.
        return self.linear_2(gate * up if torch.is_grad_enabled() else gate.mul_(up))

    def inner_weights(self) -> list[Tensor]:
        return [self.linear_1.weight, self.linear_3.weight]


class AdaptiveNorm(nn.Module):
    """RMSNorm with a scale from the time embedding, and the block's other three modulations."""

    def __init__(self, dim: int, time_embed_dim: int, eps: float) -> None:
        super().__init__()
        self.linear = Linear(time_embed_dim, 4 * dim)
        self.norm = RMSNorm(dim, eps=eps)

    def forward(self, x: Tensor, temb: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        modulation = self.linear(F.silu(temb)).unsqueeze(1)  # [B, 1, 4 d]
        scale_msa, gate_msa, scale_mlp, gate_mlp = modulation.chunk(4, dim=-1)
        return self.norm(x, 1 + scale_msa), gate_msa, scale_mlp, gate_mlp


class TimeCaptionEmbedding(nn.Module):
    """Time features plus the mean of the projected condition -> modulation input."""

    def __init__(self, dim: int, time_embed_dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(time_embed_dim)
        self.caption_embedder = nn.Sequential(LayerNorm(dim), Linear(dim, time_embed_dim))

    def pool(self, condition: Tensor) -> Tensor:
        """[B, L, d] -> [B, min(d, 1024)]."""
        return self.caption_embedder(condition.mean(dim=1))

    def forward(self, time_features: Tensor, pooled: Tensor) -> Tensor:
        return self.timestep_embedder(time_features) + pooled


class TimestepEmbedder(nn.Module):
    def __init__(self, time_embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(TIME_FREQUENCIES, time_embed_dim)
        self.linear_2 = Linear(time_embed_dim, time_embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class CaptionProjection(nn.Module):
    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(in_dim, dim)
        self.linear_2 = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))


class PatchEmbedder(nn.Module):
    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = Linear(in_channels, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class OutputHead(nn.Module):
    """LayerNorm without affine, a scale from the time embedding, and the output projection, in float32.

    It is a thousandth of the default network's arithmetic, and what it rounds goes straight into the samples.
    """

    def __init__(self, dim: int, time_embed_dim: int, out_channels: int) -> None:
        super().__init__()
        self.linear_1 = Linear(time_embed_dim, dim)
        self.linear_2 = Linear(dim, out_channels)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        scale = self.linear_1(F.silu(temb)).unsqueeze(1).float()  # [B, 1, d]
        return self.linear_2(self.norm(x) * (1 + scale))  # [B, N, in_channels]


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(q k / sqrt(h)) v: [B, H, N, h], [B, G, L, h], [B, G, L, h] -> [B, H, N, h]. No mask."""
    grouped = keys.shape[1] != queries.shape[1]
    return F.scaled_dot_product_attention(queries, keys, values, enable_gqa=grouped)


def sinusoidal_features(timestep: Tensor) -> Tensor:
    """[B] -> [B, 256]: cosines, then sines, of periods from 2 pi to 2 pi 10000; float32."""
    half = TIME_FREQUENCIES // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_tables(
    grid: int, head_dim: int, theta: float, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [grid * grid, head_dim / 2], row-major positions, float32.

    Each axis has head_dim / 4 frequencies theta^(-4 k / head_dim); on the last axis height and width take
    turns (h0, w0, h1, w1, ...), as in Lumina-Next. Computed when needed: `from_pretrained` would leave a
    non-persistent buffer uninitialised, and the table is small.
    """
    exponent = torch.arange(0, head_dim, 4, dtype=torch.float32, device=device) / head_dim
    position = torch.arange(grid, dtype=torch.float32, device=device)
    angles = torch.outer(position, theta**-exponent)  # [grid, h / 4]
    height = angles[:, None].expand(grid, grid, -1)
    width = angles[None, :].expand(grid, grid, -1)
    table = torch.stack([height, width], dim=-1).reshape(grid * grid, head_dim // 2)
    return table.cos(), table.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each adjacent pair of channels of [B, H, N, h] by its position's angle, in float32."""
    cos, sin = rope
    assert cos.dtype == sin.dtype == torch.float32
    if not torch.compiler.is_compiling():  # one complex product is one pass over memory
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [B, H, N, h / 2]
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, H, N, h / 2] twice
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
