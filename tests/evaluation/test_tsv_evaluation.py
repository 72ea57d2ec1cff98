"""Evaluation on TSV data sets against plain NumPy, in any number of processes, and from the command line."""

from __future__ import annotations

import csv
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from test_published import fake_model
from test_several_processes import run_processes
from tsv_cases import cell, jpeg, label, write_set

from fastmetro.cli import main
from fastmetro.data.ground_truth import GroundTruth
from fastmetro.data.labels import fit_weak_perspective
from fastmetro.data.tsv import TsvSource
from fastmetro.data.tsv.dataset import TsvDataset
from fastmetro.data.tsv.rows import encode_image
from fastmetro.distributed import open_world
from fastmetro.evaluation.protocols import PROTOCOLS, find_protocol
from fastmetro.evaluation.results import COLUMNS, append_result
from fastmetro.evaluation.samples import SampleErrors
from fastmetro.evaluation.tsv import Measure, evaluate_tsv
from fastmetro.meshes.mano import MANO
from fastmetro.meshes.mesh import HAND_21, J14, Mesh, MeshLevel, load_mesh
from fastmetro.meshes.smpl import SMPL

CPU = torch.device("cpu")
J24_TO_J14 = [*range(13), 18]


def made_up_mesh(name: str) -> Mesh:
    """The fine level of SMPL or MANO with regressors of random weights."""
    count, joints = {"smpl": (6890, 14), "mano": (778, 21)}[name]
    generator = np.random.default_rng(1)

    def regressor(rows: int) -> sp.csr_matrix:
        dense = sp.random(rows, count, 0.01, random_state=generator).toarray() + 1e-3
        return sp.csr_matrix((dense / dense.sum(1, keepdims=True)).astype(np.float32))

    level = MeshLevel(None, None, np.zeros((0, 2), np.int64), np.arange(count))
    body = name == "smpl"
    return Mesh(
        name, "body" if body else "hand", (level,), (), J14 if body else HAND_21, regressor(joints),
        (2, 3) if body else (0,), {"h36m": regressor(17)} if body else {},
    )  # fmt: skip


def body_model(name: str, folder: Path):
    path = folder / f"{name}.pkl"
    path.write_bytes(pickle.dumps(fake_model(name), 2))
    return {"smpl": SMPL, "mano": MANO}[name](path)


def data_set(
    folder: Path, kind: str = "body", count: int = 7, bad: tuple[int, ...] = (), genders: tuple[str, ...] = ("female",)
) -> TsvSource:
    """Rows of random labels; every third has no 3D joints, every fourth no parameters. Genders come in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    joints, pose = (24, 72) if kind == "body" else (21, 48)
    content = []
    for i in range(count):
        generator = np.random.default_rng(i)
        points = np.concatenate([generator.normal(size=(joints, 3)), np.ones((joints, 1))], 1)
        text = label(
            joints, pose, scale=0.15, pose=(0.3 * generator.normal(size=pose)).tolist(),
            betas=generator.normal(size=10).tolist(), has_3d_joints=int(i % 3 != 2), has_smpl=int(i % 4 != 3),
            gender=genders[i % len(genders)],
            **{"3d_joints": points.tolist(), "2d_joints": np.ones((joints, 3)).tolist()},
        )  # fmt: skip
        content.append((f"im{i}", b"!!" if i in bad else encode_image(jpeg(40, 30, 9 * i)), cell(text), "40 30"))
    return TsvSource(write_set(folder, content))


def predict(images: torch.Tensor) -> torch.Tensor:
    """A mesh that depends on the image, of SMPL's size."""
    seeds = (images.double().mean((1, 2, 3)) * 1e4).round().long()
    meshes = [torch.randn(6890, 3, generator=torch.Generator().manual_seed(int(s) % 2**31)) for s in seeds]
    return torch.stack(meshes)


