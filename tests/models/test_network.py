"""The network as a module: outputs, gradients on every backend, precision, compilation, copies, errors."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from backends_here import available
from torch import Tensor, nn

from fastmetro.models import FastMETRO, FastMETROConfig, create_model

SMALL = FastMETROConfig("small", layers=1, widths=(32, 16), feedforward=(48, 32), heads=2)
BACKENDS = ["dense", "reference", "native", "triton"]
FLOAT64 = ["reference", "native"]


class Trunk(nn.Module):
    """[B, 3, 32 h, 32 w] -> [B, 8, h, w]."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 32, stride=32)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images)


def small(mesh: Any, device: torch.device | str = "cpu", **options: Any) -> FastMETRO:
    torch.manual_seed(0)
    return FastMETRO(replace(SMALL, **options), Trunk(), mesh).to(device)


def images(batch: int = 2, size: int = 224, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)


def need(attention: str, device: torch.device) -> None:
    if attention not in available(device):
        pytest.skip(f"attention={attention!r} cannot run on {device} here")


def gradients(model: FastMETRO, x: Tensor) -> dict[str, Tensor]:
    out = model(x)
    sum(
        (value * torch.linspace(-1, 1, value.numel(), device=x.device).view_as(value)).sum() for value in out.values()
    ).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of any gradient, in the Euclidean norm. In pre-norm layers without biases on the
    keys some gradients vanish; those are measured against the mean norm."""
    assert actual.keys() == expected.keys()
    mean = torch.stack([value.double().norm() for value in expected.values()]).mean()
    return max(
        float((actual[n].double() - g.double()).norm() / torch.maximum(g.double().norm(), 1e-3 * mean))
        for n, g in expected.items()
    )


def outputs_of(part: str) -> dict[str, tuple[int, ...]]:
    middle = {"pred_3d_vertices_intermediate": (2, 20, 3)} if part == "body" else {}
    return {
        "pred_cam": (2, 3),
        "pred_3d_joints": (2, 3, 3),
        "pred_3d_vertices_coarse": (2, 12, 3),
        **middle,
        "pred_3d_vertices_fine": (2, 30 if part == "body" else 20, 3),
    }


@pytest.mark.parametrize("upsampling", ["fixed", "released", "learned"])
@pytest.mark.parametrize("part", ["body", "hand"])
def test_outputs(part: str, upsampling: str, tiny: Any) -> None:
    mesh = tiny if part == "body" else replace(tiny, upsampling=tiny.upsampling[:1])
    model = small(mesh, upsampling=upsampling).eval()
    out = model(images())
    assert {key: tuple(value.shape) for key, value in out.items()} == outputs_of(part)
    learned = {
        name.partition(".")[0] for name in model.state_dict() if "2" in name.partition(".")[0] and "upsample" in name
    }
    expected = {
        ("body", "fixed"): set(),
        ("body", "released"): {"coarse2intermediate_upsample"},
        ("body", "learned"): {"coarse2intermediate_upsample", "intermediate2fine_upsample"},
        ("hand", "fixed"): set(),
        ("hand", "released"): set(),
        ("hand", "learned"): {"coarse2fine_upsample"},
    }
    assert learned == expected[part, upsampling]
    coarse = out["pred_3d_vertices_coarse"].detach().numpy()
    if upsampling == "fixed":
        for matrix, key in zip(
            mesh.upsampling, [key for key in outputs_of(part) if key[-1] == "e" and "coarse" not in key], strict=True
        ):
            coarse = np.stack([matrix @ sample for sample in coarse])
            np.testing.assert_allclose(out[key].detach().numpy(), coarse, rtol=1e-5, atol=1e-6)
    elif part == "body":
        layer = model.coarse2intermediate_upsample
        expected_middle = nn.functional.linear(out["pred_3d_vertices_coarse"].mT, layer.weight, layer.bias).mT
        torch.testing.assert_close(out["pred_3d_vertices_intermediate"], expected_middle)


def test_mesh_without_upsampling(tiny: Any) -> None:
    out = small(replace(tiny, upsampling=())).eval()(images())
    assert torch.equal(out["pred_3d_vertices_fine"], out["pred_3d_vertices_coarse"])


@pytest.mark.parametrize("attention", FLOAT64)
@pytest.mark.parametrize(
    "options", [{"layers": 2}, {"masking": "half-heads"}, {"upsampling": "learned", "widths": (32, 32)}], ids=str
)
def test_gradients_agree_in_float64(options: dict[str, Any], attention: str, tiny: Any) -> None:
    need(attention, torch.device("cpu"))
    grads = [
        gradients(small(tiny, attention=name, dropout=0.0, **options).double().train(), images().double())
        for name in ("dense", attention)
    ]
    assert len(grads[0]) == len(list(small(tiny, **options).parameters()))
    assert worst(grads[1], grads[0]) < 1e-11


@pytest.mark.parametrize("attention", BACKENDS[1:])
def test_gradients_in_float32_are_as_good_as_dense_ones(attention: str, tiny: Any, device: torch.device) -> None:
    need(attention, device)
    exact = gradients(
        small(tiny, device, attention="dense", dropout=0.0).double().train(), images(device=device).double()
    )
    dense, actual = (
        gradients(small(tiny, device, attention=name, dropout=0.0).train(), images(device=device))
        for name in ("dense", attention)
    )
    assert worst(actual, exact) <= 2 * worst(dense, exact) + 2e-6


@pytest.mark.parametrize("attention", BACKENDS[1:])
def test_gradients_of_the_published_hand(attention: str, hand: Any, device: torch.device) -> None:
    need(attention, device)
    if attention == "triton" and device.type == "cpu":
        pytest.skip("half a minute in Triton's interpreter; the small network covers it")
    features = torch.randn(1, 2048, 7, 7, generator=torch.Generator().manual_seed(2)).relu().to(device)
    grads = []
    for name in ("dense", attention):
        torch.manual_seed(0)
        model = create_model("fastmetro-s", nn.Identity(), hand, attention=name, dropout=0.0)
        grads.append(gradients(model.to(device).train(), features))
    assert worst(grads[1], grads[0]) < 1e-4


@pytest.mark.parametrize("attention", BACKENDS)
def test_training_with_dropout_repeats_with_the_seed(attention: str, tiny: Any, device: torch.device) -> None:
    need(attention, device)
    model = small(tiny, device, attention=attention).train()
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(model(images(device=device))["pred_3d_vertices_fine"])
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["cast", "autocast"])
def test_half_precision(way: str, dtype: torch.dtype, attention: str, tiny: Any, device: torch.device) -> None:
    need(attention, device)
    if attention == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("bfloat16 is wrong in Triton's interpreter")
    model = small(tiny, device, attention=attention, upsampling="released").eval()
    x = images(device=device)
    with torch.inference_mode():
        expected = model(x)
        if way == "cast":
            out = copy.deepcopy(model).to(dtype)(x.to(dtype))
        else:
            with torch.autocast(device.type, dtype=dtype):
                out = model(x)
    for key, value in out.items():
        assert value.dtype == torch.float32, key
        error = (value - expected[key]).abs().max() / expected[key].abs().max()
        assert error < 20 * torch.finfo(dtype).eps, key


@pytest.mark.parametrize("attention", ["dense", "native", "triton"])
def test_compiles_as_one_graph(attention: str, tiny: Any, device: torch.device) -> None:
    need(attention, device)
    if attention == "triton" and device.type == "cpu":
        pytest.skip("Triton's interpreter cannot be traced")
    model = small(tiny, device, attention=attention).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(device=device)), model(images(device=device)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["dense", "native", "triton"])
def test_a_compiled_training_step_has_the_same_gradients(attention: str, tiny: Any, device: torch.device) -> None:
    need(attention, device)
    if attention == "triton" and device.type == "cpu":
        pytest.skip("Triton's interpreter cannot be traced")
    model = small(tiny, device, attention=attention, dropout=0.0).train()
    x = images(device=device)
    expected = {name: gradient.clone() for name, gradient in gradients(model, x).items()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    sum(
        (value * torch.linspace(-1, 1, value.numel(), device=x.device).view_as(value)).sum() for value in out.values()
    ).backward()
    actual = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert worst(actual, expected) < 1e-4


def test_copies_and_pickles(tiny: Any) -> None:
    model = small(tiny, smpl_head=True).eval()
    expected = model(images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(images()), expected)
    assert copy.deepcopy(model).token_attention.topology is not model.token_attention.topology


def test_smpl_head_sends_no_gradient_to_the_mesh(tiny: Any) -> None:
    model = small(tiny, smpl_head=True).train()
    out = model(images())
    assert out["pred_rotmat"].shape == (2, 24, 3, 3) and out["pred_betas"].shape == (2, 10)
    (out["pred_rotmat"].sum() + out["pred_betas"].sum()).backward()
    reached = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {"smpl_parameter_regressor"}


def test_state_dict_holds_parameters_and_batch_norm_only(tiny: Any) -> None:
    model = small(tiny, attention="dense", smpl_head=True)
    parameters = {name for name, _ in model.named_parameters()}
    assert {name.rpartition(".")[2] for name in set(model.state_dict()) - parameters} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_moving_one_network_leaves_the_mesh_alone(tiny: Any) -> None:
    model = small(tiny)
    assert model.token_attention.topology is not tiny.topology
    model.to("meta")
    assert tiny.topology.columns.device.type == "cpu"


@pytest.mark.parametrize("attention", BACKENDS[:3])
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch: int, attention: str, tiny: Any) -> None:
    need(attention, torch.device("cpu"))
    out = small(tiny, attention=attention).eval()(images(batch))
    assert all(value.shape[0] == batch for value in out.values())


def test_other_image_sizes_have_positions_of_their_own(tiny: Any) -> None:
    model = small(tiny).eval()
    x = images(1, 96)
    cells = x.unflatten(3, (3, 32)).flip(3).flatten(3, 4)  # the same image tokens in another order
    assert not torch.allclose(model(x)["pred_cam"], model(cells)["pred_cam"], atol=1e-3)
    with torch.no_grad():
        model._position = lambda stage, grid: torch.zeros(9, SMALL.widths[stage - 1])  # type: ignore[method-assign]
        torch.testing.assert_close(model(x)["pred_cam"], model(cells)["pred_cam"])


def test_a_few_steps_of_training_lower_the_loss(tiny: Any) -> None:
    model = small(tiny, upsampling="released").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    target = {key: torch.randn_like(value) for key, value in model(images()).items()}
    losses = []
    for _ in range(8):
        loss = sum(((value - target[key]) ** 2).mean() for key, value in model(images()).items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "fastmetro-xl"},
            "'fastmetro-s', 'fastmetro-m', 'fastmetro-l', 'fastmetro-compact', got 'fastmetro-xl'",
        ),
        ({"backbone": "vgg"}, "'resnet50', 'hrnet-w64', 'compact' or an nn.Module, got 'vgg'"),
        ({"upsampling": "bilinear"}, "upsampling must be one of 'fixed', 'released', 'learned', got 'bilinear'"),
        ({"attention": "flash"}, "attention must be one of 'auto', 'dense', 'reference', 'native', 'triton'"),
        ({"masking": "some"}, "masking must be one of 'all', 'half-heads', 'none', got 'some'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
    ids=str,
)
def test_options_that_do_not_exist(options: dict[str, Any], message: str, tiny: Any) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(**{"name": "fastmetro-s", "backbone": nn.Identity(), "mesh": tiny} | options)


def test_wrong_parts_are_refused(tiny: Any) -> None:
    with pytest.raises(TypeError, match=r"backbone must be a name or an nn\.Module, got int"):
        create_model("fastmetro-s", 3, tiny)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"features \[B, 2048, h, w\].*got \[1, 8, 7, 7\]"):
        create_model("fastmetro-s", nn.Identity(), tiny)(torch.zeros(1, 8, 7, 7))
    with pytest.raises(ValueError, match=r"shape \(30, 20\) follows 12 vertices"):
        small(replace(tiny, upsampling=tiny.upsampling[1:]))
    with pytest.raises(ValueError, match="smpl_head needs a mesh with an intermediate level"):
        small(replace(tiny, upsampling=tiny.upsampling[:1]), smpl_head=True)
