"""A profile is sorted into kinds that sum to the whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from benchmarks.split import PYTHON, Piece, kind_of, longest, pieces_of, sorted_out, split_training

COPY = "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}"
NAMES = {
    # What torch, cuBLAS, cuDNN and Triton call their kernels on an H100.
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT": "products",
    "nvjet_tst_64x64_64x8_2x1_v_bz_splitK_TNT": "products",
    "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize128x128x8_stage3_warpsize2x2x1_ffma": "products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>": "products",
    "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, float, 128, 16>": "products",
    "attend": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x64x64": "attention",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<(bool)1>": "attention",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
    "FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor<float, 4>>": "optimizer, clipping, averages",
    "void at::native::lpnorm_cleanup<float, (at::native::NormType)1, float>": "optimizer, clipping, averages",
    f"void at::native::unrolled_elementwise_kernel<{COPY}>": "casts and copies",
    "void at::native::vectorized_elementwise_kernel<8, bfloat16_copy_kernel_cuda>": "casts and copies",
    "Memcpy DtoD (Device -> Device)": "casts and copies",
    "Memcpy HtoD (Pinned -> Device)": "data",
    "add_and_norm": "element-wise",
    "norm_statistics": "element-wise",
    "swiglu": "element-wise",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": "element-wise",
    # Recorded on a CPU.
    "aten::addmm": "products",
    "aten::addmm_": "products",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
    "aten::_fused_adamw_": "optimizer, clipping, averages",
    "aten::_foreach_lerp_": "optimizer, clipping, averages",
    "aten::_foreach_norm": "optimizer, clipping, averages",
    "Optimizer.step#AdamW.step": "optimizer, clipping, averages",
    "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__": "data",
    "aten::copy_": "casts and copies",
    "aten::_unsafe_view": PYTHON,
    "aten::to": PYTHON,
    "aten::empty_strided": PYTHON,
    "aten::mul": "element-wise",
    "aten::tanh": "element-wise",
    "aten::addcmul_": "element-wise",
    "aten::native_layer_norm_backward": "element-wise",
}


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_says_what_a_kernel_or_operator_is(name: str) -> None:
    assert kind_of(name) == NAMES[name]


def event(name: str, microseconds: float, parent: Any = None, device: Any = DeviceType.CPU) -> Any:
    return SimpleNamespace(
        name=name,
        device_type=device,
        cpu_parent=parent,
        self_cpu_time_total=microseconds,
        time_range=SimpleNamespace(elapsed_us=lambda: microseconds),
    )


def test_what_an_optimizer_or_a_loader_calls_is_theirs() -> None:
    step, load = event("Optimizer.step#AdamW.step", 1.0), event("enumerate(DataLoader)#x.__next__", 2.0)
    inside = event("aten::mul", 4.0, event("aten::mul_", 0.0, step))
    events = [step, inside, load, event("aten::copy_", 8.0, load), event("aten::mul", 16.0)]
    pieces, _ = pieces_of(events)
    rows = {row["part"]: row["ms"] for row in sorted_out(pieces, 0.1, 0.0, times=1)}
    assert rows == pytest.approx(
        {"optimizer, clipping, averages": 0.005, "data": 0.010, "element-wise": 0.016, PYTHON: 0.069}
    )


def test_on_a_gpu_the_kernels_count_and_the_rest_is_waiting_for_the_loader_or_for_launches() -> None:
    gpu = DeviceType.CUDA
    events = [
        event("aten::mm", 5.0),
        event("enumerate(DataLoader)#x.__next__", 20.0),
        event("enumerate(DataLoader)#x.__next__", 90.0, device=gpu),  # the same range, shown there
        event("nvjet_tst_128x256", 40.0, device=gpu),
        event(f"void at::native::elementwise_kernel<{COPY}>", 10.0, device=gpu),
    ]
    pieces, loader = pieces_of(events)
    assert (loader, [piece.name for piece in pieces]) == (
        20.0,
        ["nvjet_tst_128x256", f"void at::native::elementwise_kernel<{COPY}>"],
    )
    rows = {row["part"]: row["ms"] for row in sorted_out(pieces, 0.1, 0.02, times=1)}
    assert rows == pytest.approx({"data": 0.02, "products": 0.04, "casts and copies": 0.01, "launches": 0.03})
    assert sum(rows.values()) == pytest.approx(0.1)


def test_the_longest_kernels_have_short_names() -> None:
    name = "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float>>(int)"
    (row,) = longest([Piece(name, "element-wise", 500.0), Piece(name, "element-wise", 500.0)], 2.0, times=2)
    assert row == {
        "part": "element-wise: vectorized_elementwise_kernel BinaryFunctor",
        "ms": 0.5,
        "share": 0.25,
        "count": 1.0,
    }


def test_a_step_of_the_trainer_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"model_dim": 32, "num_layers": 1, "num_heads": 2, "in_channels": 24, "eva_embedding_size": 40}
    rows = {
        row["part"]: row
        for row in split_training(sizes | {"input_size": 4}, 4, steps=1, warm_up=1, device="cpu")
    }
    whole = rows.pop("together")["ms"]
    assert sum(row["ms"] for row in rows.values()) == pytest.approx(whole)
    # AdamW, clipping, the norm and the averages of every step; one loader call.
    assert rows["optimizer, clipping, averages"]["count"] >= 5
    assert {"data", "products", "attention", "casts and copies", "element-wise"} <= set(rows)
    assert rows[PYTHON]["ms"] > 0