def similarity(points: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Umeyama's, written out."""
    a, b = points - points.mean(0), truth - truth.mean(0)
    u, s, vt = np.linalg.svd(a.T @ b)
    sign = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    return (s @ np.diag(sign)) / (a**2).sum() * a @ u @ sign @ vt + truth.mean(0)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return 1000 * float(np.linalg.norm(a - b, axis=1).mean())


def expected_errors(source: TsvSource, mesh: Mesh, model: SMPL) -> dict[str, np.ndarray]:
    """All errors of every row, from the files' own numbers."""
    import json

    dataset = TsvDataset(source, "body", size=32)
    regressor, h36m = mesh.joint_regressor.toarray().astype(float), mesh.regressors["h36m"].toarray().astype(float)
    found: dict[str, list[float]] = {"mpjpe": [], "pa_mpjpe": [], "mpvpe": [], "pa_mpvpe": []}
    for row in range(len(source)):
        written = json.loads(source.row(row).label)[0]
        image = torch.from_numpy(dataset[row].image)[None]
        vertices = predict(image)[0].double().numpy()
        pose, betas = (torch.tensor([written[key]], dtype=torch.float32) for key in ("pose", "betas"))
        truth = model(pose, betas)[0][0].double().numpy()
        joints = regressor @ vertices
        true = np.array(written["3d_joints"])[J24_TO_J14, :3]
        found["mpjpe"].append(distance(joints - joints[2:4].mean(0), true - true[2:4].mean(0)))
        found["pa_mpjpe"].append(distance(similarity(joints, true), true))
        found["mpvpe"].append(distance(vertices - h36m[0] @ vertices, truth - h36m[0] @ truth))
        found["pa_mpvpe"].append(distance(similarity(vertices, truth), truth))
    return {name: np.array(values) for name, values in found.items()}


def test_errors_against_numpy(tmp_path: Path) -> None:
    source, mesh, model = data_set(tmp_path / "data"), made_up_mesh("smpl"), body_model("smpl", tmp_path)
    truth = GroundTruth(mesh, model)
    result = evaluate_tsv(predict, source, truth, mesh, PROTOCOLS["3dpw"], CPU, batch_size=3, size=32)
    expected = expected_errors(source, mesh, model)
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(result.errors, name).numpy(), values, rtol=2e-5, err_msg=name)
    with_joints, with_vertices = np.arange(7) % 3 != 2, np.arange(7) % 4 != 3
    means = result.errors.means()
    for name, there in (("mpjpe", with_joints), ("mpvpe", with_vertices)):
        for error in (name, f"pa_{name}"):
            assert means[error] == pytest.approx(expected[error][there].mean(), rel=2e-5), error
    assert result.errors.rows.tolist() == list(range(7)) and result.joints is None


def test_the_truth_has_no_errors(tmp_path: Path) -> None:
    mesh, model = made_up_mesh("smpl"), body_model("smpl", tmp_path)
    truth, source = GroundTruth(mesh, model), data_set(tmp_path / "data")

    dataset = TsvDataset(source, "body", size=32)
    batch = dataset.collate([dataset[row] for row in range(7)])
    labels = truth(batch)
    errors = Measure(mesh, PROTOCOLS["3dpw"], CPU)(torch.arange(7), labels.vertices, labels)
    assert errors.mpvpe.max() < 1e-9 and errors.pa_mpvpe.max() < 1e-6
    roots = torch.from_numpy(mesh.joint_regressor.toarray())[[2, 3]] @ labels.vertices
    assert roots.mean(1).abs().max() < 1e-5


def test_truth_by_gender(tmp_path: Path) -> None:
    """The rows say "female"."""
    (tmp_path / "other").mkdir()
    mesh, neutral, female = made_up_mesh("smpl"), body_model("smpl", tmp_path), body_model("smpl", tmp_path / "other")
    female.skinning.template.mul_(1.1)

    dataset = TsvDataset(data_set(tmp_path / "data"), "body", size=32)
    batch = dataset.collate([dataset[row] for row in range(4)])
    batch = replace(batch, genders=["female", "male", "none", "female"])
    mixed, plain = GroundTruth(mesh, neutral, {"female": female})(batch), GroundTruth(mesh, neutral)(batch)
    expected = GroundTruth(mesh, female)(batch)
    for row, gender in enumerate(batch.genders):
        torch.testing.assert_close(mixed.vertices[row], (expected if gender == "female" else plain).vertices[row])
    with pytest.raises(ValueError, match="gendered must be 'male' and 'female' models"):
        GroundTruth(mesh, neutral, {"other": female})


