"""BLIP3-o's diffusion transformer (`NextDiTCrossAttn` around a modified Lumina NextDiT), whole, top-down.

Sources: BLIP3-o (arXiv 2505.09568), Lumina-Next (arXiv 2406.18583). Parameter names are those of the
released state dict. In the shape comments B is the batch, N the target tokens, L the condition tokens,
d = model_dim, H = num_heads, G = num_kv_heads, h = head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_dit.flow.config import ANY_STEPS
from blip3o_dit.model.config import BLIP3oDiTConfig, default_ffn_dim
from blip3o_dit.model.encoded_condition import EncodedCondition, KeysValues, Modulations, TimedModulations
from blip3o_dit.model.layers import (
    TIME_FREQUENCIES,
    LayerNorm,
    Linear,
    RMSNorm,
    checkpoint_block,
    compute_dtype,
    official_timestep,
    rotary_tables,
    rotate,
    sinusoidal_features,
    without_autocast,
)


class NextDiT(nn.Module):
    """Velocity (or noise, or data) prediction for target tokens, given condition tokens.

    Inputs and outputs are float32, in the network's units, that is standardised; `BLIP3oDiTModel` converts.
    In between, the blocks compute in `compute_dtype` (see `layers.py`).

    With an informed source the network also sees its mean R(c), through an embedding of its own that BLIP3-o
    does not have: what is left to predict is x_t - R(c), which it can then read off its input, and R(c)
    carries each token's own part of the condition to its place.
    """

    def __init__(self, config: BLIP3oDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = config.gradient_checkpointing
        self.selective_checkpointing = False
        self.residual_dtype: torch.dtype = getattr(torch, config.residual)
        self.patch_embedder = PatchEmbedder(config.in_channels, config.model_dim)
        if config.flow.source != "noise":
            self.guess_embedder = Linear(config.in_channels, config.model_dim)
        self.caption_projection = TwoLayers(
            config.eva_embedding_size, config.model_dim, partial(F.gelu, approximate="tanh")
        )
        self.time_caption_embed = TimeCaptionEmbedding(config.model_dim, config.time_embed_dim)
        self.step_embedder: TwoLayers | None = None  # of how far a distilled model's step goes
        if config.flow.student_steps == ANY_STEPS:
            self.step_embedder = TwoLayers(TIME_FREQUENCIES, config.time_embed_dim, F.silu)
        self.layers = nn.ModuleList(NextDiTBlock(config) for _ in range(config.num_layers))
        self.norm_out = OutputHead(config.model_dim, config.time_embed_dim, config.in_channels)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the blocks compute in, here and now."""
        return compute_dtype(self.patch_embedder.proj.weight)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        condition: Tensor,
        source_mean: Tensor | None = None,
        step_end: Tensor | None = None,
    ) -> Tensor:
        """[B, N, in_channels], t [B] in [0, 1], [B, L, eva_embedding_size] -> [B, N, in_channels]; float32.

        `source_mean` [B, N, in_channels] goes with an informed source, `step_end` [B] with a student.
        """
        dtype = self.compute_dtype
        with without_autocast(hidden_states.device):
            condition = self.caption_projection(condition.to(dtype))  # [B, L, d]
            temb = self._time_embedding(timestep, step_end, self.time_caption_embed.pool(condition))
            rope = self._rope(hidden_states.device)  # [N, h / 2] twice
            embedded_source_mean = self._embed_source_mean(source_mean, dtype)
            x = self._embed(hidden_states, source_mean, embedded_source_mean, dtype)  # [B, N, d]
            for layer in self.blocks:
                if self.gradient_checkpointing and self.training:
                    selective = self.selective_checkpointing
                    x = checkpoint_block(layer, x, condition, temb, rope, selective=selective)
                else:
                    x = layer(x, condition, temb, rope)
            return self.norm_out(x, self.norm_out.modulate(temb))

    def encode_condition(
        self,
        condition: Tensor,
        source_mean: Tensor | None = None,
        times: Tensor | None = None,
        step_ends: Tensor | None = None,
    ) -> EncodedCondition:
        """[B, L, eva_embedding_size], R(c) as in `forward` -> what `predict` needs of them.

        With the times [K] of all calls (and where their steps end) their modulations are computed as well:
        each call would read those layers' weights, an eighth of the default network, for a few rows.
        """
        dtype = self.compute_dtype
        with without_autocast(condition.device):
            condition = self.caption_projection(condition.to(dtype))  # [B, L, d]
            pooled = self.time_caption_embed.pool(condition)  # [B, min(d, 1024)]
            return EncodedCondition(
                pooled=pooled,
                keys_values=self.encode(condition),
                rope=self._rope(condition.device),
                source_mean=source_mean,
                embedded_source_mean=self._embed_source_mean(source_mean, dtype),
                modulations=None if times is None else self._modulations_at(times, step_ends, pooled),
            )

    def predict(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoded: EncodedCondition,
        step_end: Tensor | None = None,
    ) -> Tensor:
        """`forward` with the condition's part already done."""
        dtype = self.compute_dtype
        with without_autocast(hidden_states.device):
            if encoded.modulations is not None:
                modulations = encoded.modulations.at(timestep)
            else:
                temb = self._time_embedding(timestep, step_end, encoded.pooled)
                modulations = Modulations.of_joint(self.modulate(temb), self.config.model_dim)
            x = self._embed(hidden_states, encoded.source_mean, encoded.embedded_source_mean, dtype)
            x = self.run_blocks(x, encoded.keys_values, modulations, encoded.rope)
            return self.norm_out(x, modulations.output)

    def encode(self, condition: Tensor) -> list[KeysValues]:
        """Projected condition [B, L, d] -> what each layer's cross-attention attends to."""
        return [layer.encode(condition) for layer in self.blocks]

    def modulate(self, temb: Tensor) -> Tensor:
        """Embedded time and condition [..., min(d, 1024)] -> the modulations of every block and of the last
        layer, side by side [..., layers 4 d + d]."""
        of_blocks = [layer.modulate(temb) for layer in self.blocks]
        return torch.cat([*of_blocks, self.norm_out.modulate(temb)], dim=-1)

    def run_blocks(
        self,
        x: Tensor,
        keys_values: Sequence[KeysValues],
        modulations: Modulations,
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The residual stream [B, N, d] through all blocks, given all that depends on condition and time."""
        for layer, own, modulation in zip(self.blocks, keys_values, modulations.blocks, strict=True):
            x = layer(x, own, BlockModulation(modulation), rope)
        return x

    @property
    def modulation_bytes(self) -> int:
        """What the modulations of one sample at one time take."""
        return (4 * len(self.layers) + 1) * self.config.model_dim * self.compute_dtype.itemsize

    def zero_gates_and_output(self) -> None:
        """Start as DiT's adaLN-Zero does (arXiv 2212.09748): each block is the identity, the output zero."""
        zeroed = [self.norm_out.linear_1, self.norm_out.linear_2]
        for layer in self.blocks:
            nn.init.zeros_(layer.gate)
            zeroed.append(layer.norm1.linear)
        for linear in zeroed:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def compile_blocks(self) -> None:
        """Compile the blocks in place: they share one compiled function, which their first call makes."""
        for layer in self.layers:
            layer.compile()

    def compile_forward(self) -> None:
        """Compile `forward` as one function: nothing is launched between blocks, and the first call takes
        some `num_layers` times as long."""
        self.forward = torch.compile(self.forward)  # type: ignore[method-assign]

    @property
    def blocks(self) -> list[NextDiTBlock]:
        """`layers`, typed (nn.ModuleList loses the element type)."""
        return cast("list[NextDiTBlock]", list(self.layers))

    def _embed(
        self, x_t: Tensor, source_mean: Tensor | None, embedded_source_mean: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """x_t [B, N, in_channels] -> the residual stream [B, N, d].

        With an informed source, R(c) and x_t - R(c) are embedded apart: bfloat16 holds a small difference
        well, but not the difference of two large numbers.
        """
        if source_mean is None or embedded_source_mean is None:
            return self.patch_embedder(x_t.to(dtype)).to(self.residual_dtype)
        x = self.patch_embedder((x_t - source_mean).to(dtype)).float() + embedded_source_mean
        return x.to(self.residual_dtype)

    def _embed_source_mean(self, source_mean: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """[B, N, in_channels] -> [B, N, d]: R(c) as an input of its own, and as a part of x_t."""
        if source_mean is None:
            return None
        source_mean = source_mean.to(dtype)
        bias = self.patch_embedder.proj.bias.to(dtype)  # `_embed` adds it
        return self.guess_embedder(source_mean) + (self.patch_embedder(source_mean) - bias)

    def _time_embedding(self, timestep: Tensor, step_end: Tensor | None, pooled: Tensor) -> Tensor:
        features = sinusoidal_features(official_timestep(timestep))  # [..., 256]
        temb = self.time_caption_embed(features.to(pooled.dtype), pooled)  # [..., B, min(d, 1024)]
        if self.step_embedder is None or step_end is None:
            return temb
        features = sinusoidal_features(official_timestep(step_end - timestep))
        return temb + self.step_embedder(features.to(pooled.dtype))

    def _modulations_at(self, times: Tensor, ends: Tensor | None, pooled: Tensor) -> TimedModulations:
        """Times [K], pooled conditions [B, min(d, 1024)] -> the modulations of every pair."""
        ends = None if ends is None else ends[:, None]
        temb = self._time_embedding(times[:, None], ends, pooled)  # [K, B, min(d, 1024)]
        return TimedModulations(times, self.modulate(temb), self.config.model_dim)

    def _rope(self, device: torch.device) -> tuple[Tensor, Tensor]:
        config = self.config
        return rotary_tables(config.input_size, config.head_dim, config.rope_theta, device)


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

    def forward(
        self,
        x: Tensor,
        condition: Tensor | KeysValues,
        temb: Tensor | BlockModulation,
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        """x [B, N, d], the residual stream in its dtype -> [B, N, d].

        `condition` is projected [B, L, d], or its keys and values; `temb` [B, min(d, 1024)], or the
        modulation that `modulate` makes of it.

        FSDP gathers the block's weights for this call, so a training step uses them here and nowhere else.
        """
        keys_values = self._keys_values(condition) if isinstance(condition, Tensor) else condition
        modulation = temb if isinstance(temb, BlockModulation) else BlockModulation(self._modulate(temb))
        scale_msa, gate_msa, scale_mlp, gate_mlp = modulation.parts()  # [B, 1, d] each
        h = self.norm1(x, 1 + scale_msa)  # [B, N, d]
        attention = self._attend(h, keys_values, rope)  # [B, N, d]
        x = (x + self.norm2(attention, gate_msa.tanh())).to(x.dtype)
        mlp = self.feed_forward(self.ffn_norm1(x, 1 + scale_mlp))  # [B, N, d]
        return (x + self.ffn_norm2(mlp, gate_mlp.tanh())).to(x.dtype)

    def _attend(self, h: Tensor, keys_values: KeysValues, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Self-attention plus gated cross-attention, [B, N, d] -> [B, N, d]."""
        keys, values, null_value = keys_values
        cross_h = h if null_value is None else h[h.shape[0] // 2 :]  # what attends to null needs no queries
        q, k, v, cross_q = self.project(h, cross_h)  # [B, N, d or G h]
        own = attend(self.attn1.queries(q, rope), self.attn1.keys(k, rope), self.attn1.values(v))
        cross = attend(self.attn2.queries(cross_q, rope), keys, values)  # [B, H, N, h]
        gate = self.gate.tanh().to(cross.dtype).view(-1, 1, 1)
        if null_value is None:
            mixed = torch.addcmul(own, cross, gate)  # [B, H, N, h]
        else:
            own_null, own = own.unflatten(0, (2, -1))  # [B, H, N, h] twice
            null_value = null_value.repeat_interleave(own.shape[1] // null_value.shape[1], dim=1)
            mixed = torch.cat([own_null + null_value * gate, torch.addcmul(own, cross, gate)])
        return self.attn2.to_out[0](mixed.transpose(1, 2).flatten(2))  # [B, N, d]

    def project(self, h: Tensor, cross_h: Tensor) -> tuple[Tensor, ...]:
        """Self-attention's queries, keys, values of h, and cross-attention's queries of `cross_h`.

        The latter is h, or those of its samples that attend to a condition.
        """
        return self.attn1.to_q(h), self.attn1.to_k(h), self.attn1.to_v(h), self.attn2.to_q(cross_h)

    def project_condition(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Cross-attention's keys and values of the normed condition: [B, L, d] -> [B, L, G h] twice."""
        return self.attn2.to_k(condition), self.attn2.to_v(condition)

    # The next two are public so that FSDP can gather the weights for them (`register_fsdp_forward_method`).

    def encode(self, condition: Tensor) -> KeysValues:
        """Projected condition [B, L, d] -> keys and values [B, G, L, h]; no rotary embedding on them."""
        return self._keys_values(condition)

    def modulate(self, temb: Tensor) -> Tensor:
        """Embedded time and condition [..., min(d, 1024)] -> scales and gates [..., 4 d]."""
        return self._modulate(temb)

    def _modulate(self, temb: Tensor) -> Tensor:
        return self.norm1.linear(F.silu(temb))

    def _keys_values(self, condition: Tensor) -> KeysValues:
        k, v = self.project_condition(self.norm1_context(condition))  # [B, L, G h] twice
        return KeysValues(self.attn2.keys(k), self.attn2.values(v))  # [B, G, L, h] each


class Attention(nn.Module):
    """One attention's weights, and what follows its projections: LayerNorm across all heads, rotation."""

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
        return rotate(self.split_heads(self.norm_q(q)), rope)

    def keys(self, k: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Projected [B, L, G h] -> [B, G, L, h], rotated when `rope` is given."""
        keys = self.split_heads(self.norm_k(k))
        return rotate(keys, rope) if rope else keys

    def values(self, v: Tensor) -> Tensor:
        """Projected [B, L, G h] -> [B, G, L, h]."""
        return self.split_heads(v)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, L, H h] -> [B, H, L, h]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: linear_2(silu(linear_1 x) * linear_3 x), no biases."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(dim, inner_dim, bias=False)
        self.linear_2 = Linear(inner_dim, dim, bias=False)
        self.linear_3 = Linear(dim, inner_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.silu(self.linear_1(x)) * self.linear_3(x)  # [B, N, inner_dim]
        return self.linear_2(inner)  # [B, N, d]


class BlockModulation(NamedTuple):
    """A block's scales and gates [B, 4 d], as `NextDiTBlock.modulate` makes them."""

    joint: Tensor

    def parts(self) -> tuple[Tensor, ...]:
        """scale_msa, gate_msa, scale_mlp, gate_mlp: [B, 1, d] each."""
        return self.joint.unsqueeze(1).chunk(4, dim=-1)


class AdaptiveNorm(nn.Module):
    """RMSNorm times a scale, and the layer that makes this scale and the block's other modulations."""

    def __init__(self, dim: int, time_embed_dim: int, eps: float) -> None:
        super().__init__()
        self.linear = Linear(time_embed_dim, 4 * dim)
        self.norm = RMSNorm(dim, eps=eps)

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        return self.norm(x, factor)


class TimeCaptionEmbedding(nn.Module):
    """Time features plus the mean of the projected condition -> modulation input."""

    def __init__(self, dim: int, time_embed_dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayers(TIME_FREQUENCIES, time_embed_dim, F.silu)
        self.caption_embedder = nn.Sequential(LayerNorm(dim), Linear(dim, time_embed_dim))

    def pool(self, condition: Tensor) -> Tensor:
        """[B, L, d] -> [B, min(d, 1024)]."""
        return self.caption_embedder(condition.mean(dim=1))

    def forward(self, time_features: Tensor, pooled: Tensor) -> Tensor:
        return self.timestep_embedder(time_features) + pooled


class TwoLayers(nn.Module):
    """linear_2(activation(linear_1 x)): embeds the time features, and projects the condition."""

    def __init__(self, in_dim: int, dim: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear_1 = Linear(in_dim, dim)
        self.linear_2 = Linear(dim, dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


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

    def modulate(self, temb: Tensor) -> Tensor:
        """Embedded time and condition [..., min(d, 1024)] -> scale [..., d]."""
        return self.linear_1(F.silu(temb))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """[B, N, d], scale [B, d] -> [B, N, in_channels]."""
        return self.linear_2(self.norm(x.float()) * (1 + scale.unsqueeze(1).float()))


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(q k / sqrt(h)) v: [B, H, N, h], [B, G, L, h], [B, G, L, h] -> [B, H, N, h]. No mask."""
    grouped = keys.shape[1] != queries.shape[1]
    return F.scaled_dot_product_attention(queries, keys, values, enable_gqa=grouped)
