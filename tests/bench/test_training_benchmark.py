"""The benchmark of training steps: contenders agree, and a wrong one is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from bench.training import cases, command, contenders, profile
from fastmetro.models import FastMETRO


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compact network in place of the large ones."""

    def build(case: cases.Case, device: torch.device) -> FastMETRO:
        from fastmetro.models import create_model

        torch.manual_seed(0)
        return create_model("fastmetro-compact").to(device).train()

    monkeypatch.setattr(command, "build_model", build)


OPTIONS = ["--cases", "s-r50", "--batch", "2", "--seconds", "0.01", "--rounds", "1", "--device", "cpu"]


def test_rows(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "training.csv"
    command.main([*OPTIONS, "--csv", str(path), "--contenders", "published", "ours, not compiled"])
    command.main([*OPTIONS, "--csv", str(path), "--contenders", "published", "ours, not compiled"])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["contender"], row["status"]) for row in rows] == [("published", "ok"), ("ours, not compiled", "ok")]
    assert all(float(row["step_ms"]) > 0 for row in rows)
    assert "published: ready after" in capsys.readouterr().out


def test_where_a_step_spends_its_time(small: None, tmp_path: Path) -> None:
    path, kernels = tmp_path / "training.csv", tmp_path / "kernels.json"
    for name in ("published", "ours, not compiled"):
        command.main([*OPTIONS, "--csv", str(path), "--contenders", name, "--profile", str(kernels)])
    found = json.loads(kernels.read_text())
    assert list(found) == ["s-r50, published", "s-r50, ours, not compiled"]
    for one in found.values():
        assert one["commit"] and one["by_kind_us"]["convolutions"] > 0 and "aten::" in one["kernels"][0][0]
        assert sum(one["by_kind_us"].values()) == pytest.approx(one["total_us"], abs=1)
        assert sum(time for _, _, time, _ in one["kernels"]) == pytest.approx(one["total_us"], abs=5)
        times = [time for _, _, time, _ in one["kernels"][:-1]]
        assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x64x64", "convolutions"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float>", "batch norms"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN", "products"),
        ("triton_red_fused_add_native_layer_norm_12", "layer norms"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "update"),
        ("void fm::attention::backward_kernel<64>", "attention"),
        ("triton_per_fused__to_copy_add_native_dropout_backward_native_layer_norm_backward_view_43", "layer norms"),
        ("void at::native::(anonymous namespace)::max_pool_backward_nhwc<c10::BFloat16, float>", "pooling"),
        ("triton_poi_fused__to_copy_view_3", "compiled, fused"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies and fills"),
        ("adamw_update_kernel", "update"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64_1x4x1", "attention"),
        ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*)", "attention"),
        ("residual_norm_backward_kernel", "layer norms"),
        ("biased_relu_dropout_kernel", "dropout"),
        ("triton_poi_fused_native_dropout_relu_view_102", "compiled, fused"),
        ("void at::native::vectorized_elementwise_kernel<4>", "others"),
    ],
)
def test_what_kernels_do(name: str, kind: str) -> None:
    assert profile.kind_of(name) == kind


def test_kernels_that_run_beside_others_have_the_time_that_they_add() -> None:
    """Launched early, on a second stream, within another, and after a pause."""
    runs = [("second", 8, 15), ("first", 0, 10), ("inner", 11, 14), ("first", 20, 21), ("second", 20.5, 22)]
    found = profile.own_times(profile.Run(*run) for run in runs)
    assert found == {"first": (2, 11, 5), "second": (2, 6, 0), "inner": (1, 0, 0)}
    assert sum(one.microseconds for one in found.values()) == 15 + 2
    assert profile.own_times([]) == {}
    told = profile.summary(found)
    assert told["waited_us"] == 5 and told["total_us"] == 17 and told["kernels"][0] == ["first", 2, 11, 5]


def test_a_wrong_contender_is_refused(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(model: FastMETRO, mask: str) -> FastMETRO:
        plain = original(model, mask)
        with torch.no_grad():
            plain.xyz_regressor.weight.mul_(5)
        return plain

    original = contenders._plain
    monkeypatch.setattr(contenders, "_plain", broken)
    path = tmp_path / "training.csv"
    command.main([*OPTIONS, "--csv", str(path), "--contenders", "published", "compiled"])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["ok", "failed"] and "its first loss is" in rows[1]["reason"]


def test_every_contender_starts_with_the_same_loss_and_gradient() -> None:
    """To bfloat16's rounding: dropout is off in all of them, and on again afterwards."""
    from fastmetro.models import create_model

    torch.manual_seed(0)
    model = create_model("fastmetro-compact").train()
    images, labels = cases.random_batch(model.mesh, 2, torch.device("cpu"))
    expected = command.first_values("published", model, images, labels)
    assert command.first_values("published", model, images, labels) == expected
    for name in contenders.NAMES[1:]:
        loss, norm = command.first_values(name, model, images, labels)
        assert loss == pytest.approx(expected[0], rel=2e-3) and norm == pytest.approx(expected[1], rel=0.03), name
    assert model.config.dropout == 0.1 and model.transformer_1.encoder.layers[0].dropout == 0.1


def test_the_report_names_targets() -> None:
    row = {"case": "s-r50", "contender": "compiled", "step_ms": "15", "times_ours": "1.6", "peak_mib": "1"}
    row["reason"] = ""
    assert "s-r50 against compiled: at least 1.5x, 1.6, reached" in command.report([row])
    assert "MISSED" in command.report([{**row, "times_ours": "1.4"}])


def test_the_fastest_of_ours_is_compared() -> None:
    rows = [
        {"case": "s-r50", "contender": name, "step_ms": time, "times_ours": "", "peak_mib": "", "reason": ""}
        for name, time in (("compiled", "9"), ("ours", "11"), ("ours, all", "10.5"), ("ours, two streams", ""))
    ]
    assert "s-r50: the fastest of ours is 'ours, all'" in command.report(rows)
    samples = [("compiled", [[1.0]]), ("ours", [[5.0, 9.0]]), ("ours, all", [[4.0], [5.0]]), ("ourselves", [[1.0]])]
    assert command._fastest_of_ours(samples) == [[4.0], [5.0]] and command._fastest_of_ours(samples[:1]) is None


def test_all_of_ours_has_weights_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients are taken as they are."""
    from fastmetro.models import create_model
    from fastmetro.models.backbones import overlap

    used: list[torch.dtype] = []
    accumulate = overlap._accumulate

    def noted(parameter: torch.Tensor, found: torch.Tensor) -> None:
        accumulate(parameter, found)
        used.append(found.dtype if parameter.grad is None else parameter.grad.dtype)

    monkeypatch.setattr(overlap, "_accumulate", noted)
    torch.manual_seed(0)
    model = create_model("fastmetro-compact").train()
    images, labels = cases.random_batch(model.mesh, 2, torch.device("cpu"))
    for name, dtype in (("ours, all", torch.bfloat16), ("ours, two streams", torch.float32)):
        used.clear()
        contenders.build(name, model, images, labels, eager=True).run()
        assert used and set(used) == {dtype}, name


def test_every_vertex_as_a_token() -> None:
    mesh = cases.full_mesh(900)
    assert [level.num_vertices for level in mesh.levels] == [900] and mesh.topology.num_vertices == 900
    assert mesh.joint_regressor is not None and abs(mesh.joint_regressor.sum(1) - 1).max() < 1e-5