def test_unknown_genders_are_named_once(tmp_path: Path) -> None:
    """Where bodies are chosen by gender; else nobody needs to know."""

    mesh, model = made_up_mesh("smpl"), body_model("smpl", tmp_path)
    dataset = TsvDataset(data_set(tmp_path / "data"), "body", size=32)
    batch = replace(dataset.collate([dataset[row] for row in range(3)]), genders=["Man", "male", "x"])
    gendered = GroundTruth(mesh, model, {"male": model})
    with pytest.warns(RuntimeWarning, match=r"must be one of 'female', .*, got 'Man', 'x'; .* neutral model's"):
        gendered(batch)
    with warnings.catch_warnings(record=True) as more:
        warnings.simplefilter("always")
        again = gendered(batch)
        plain = GroundTruth(mesh, model)(batch)
    assert not more
    torch.testing.assert_close(again.vertices, plain.vertices)  # a part of a batch is rounded differently


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    source, mesh = data_set(tmp_path / "data", bad=(1, 4)), made_up_mesh("smpl")
    truth = GroundTruth(mesh, body_model("smpl", tmp_path))
    result = evaluate_tsv(predict, source, truth, mesh, PROTOCOLS["3dpw"], CPU, batch_size=2, size=32)
    assert result.errors.rows.tolist() == [0, 2, 3, 5, 6] and result.skipped == {"broken base64": 2}
    assert len(evaluate_tsv(predict, source, truth, mesh, PROTOCOLS["3dpw"], CPU, size=32, count=3).errors.rows) == 2


