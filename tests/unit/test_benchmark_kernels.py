"""What a step's time on a GPU goes to, from names of kernels."""

import pytest

from benchmarks.kernels import REST, kernel_rows, kind_of


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("_backward_keys", "attention"),
        ("_row", "softmax and loss"),
        ("pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("triton_red_fused__softmax_backward_data_0", "softmax and loss"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer and averaged weights"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "messages between GPUs"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("triton_poi_fused_add_mul_3", REST),
    ],
)  # fmt: skip
def test_a_kernel_is_of_a_kind(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_kinds_add_up_to_a_step() -> None:
    kernels = [("gemm_a", 4_000.0, 8), ("gemm_b", 2_000.0, 4), ("triton_poi_fused_mul", 1_000.0, 40)]
    rows = kernel_rows(kernels, steps=2, ms_per_step=4.0)
    assert [row["kind"] for row in rows] == ["matrix products", REST, "no kernel"]
    assert [row["ms_per_step"] for row in rows] == pytest.approx([3.0, 0.5, 0.5])
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    assert (rows[0]["calls_per_step"], rows[0]["largest"]) == (6.0, "gemm_a")


def test_kernels_that_overlap_leave_no_time_without_one() -> None:
    assert kernel_rows([("gemm", 9_000.0, 1)], steps=1, ms_per_step=4.0)[-1]["ms_per_step"] == 0.0
