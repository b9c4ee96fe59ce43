"""The model a user holds: the transformer, the statistics of its data, and generation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from blip3o_dit.flow.path import (
    AffineSource,
    FlowBatch,
    PathSample,
    make_path,
    step_ends,
    time_grid,
    training_times,
)
from blip3o_dit.flow.predictions import convert_prediction
from blip3o_dit.flow.solvers import ADAPTIVE_SOLVER
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.model.cpu_kernels import use_cpu_kernels
from blip3o_dit.model.cuda_graphs import CUDAGraphs
from blip3o_dit.model.generation import checked_sampling, solve, solve_adaptively
from blip3o_dit.model.inputs import check_forward, conditions_of_data
from blip3o_dit.model.layers import without_autocast
from blip3o_dit.model.loading import StrictPreTrainedModel
from blip3o_dit.model.transformer import NextDiT
from blip3o_dit.ridge import context_sizes, relative_spread, source_features
from blip3o_dit.utils.stateless_random import draw_names, normal_of
from blip3o_dit.utils.validation import (
    check_compiler,
    check_finite_number,
    checked_integer,
    checked_integers,
)

logger = logging.getLogger(__name__)

GENERATION_STREAM = "generation noise"

STATISTICS = ["condition_mean", "condition_std", "target_mean", "target_std"]
SOURCE_BUFFERS = [f"source_{name}" for name in ("weight", "bias", "std", "components", "spread")]


class BLIP3oDiTModel(StrictPreTrainedModel):
    """Diffusion transformer from EVA-CLIP tokens to CLIP tokens, with everything inference needs.

    Three kinds of units: those of the data, which `generate` takes and returns; the network's, standardised,
    which `forward` takes and returns (`normalize_condition`, `normalize_target`, `denormalize_target`); and
    the flow's, which an informed source centres on its mean (`source_distribution`).

    The statistics of the training split (of its L2-normalised tokens with `config.normalize_embeddings`) are
    buffers of the model and travel in its safetensors file. Figures such as R2 are measured with them; with
    `config.standardize` they also lead to the network's units.

    Source: BLIP3-o, arXiv 2505.09568; see `transformer.py` for the network.
    """

    config_class = BLIP3oDiTConfig
    main_input_name = "hidden_states"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    config: BLIP3oDiTConfig
    condition_mean: Tensor
    condition_std: Tensor
    target_mean: Tensor
    target_std: Tensor
    source_weight: Tensor
    source_bias: Tensor
    source_std: Tensor
    source_components: Tensor
    source_spread: Tensor
    # bfloat16 would move a channel's mean by up to 0.4 %: the statistics stay float32 beside any weights.
    _keep_in_fp32_modules_strict = STATISTICS + SOURCE_BUFFERS
    _no_split_modules = ["NextDiTBlock"]  # noqa: RUF012 - PreTrainedModel declares a list

    def __init__(self, config: BLIP3oDiTConfig) -> None:
        super().__init__(config)
        self.dit = NextDiT(config)
        self._graphs: CUDAGraphs | None = None
        self.register_buffer("condition_mean", torch.zeros(config.eva_embedding_size))
        self.register_buffer("condition_std", torch.ones(config.eva_embedding_size))
        self.register_buffer("target_mean", torch.zeros(config.in_channels))
        self.register_buffer("target_std", torch.ones(config.in_channels))
        if config.flow.source != "noise":
            self._register_source(config)
        checkpointing = config.gradient_checkpointing
        self.post_init()  # applies config.gradient_checkpointing, and takes it out of the config
        config.gradient_checkpointing = checkpointing
        use_cpu_kernels(self)

    def _register_source(self, config: BLIP3oDiTConfig) -> None:
        """Buffers of the informed source; an unfitted one is pure noise."""
        width, components, flow = config.eva_embedding_size, config.flow.source_components, config.flow
        features = width + 8 * components
        if flow.sees_context:
            features = sum(context_sizes(width, components, config.num_tokens))
        self.register_buffer("source_weight", torch.zeros(features, config.in_channels))
        self.register_buffer("source_bias", torch.zeros(config.in_channels))
        self.register_buffer("source_std", torch.ones(config.in_channels))
        if components:
            self.register_buffer("source_components", torch.zeros(width, components))
        if config.flow.predicts_spread:
            self.register_buffer("source_spread", torch.zeros(2 * config.in_channels + 1, config.in_channels))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """All initialisation: Xavier for matrices, zero for biases, gates and output, identity for norms."""
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            for name, parameter in module.named_parameters(recurse=False):
                nn.init.constant_(parameter, 1.0 if name == "weight" else 0.0)
        elif isinstance(module, BLIP3oDiTModel):  # visited last
            self.dit.zero_gates_and_output()
            for name, buffer in self.named_buffers(recurse=False):
                nn.init.constant_(buffer, 1.0 if name.endswith("std") else 0.0)

    def _apply(self, fn: Any, recurse: bool = True) -> BLIP3oDiTModel:
        """`.to`, `.bfloat16`, `.cuda`, ...: the statistics keep their dtype; what was recorded goes."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self.get_buffer(name)
            if after.dtype != buffer.dtype and not buffer.is_meta:
                self._buffers[name] = buffer.to(after.device)
        use_cpu_kernels(self)
        self._graphs = self._graphs and CUDAGraphs()
        return self

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """None, as there is no vocabulary; accelerate asks before it shards a model."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the network computes in, here and now (see `layers.py`); it takes and returns float32."""
        return self.dit.compute_dtype

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        source_mean: Tensor | None = None,
        step_end: Tensor | None = None,
    ) -> Tensor:
        """One network call, in the network's units.

        Args:
            hidden_states: x_t [B, N, in_channels], N = input_size^2, row-major, float32.
            timestep: t [B] in [0, 1], float32; 0 is noise, 1 is data.
            encoder_hidden_states: normalised condition [B, L, eva_embedding_size].
            source_mean: R(c), the mean of an informed source, `source_distribution(condition).mean`
                [B, N, in_channels]; None computes it, which is right unless the condition was dropped.
            step_end: t' [B], where the step that begins at t ends, for a student of any number of steps.

        Returns: the prediction (`config.flow.prediction_type`), [B, N, in_channels], float32.

        Raises:
            ValueError: for other shapes, devices or dtypes; says the expected and the found one.
        """
        check_forward(self.config, self.device, hidden_states, timestep, encoder_hidden_states, source_mean)
        if source_mean is None:
            source_mean = self.source_distribution(encoder_hidden_states).mean
        return self.dit(hidden_states, timestep, encoder_hidden_states, source_mean, step_end)

    def normalize_condition(self, eva_embeddings: Tensor) -> Tensor:
        """Condition tokens [B, L, C] in the units of the data -> the network's units, float32."""
        return self._normalize(eva_embeddings, self.condition_mean, self.condition_std)

    def normalize_target(self, clip_embeddings: Tensor) -> Tensor:
        """Target tokens [B, N, C] in the units of the data -> the network's units, float32."""
        return self._normalize(clip_embeddings, self.target_mean, self.target_std)

    def denormalize_target(self, x_1: Tensor) -> Tensor:
        """Inverse of the standardisation in `normalize_target`; its L2 normalisation cannot be undone."""
        if not self.config.standardize:
            return x_1.float()
        return x_1.float() * self.target_std.float() + self.target_mean.float()

    def l2_normalize_if_configured(self, tokens: Tensor) -> Tensor:
        """Tokens [..., C] as training saw them before standardising: L2-normalised, if it did that."""
        tokens = tokens.float()
        return F.normalize(tokens, dim=-1) if self.config.normalize_embeddings else tokens

    @property
    def has_statistics(self) -> bool:
        """Whether the targets' statistics were set. A mean of 0 and a deviation of 1 throughout are none.

        Weights from elsewhere come without; so do models trained on raw features before `config.standardize`.
        """
        return bool((self.target_mean != 0).any() or (self.target_std != 1).any())

    def set_statistics(self, *, condition: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> None:
        """Store (mean, standard deviation) per channel, [C] each, of the training split as trained on."""
        self._fill_buffers("condition", mean=condition[0], std=condition[1])
        self._fill_buffers("target", mean=target[0], std=target[1])

    def set_source(
        self,
        *,
        weight: Tensor,
        bias: Tensor,
        std: Tensor,
        components: Tensor | None,
        spread: Tensor | None = None,
    ) -> None:
        """Store a ridge regression in the network's units, and its residual's deviation per channel.

        Shapes: weight [F, C] (`source_features`), bias [C], std [C], components [C_eva, r] of other
        tokens, spread [2 C + 1, C] for a source that predicts it (`relative_spread`).
        """
        self._fill_buffers("source", weight=weight, bias=bias, std=std)
        more = {"components": components, "spread": spread}
        self._fill_buffers("source", **{name: value for name, value in more.items() if value is not None})

    def _fill_buffers(self, prefix: str, **values: Tensor) -> None:
        for name, value in values.items():
            buffer = self.get_buffer(f"{prefix}_{name}")
            if value.shape != buffer.shape:
                expected, found = tuple(buffer.shape), tuple(value.shape)
                raise ValueError(f"{prefix}_{name}: expected shape {expected}, found {found}")
            buffer.copy_(value)

    def source_distribution(self, condition: Tensor) -> AffineSource:
        """Where the path of these samples starts, given normalised conditions [B, L, C_eva]; float32."""
        if self.config.flow.source == "noise":
            return AffineSource()
        with without_autocast(condition.device):
            features = self.source_features(condition.float())
            mean = features @ self.source_weight + self.source_bias
            if not self.config.flow.predicts_spread:
                return AffineSource(mean, self.source_std)
            return AffineSource(mean, self.source_std * relative_spread(mean, self.source_spread))

    def source_features(self, condition: Tensor) -> Tensor:
        """What the source's mean is linear in, [B, N, F], of normalised float32 conditions [B, L, C_eva]."""
        flow = self.config.flow
        components = self.source_components if flow.source_components else None
        return source_features(condition, components, flow.sees_context)

    def record_generation(self) -> None:
        """On a GPU, launch all kernels of a generation together, from its second batch of a size on."""
        if self.device.type == "cuda":
            self._graphs = CUDAGraphs()

    def compile_for_generation(self) -> None:
        """`record_generation`, and torch.compile's blocks; the first call takes up to a minute longer.

        Raises:
            ValueError: when there is nothing to compile with.
        """
        check_compiler("compile", self.device)
        logger.info("compiling the network: its first call takes up to a minute")
        self.dit.compile_blocks()
        self.record_generation()

    def flow_batch(
        self,
        eva: Tensor,
        clip: Tensor,
        noise: Tensor,
        u_time: Tensor,
        *,
        u_dropout: Tensor | None = None,
        source_of: Callable[[Tensor], AffineSource] | None = None,
    ) -> FlowBatch[PathSample]:
        """Pairs of the data, put on their path: what a loss is taken of. Nothing random happens here.

        Args:
            eva, clip: [B, L, C_eva] and [B, N, C], in the units of the data.
            noise: N(0, 1), [B, N, C].
            u_time, u_dropout: uniform in [0, 1), [B]. The first becomes the times; a sample whose second is
                under `config.flow.condition_dropout` loses its condition (None: no sample does).
            source_of: where the paths start, given normalised conditions; by default
                `source_distribution`. Training has one that has not seen the samples.
        """
        flow = self.config.flow
        condition = self.normalize_condition(eva.to(self.device))
        source = (source_of or self.source_distribution)(condition)
        x_1 = source.to_flow(self.normalize_target(clip.to(self.device)))
        t = training_times(u_time, flow)
        sample = make_path(flow).sample(x_1, noise.to(self.device), t.to(self.device))
        if u_dropout is not None and flow.condition_dropout > 0:
            keep = u_dropout >= flow.condition_dropout
            condition = condition * keep[:, None, None]
        return FlowBatch(sample, source, condition)

    @torch.no_grad()
    def generate(
        self,
        eva_embeddings: Tensor | np.ndarray,
        *,
        num_inference_steps: int | None = None,
        solver: str | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        tolerance: float = 1e-4,
        noise_scale: float | None = None,
        seed: int = 0,
        sample_index: Sequence[int] | None = None,
        sample_number: int = 0,
        progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
    ) -> Tensor:
        """Sample CLIP tokens given EVA-CLIP tokens, by integrating the velocity from noise to data.

        The noise of a row is a function of (seed, sample number, its sample index), so a sample does not
        depend on the batch it travels in. Other sample numbers give further samples of the same conditions.

        Args:
            eva_embeddings: [B, L, eva_embedding_size], in the units of the training data; of any device.
            num_inference_steps: intervals of the solver; euler costs one network call each, midpoint and
                heun two. Default: `config.default_steps`.
            solver: "euler", "midpoint", "heun", or "dopri5", which chooses its steps by `tolerance` and takes
                no num_inference_steps (it needs torchdiffeq). Default: `config.default_solver`.
            guidance_scale: classifier-free guidance, v = v_null + s (v_cond - v_null); 1 turns it off.
                Other values need a model trained with condition_dropout > 0, and double the batch.
            guidance_interval: guidance acts in the steps that begin at low <= t < high (arXiv 2404.07724).
            noise_scale: so many times the noise; 1 leaves out what calibration found. Default:
                `config.flow.noise_scale`.
            seed, sample_number, sample_index: determine the noise; sample_index defaults to 0..B-1.
            progress: wraps the iterable of steps, for a progress bar.

        Returns: [B, N, in_channels] float32, in the units of the training data: of length 1 each if training
            L2-normalised the tokens.

        Raises:
            ValueError: for shapes, names or values that do not fit; says expected and found.
        """
        solver, steps, guidance = checked_sampling(
            self.config, num_inference_steps, solver, guidance_scale, guidance_interval
        )
        scale = self.config.flow.noise_scale if noise_scale is None else noise_scale
        check_finite_number("noise_scale", scale)
        names, eva = self._draw(eva_embeddings, seed, sample_index, sample_number)
        if not len(eva):
            return torch.empty(0, self.config.num_tokens, self.config.in_channels, device=self.device)
        if solver == ADAPTIVE_SOLVER:
            check_finite_number("tolerance", tolerance)
            if num_inference_steps is not None:
                raise ValueError(
                    f"num_inference_steps: expected none with solver {solver} (it has a tolerance)"
                )
            return solve_adaptively(self, names, eva, guidance, tolerance, scale)
        recorder = self._graphs if progress is None else None
        return solve(self, names, eva, guidance, steps, solver, scale, recorder=recorder, progress=progress)

    def tokens_of(self, x_1: Tensor, source: AffineSource) -> Tensor:
        """What the flow ends in [B, N, C] -> tokens in the units of the data."""
        tokens = self.denormalize_target(source.from_flow(x_1))
        return F.normalize(tokens, dim=-1) if self.config.normalize_embeddings else tokens

    @torch.no_grad()
    def predict_mean(
        self,
        eva_embeddings: Tensor | np.ndarray,
        *,
        seed: int = 0,
        sample_index: Sequence[int] | None = None,
        sample_number: int = 0,
    ) -> Tensor:
        """The mean E[x_1 | condition] by one network call at t = 0, where x_t tells nothing of x_1.

        Returns: [B, N, in_channels] float32, in the units of the training data. An average of tokens of
            length 1 is shorter than 1.

        Raises:
            ValueError: for a model that predicts the noise, which says nothing of x_1 at t = 0, and for a
                distilled one, which predicts where its step ends.
        """
        flow = self.config.flow
        if flow.student_steps:
            raise ValueError(
                "estimate: expected a model that is not distilled, found a student of "
                f"{flow.student_steps} steps"
            )
        if not flow.prediction.gives_mean_at_noise:
            raise ValueError(
                f"estimate: expected prediction_type v_prediction or sample, found {flow.prediction_type}"
            )
        names, eva = self._draw(eva_embeddings, seed, sample_index, sample_number)
        x_0, condition = self.initial_state(self.noise_of(names), eva)
        t = torch.zeros(len(x_0), device=x_0.device)
        source = self.source_distribution(condition)
        velocity = self.make_velocity_fn(condition, source)(x_0, t)
        x_1 = convert_prediction(
            velocity, x_0, t, make_path(flow), from_type="v_prediction", to_type="sample"
        )
        return self.denormalize_target(source.from_flow(x_1))

    def noise_of(self, names: Tensor) -> Tensor:
        """N(0, 1), [B, N, C], of its names (`draw_names`)."""
        sizes = self.config.num_tokens, self.config.in_channels
        return normal_of(names.to(self.device), sizes, one_kernel=True)

    def initial_state(self, noise: Tensor, eva: Tensor, noise_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """x_0 [B, N, C] in the flow's units, and the condition in the network's [B, L, C_eva]."""
        x_0 = noise_scale * make_path(self.config.flow).initial_point(noise)
        return x_0, self.normalize_condition(eva.to(self.device))

    def _draw(
        self,
        eva_embeddings: Tensor | np.ndarray,
        seed: int,
        sample_index: Sequence[int] | None,
        sample_number: int,
    ) -> tuple[Tensor, Tensor]:
        """The noise's names, and the conditions as floats, in the data's units, where they are."""
        eva = conditions_of_data(self.config, eva_embeddings)
        batch = len(eva)
        indices = checked_integers(
            "sample_index", range(batch) if sample_index is None else sample_index, batch
        )
        names = draw_names(
            indices,
            seed=checked_integer("seed", seed),
            stream=GENERATION_STREAM,
            counter=checked_integer("sample_number", sample_number),
        )
        return names, eva

    def make_velocity_fn(
        self,
        condition: Tensor,
        source: AffineSource,
        guidance_scale: float = 1.0,
        times: Tensor | None = None,
        steps: int = 1,
    ) -> Callable[..., Tensor]:
        """v(y, t) in the flow's units for one batch, whose conditions are encoded here.

        Guidance replaces the condition that the network attends to; the source stays, as in training. Called
        as v(y, t, guided=False) it is left out. With `times` [K], t is one of them for all of a batch, and
        what depends on it is computed here. `steps`: how many a student takes, if it may take any number.
        """
        flow = self.config.flow
        own = flow.student_steps
        grid = (
            time_grid(own if isinstance(own, int) else steps, flow.time_shift, condition.device)
            if own
            else None
        )

        def end_of(t: Tensor | None) -> Tensor | None:
            return None if t is None or grid is None else step_ends(t, grid)

        encoded = self.dit.encode_condition(condition, source.mean, times, end_of(times))
        if guidance_scale != 1.0:
            null = self.dit.encode_condition(condition.new_zeros(1, *condition.shape[1:]), times=times)
            both = encoded.with_null_condition(null)
        path = make_path(flow)

        def velocity(y: Tensor, t: Tensor, *, guided: bool = True) -> Tensor:
            x = source.from_flow(y)
            if guided and guidance_scale != 1.0:
                joint = self.dit.predict(torch.cat([x, x]), torch.cat([t, t]), both)
                null, prediction = joint.unflatten(0, (2, -1))  # of any batch, for a graph
                # The conversion to a velocity is affine in the prediction: guiding either is the same.
                prediction = null + guidance_scale * (prediction - null)
            else:
                prediction = self.dit.predict(x, t, encoded, end_of(t))
            return convert_prediction(
                prediction, y, t, path, from_type=flow.prediction_type, to_type="v_prediction", end=end_of(t)
            )

        return velocity

    def _normalize(self, tokens: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        tokens = self.l2_normalize_if_configured(tokens)
        return (tokens - mean.float()) / std.float() if self.config.standardize else tokens


AutoConfig.register(BLIP3oDiTConfig.model_type, BLIP3oDiTConfig, exist_ok=True)
AutoModel.register(BLIP3oDiTConfig, BLIP3oDiTModel, exist_ok=True)