def published(values: dict[str, np.ndarray], joints: np.ndarray, vertices: np.ndarray, world: int, size: int) -> dict:
    """The released code's meters, sample by sample (protocol 3.9)."""
    count = len(joints)
    total = -(-count // world) * world
    order = [i % count for i in range(total)]
    ranks = []
    for rank in range(world):
        mine = order[rank::world]
        sums = {"mpjpe": 0.0, "pa_mpjpe": 0.0, "mpvpe": 0.0}
        counts = {"mpjpe": 0, "pa_mpjpe": 0, "mpvpe": 0}
        for first in range(0, len(mine), size):
            batch = mine[first : first + size]
            known = sum(joints[i] for i in batch)
            for i in batch:
                if joints[i]:
                    sums["mpjpe"] += values["mpjpe"][i]
                    counts["mpjpe"] += 1
                if vertices[i]:
                    sums["mpvpe"] += values["mpvpe"][i]
                    counts["mpvpe"] += 1
            sums["pa_mpjpe"] += np.mean([values["pa_mpjpe"][i] for i in batch]) * known
            counts["pa_mpjpe"] += known
        ranks.append({name: sums[name] / counts[name] if counts[name] else 0.0 for name in sums})
    return {name: np.mean([rank[name] for rank in ranks]) for name in ranks[0]}


@pytest.mark.parametrize(("count", "world", "size"), [(11, 1, 4), (11, 4, 2), (3, 5, 2), (16, 4, 16)])
def test_published_means(count: int, world: int, size: int) -> None:
    generator = np.random.default_rng(count)
    values = {name: generator.uniform(20, 90, count) for name in ("mpjpe", "pa_mpjpe", "mpvpe", "pa_mpvpe")}
    joints, vertices = generator.uniform(size=count) > 0.3, generator.uniform(size=count) > 0.8
    errors = SampleErrors(
        torch.arange(count), **{name: torch.from_numpy(value) for name, value in values.items()},
        has_joints=torch.from_numpy(joints), has_vertices=torch.from_numpy(vertices),
    )  # fmt: skip
    found = errors.published_means(world, size)
    for name, value in published(values, joints, vertices, world, size).items():
        assert found[name] == pytest.approx(value, rel=1e-12), name
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        errors.published_means(0, 4)


def _evaluate(rank: int, folder: Path, out: Path) -> None:
    mesh = made_up_mesh("smpl")
    truth = GroundTruth(mesh, body_model("smpl", out / f"{rank}")).double()
    with open_world("cpu") as (world, device):
        source = TsvSource(folder / "train.yaml")
        result = evaluate_tsv(
            predict, source, truth, mesh, PROTOCOLS["3dpw"], device, world=world, batch_size=2, size=32
        )
    torch.save([result.errors.rows, result.errors.means(), result.models], out / f"{rank}.pt")


@pytest.mark.parametrize(("processes", "count"), [(2, 7), (3, 7), (3, 2)])
def test_any_number_of_processes_gives_the_same(processes: int, count: int, tmp_path: Path) -> None:
    """Also with fewer rows than processes."""
    source, mesh = data_set(tmp_path / "data", count=count), made_up_mesh("smpl")
    for rank in range(processes):
        (tmp_path / f"{rank}").mkdir()
    truth = GroundTruth(mesh, body_model("smpl", tmp_path)).double()
    found = evaluate_tsv(predict, source, truth, mesh, PROTOCOLS["3dpw"], CPU, batch_size=2, size=32)
    alone = found.errors
    assert found.models == {"neutral": int(alone.has_vertices.sum())}
    run_processes(_evaluate, processes, tmp_path / "data", tmp_path)
    for rank in range(processes):
        rows, means, models = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(rows, alone.rows) and models == found.models
        for name, value in alone.means().items():
            assert means[name] == value or (np.isnan(means[name]) and np.isnan(value)), name


def _main(rank: int, arguments: list[str]) -> None:
    assert main(arguments) == 0


def test_the_command_in_two_processes(tmp_path: Path) -> None:
    """One row of the table, of all samples, as of one process."""
    data_set(tmp_path / "data", count=5)
    arguments = ["eval", "--data", str(tmp_path / "data" / "train.yaml"), "--protocol", "3dpw", "--device", "cpu",
                 "--csv", str(tmp_path / "eval.csv"), "--batch-size", "2"]  # fmt: skip
    for processes in (2, 1):  # each with one thread, with which the network rounds alike
        run_processes(_main, processes, arguments)
    with (tmp_path / "eval.csv").open() as file:
        two, one = csv.DictReader(file)
    assert (two["processes"], one["processes"], two["count"]) == ("2", "1", "5")
    assert two["mpjpe"] == one["mpjpe"] and two["pa_mpjpe"] == one["pa_mpjpe"]


def test_cameras_fit_the_joints_that_can_be_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    points, true = torch.randn(4, 9, 3, generator=generator), torch.tensor([0.7, 0.1, -0.2])
    image = true[0] * (points[..., :2] + true[1:])
    seen = torch.ones(4, 9)
    seen[:, ::2] = 0
    image[:, ::2] = 5.0  # nonsense
    torch.testing.assert_close(fit_weak_perspective(points, image, seen), true.expand(4, 3), rtol=1e-5, atol=1e-6)
    assert fit_weak_perspective(points, image, torch.zeros(4, 9)).isfinite().all()


def test_joints_need_no_body_model(tmp_path: Path) -> None:
    source, mesh = data_set(tmp_path / "data"), made_up_mesh("smpl")
    joints = evaluate_tsv(
        predict, source, GroundTruth(mesh, joints_only=True), mesh, PROTOCOLS["h36m-p2"], CPU, batch_size=3, size=32
    ).errors.means()
    whole = GroundTruth(mesh, body_model("smpl", tmp_path))
    both = evaluate_tsv(predict, source, whole, mesh, PROTOCOLS["h36m-p2"], CPU, batch_size=3, size=32).errors.means()
    assert joints["mpjpe"] == both["mpjpe"] and np.isnan(joints["mpvpe"]) and both["mpvpe"] > 0


def test_hands(tmp_path: Path) -> None:
    """What FreiHAND's server takes: joints and vertices relative to the wrist, in the order of the rows."""
    source, mesh = data_set(tmp_path / "data", "hand", count=5), made_up_mesh("mano")
    truth = GroundTruth(mesh, body_model("mano", tmp_path))
    result = evaluate_tsv(
        lambda images: predict(images)[:, :778], source, truth, mesh, PROTOCOLS["freihand"], CPU, batch_size=2, size=32
    )
    assert result.joints is not None and result.joints.shape == (5, 21, 3)
    assert result.vertices is not None and result.vertices.shape == (5, 778, 3)

    dataset = TsvDataset(source, "hand", size=32)
    for row in range(5):
        vertices = predict(torch.from_numpy(dataset[row].image)[None])[0, :778].double().numpy()
        wrist = mesh.joint_regressor.toarray()[0].astype(float) @ vertices
        np.testing.assert_allclose(result.vertices[row].numpy(), vertices - wrist, atol=1e-5)
    assert result.joints[:, 0].abs().max() < 1e-6


def test_hands_with_true_labels(tmp_path: Path) -> None:
    """Joints against those of the rows, vertices against those of the hand parameters, both from the wrist."""
    source, mesh = data_set(tmp_path / "data", "hand", count=5), made_up_mesh("mano")
    truth = GroundTruth(mesh, body_model("mano", tmp_path)).double()
    found = evaluate_tsv(
        lambda images: predict(images)[:, :778], source, truth, mesh, PROTOCOLS["hand"], CPU, batch_size=2, size=32
    ).errors.means()

    dataset = TsvDataset(source, "hand", size=32)
    labels = truth(dataset.collate([dataset[row] for row in range(5)]))
    regressor = mesh.joint_regressor.toarray().astype(float)
    distances: dict[str, list[float]] = {"mpjpe": [], "mpvpe": [], "pa_mpjpe": [], "pa_mpvpe": []}
    for row in range(5):
        vertices = predict(torch.from_numpy(dataset[row].image)[None])[0, :778].double().numpy()
        for name, there, ours, given, wrist in (
            ("mpjpe", labels.has_joints_3d, regressor @ vertices, labels.joints_3d[row, :, :3], np.eye(21)[0]),
            ("mpvpe", labels.has_vertices, vertices, labels.vertices[row], regressor[0]),
        ):
            true = given.double().numpy()
            if there[row]:
                distances[name] += np.linalg.norm(ours - wrist @ ours - (true - wrist @ true), axis=1).tolist()
                distances[f"pa_{name}"] += np.linalg.norm(similarity(ours, true) - true, axis=1).tolist()
    assert (len(distances["mpjpe"]), len(distances["mpvpe"])) == (4 * 21, 4 * 778)
    for name, values in distances.items():
        assert found[name] == pytest.approx(1000 * np.mean(values), rel=1e-6), name


def test_errors_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"protocol must be one of 'h36m-p2', '3dpw', 'freihand', 'hand', got 'x'"):
        find_protocol("x")
    with pytest.raises(ValueError, match="'freihand' is for a hand, mesh 'smpl' is a body"):
        Measure(made_up_mesh("smpl"), PROTOCOLS["freihand"], CPU)
    with pytest.raises(ValueError, match="needs its body model for vertices, got NoneType"):
        GroundTruth(made_up_mesh("smpl"))
    mesh = load_mesh("anny-body")
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="no row that can be used"):
        source = data_set(tmp_path, count=2, bad=(0, 1))
        evaluate_tsv(predict, source, GroundTruth(mesh), mesh, PROTOCOLS["3dpw"], CPU, size=32)


def test_results_are_appended_and_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "new" / "eval.csv"
    append_result(path, {"protocol": "3dpw", "mpjpe": "1.0"})
    append_result(path, {"protocol": "h36m-p2", "mpjpe": "2.0"})
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["mpjpe"] for row in rows] == ["1.0", "2.0"] and tuple(rows[0]) == COLUMNS
    with pytest.raises(ValueError, match="row must have columns of"):
        append_result(path, {"speed": 1})
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv has the columns \['a', 'b'\]"):
        append_result(other, {})
    assert other.read_text() == "a,b\n1,2\n"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped weights on rows whose body is not theirs: joints only."""
    data_set(tmp_path / "data", count=3)
    arguments = ["eval", "--data", str(tmp_path / "data" / "train.yaml"), "--protocol", "3dpw", "--device", "cpu"]
    assert main([*arguments, "--csv", str(tmp_path / "eval.csv")]) == 0
    printed = capsys.readouterr().out
    assert "MPVPE -   " in printed and "nan" not in printed  # these rows have no vertices
    assert "3dpw: MPJPE" in printed and "3 samples of" in printed and "middle of the hips" in printed
    with (tmp_path / "eval.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["protocol"] == "3dpw" and row["count"] == "3" and float(row["mpjpe"]) > 0 and row["mpvpe"] == "nan"
    assert main([*arguments, "--compat", "published", "--processes", "2", "--csv", str(tmp_path / "eval.csv")]) == 0
    assert "as published" in capsys.readouterr().out
    assert main([*arguments, "--csv", str(tmp_path / "data" / "train.yaml")]) == 1
    assert "has the columns" in capsys.readouterr().err
    assert main([*arguments, "--male-model", "m.pkl"]) != 0
    assert "go together" in capsys.readouterr().err
    assert main(["eval", "--data", "absent.yaml", "--device", "cpu"]) == 1
    assert "absent.yaml" in capsys.readouterr().err


def test_samples_with_joints_of_no_confidence_count_as_published_only(tmp_path: Path) -> None:
    """What stands in place of such a joint may be anything, as zeros do in sets that are labelled in part."""
    mesh, truth = made_up_mesh("smpl"), GroundTruth(made_up_mesh("smpl"), body_model("smpl", tmp_path)).double()
    source = data_set(tmp_path / "data", count=2)
    dataset = TsvDataset(source, "body", size=32)
    labels = truth(dataset.collate([dataset[row] for row in range(2)]))
    joints = labels.joints_3d.clone()
    joints[1, 4, 3] = 0
    labels = replace(labels, joints_3d=joints)
    rows, vertices = torch.arange(2), labels.vertices.float()
    assert labels.has_joints_3d.all()
    for compat, counted in ((False, [True, False]), (True, [True, True])):
        measure = Measure(mesh, PROTOCOLS["3dpw"], CPU, compat)
        assert measure(rows, vertices, labels).has_joints.tolist() == counted
