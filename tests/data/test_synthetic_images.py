import gc
import math

import numpy as np
import pytest
import torch

from fastmetro.data.counter_random import CounterRandom
from fastmetro.data.labels import MeshLabels, fit_weak_perspective
from fastmetro.data.synthetic import photographs
from fastmetro.data.synthetic.camera import sample_orientation
from fastmetro.data.synthetic.capture import CapturedPeople
from fastmetro.data.synthetic.dataset import SyntheticPeople, normalize_images
from fastmetro.data.synthetic.pixels import PixelParts
from fastmetro.data.synthetic.poses import ANGLES, KINDS, LIMB_RANGES, TRUNK_RANGES, PoseSampler
from fastmetro.data.synthetic.shading import face_incidence, vertex_normals
from fastmetro.meshes.mesh import J14, load_mesh

SIZE = 48


@pytest.fixture(scope="module")
def mesh():
    return load_mesh("anny-body")


@pytest.fixture(scope="module")
def people(mesh):
    return SyntheticPeople(mesh, seed=3, size=SIZE, photographs=False)


def assert_same_images(actual, expected):
    """Equal but for the few pixels where rounding decides which triangle, stripe or edge is seen."""
    difference = (actual.int() - expected.int()).abs()
    assert (difference > 2).float().mean() < 0.01
    assert difference.float().mean() < 0.2


def assert_same_labels(actual: MeshLabels, expected: MeshLabels, tolerance=2e-5):
    for name, value in vars(expected).items():
        if value is None:
            assert getattr(actual, name) is None
            continue
        other = getattr(actual, name).cpu()
        if name == "joints_2d":  # the confidence is a comparison, and may flip at the border
            other, value = other[..., :2], value[..., :2]
        torch.testing.assert_close(other, value.cpu(), atol=tolerance, rtol=1e-4)


def test_a_sample_is_the_same_in_any_batch(people):
    whole = people(torch.arange(5))
    part = people(torch.tensor([4, 1]))
    assert_same_images(part.images, whole.images[[4, 1]])
    chosen = {k: v if v is None else v[[4, 1]] for k, v in vars(whole.labels).items()}
    assert_same_labels(part.labels, MeshLabels(**chosen))


def test_rendering_twice_gives_the_same_bits(people):
    first, second = people(torch.arange(3)), people(torch.arange(3))
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels.vertices, second.labels.vertices)


def test_devices_agree(mesh, people, device):
    there = SyntheticPeople(mesh, seed=3, size=SIZE, photographs=False).to(device)
    batch, expected = there(torch.arange(6, device=device)), people(torch.arange(6))
    assert batch.images.device.type == device.type
    assert_same_labels(batch.labels, expected.labels)
    assert_same_images(batch.images.cpu(), expected.images)


def test_other_seeds_are_other_people(mesh, people):
    other = SyntheticPeople(mesh, seed=4, size=SIZE, photographs=False).labels(torch.arange(3))
    assert (other.vertices - people.labels(torch.arange(3)).vertices).abs().mean(dim=(1, 2)).min() > 0.01


def test_images_and_labels_have_the_promised_form(people):
    batch = people(torch.arange(4))
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (4, 3, SIZE, SIZE)
    assert batch.images.float().std(dim=(1, 2, 3)).min() > 2
    labels = batch.labels
    torch.testing.assert_close(labels.joints_3d, people.joint_regressor @ labels.vertices, atol=1e-5, rtol=0)
    assert labels.joints_3d[:, [2, 3]].mean(dim=1).abs().max() < 1e-5
    assert labels.vertices.abs().max() < 2.5
    torch.testing.assert_close(batch.view.project(labels.joints_3d)[..., :2], labels.joints_2d[..., :2])
    inside = (labels.joints_2d[..., :2].abs() <= 1).all(dim=-1)
    assert torch.equal(labels.joints_2d[..., 2].bool(), inside)


def test_weak_perspective_label_is_the_least_squares_camera(people):
    labels = people.labels(torch.arange(8))
    for joints, points, camera in zip(labels.joints_3d, labels.joints_2d, labels.camera, strict=True):
        matrix, goal = np.zeros((28, 3)), points[:, :2].numpy().ravel()
        matrix[:, 0] = joints[:, :2].numpy().ravel()
        matrix[0::2, 1] = matrix[1::2, 2] = 1
        scale, x, y = np.linalg.lstsq(matrix, goal, rcond=None)[0]
        np.testing.assert_allclose(camera.numpy(), [scale, x / scale, y / scale], rtol=2e-3, atol=2e-3)
    points = torch.randn(2, 14, 3)
    camera = torch.tensor([[0.8, 0.1, -0.2], [1.2, 0.0, 0.3]])
    image = camera[:, None, :1] * (points[..., :2] + camera[:, None, 1:])
    torch.testing.assert_close(fit_weak_perspective(points, image), camera, atol=1e-5, rtol=1e-5)


def test_the_body_is_drawn_where_the_labels_say(people):
    """Hips and neck lie inside the body: their pixels are covered by the rendered surface."""
    indices = torch.arange(24)
    rng = CounterRandom(people.seed, indices)
    vertices, joints, view = people._people(rng)
    covered = people._rasterize(view.project(people._clothe(rng, vertices)[0])).face_index >= 0
    hits = []
    for name in ("R_Hip", "L_Hip", "Neck", "R_Knee", "L_Knee"):
        pixels = ((view.project(joints)[:, J14.index(name), :2] + 1) * SIZE / 2).floor().long()
        for sample, (x, y) in enumerate(pixels.tolist()):
            if 0 <= x < SIZE and 0 <= y < SIZE:
                hits.append(bool(covered[sample, y, x]))
    assert len(hits) > 60 and np.mean(hits) > 0.97


def test_most_bodies_are_whole_and_large_in_the_crop(people):
    labels = people.labels(torch.arange(64))
    visible = labels.joints_2d[..., 2].mean(dim=1)
    assert 0.5 < (visible == 1).float().mean() < 0.9 and visible.min() > 0


def test_normalization_is_imagenets():
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    expected = (torch.tensor([0, 128, 255]) / 255 - 0.456) / 0.224
    torch.testing.assert_close(normalize_images(image)[0, 1, 0], expected)
    with pytest.raises(TypeError, match="uint8"):
        normalize_images(image.float())


def test_angles_stay_in_their_ranges_and_every_kind_occurs():
    rng = CounterRandom(0, torch.arange(4000))
    degrees = dict(zip(ANGLES, (PoseSampler()(rng) * 180 / math.pi).unbind(dim=1), strict=True))
    limits = {**{name + side: pair for name, pair in LIMB_RANGES.items() for side in (".L", ".R")}, **TRUNK_RANGES}
    for name, (low, high) in limits.items():
        assert degrees[name].min() >= low - 1e-3 and degrees[name].max() <= high + 1e-3
        assert degrees[name].std() > 2
    kinds = torch.bincount(rng.choice("pose/kind", [kind.weight for kind in KINDS.values()]), minlength=len(KINDS))
    assert kinds.min() > 50
    assert {name for kind in KINDS.values() for name in (*kind.angles, *kind.right)} <= {*LIMB_RANGES, *TRUNK_RANGES}


def test_both_sides_are_alike_on_average_and_sitting_legs_go_together():
    rng = CounterRandom(2, torch.arange(20000))
    angles = PoseSampler()(rng)
    for name in LIMB_RANGES:
        left, right = (angles[:, ANGLES.index(name + side)] for side in (".L", ".R"))
        assert abs(float(left.mean() - right.mean())) < 0.05 * float(left.std()) + 1e-3
    sitting = rng.choice("pose/kind", [kind.weight for kind in KINDS.values()]) == list(KINDS).index("sitting")
    hips = angles[sitting][:, [ANGLES.index("hip_flexion.L"), ANGLES.index("hip_flexion.R")]]
    assert abs(float(hips.mean()) * 180 / math.pi - 82) < 3 and torch.corrcoef(hips.T)[0, 1] > 0.4


def _heads(people, **degrees):
    """Joints by name of the average body; angles not given are 0: upright, arms hanging, limbs straight."""
    angles = torch.zeros(1, len(ANGLES))
    for name, value in degrees.items():
        for column in (name, name + ".L", name + ".R"):
            if column in ANGLES:
                angles[0, ANGLES.index(column)] = value * math.pi / 180
    _, heads = people.sampler.body(people.sampler.pose(angles))
    return dict(zip(people.sampler.body.bone_names, heads[0], strict=True))


def test_angles_turn_limbs_the_anatomical_way(people):
    rest = _heads(people)
    assert (rest["wrist.L"] - rest["upperarm01.L"])[1] < -0.45  # zero means hanging, straight arms
    for name, bone, direction in (
        ("hip_flexion", "lowerleg01", (0, 0, 1)), ("knee_flexion", "foot", (0, 0, -1)),
        ("ankle_flexion", "toe1-1", (0, -1, 0)), ("arm_flexion", "lowerarm01", (0, 0, 1)),
        ("elbow_flexion", "wrist", (0, 0, 1)),
    ):  # fmt: skip
        moved = _heads(people, **{name: 35})
        for side in (".L", ".R"):
            assert ((moved[bone + side] - rest[bone + side]) * torch.tensor(direction)).sum() > 0.03, name
    for name, bone in (("hip_abduction", "foot"), ("arm_abduction", "wrist"), ("clavicle_lift", "upperarm01")):
        moved = _heads(people, **{name: 30})
        step = {side: moved[bone + side] - rest[bone + side] for side in (".L", ".R")}
        assert step[".L"][1] > 0.01 and step[".R"][1] > 0.01, name
        if name != "clavicle_lift":
            assert step[".L"][0] > 0.03 and step[".R"][0] < -0.03, name
    assert (_heads(people, spine_flexion=35)["head"] - rest["head"])[2] > 0.1
    knee = rest["lowerleg01.L"] - rest["upperleg01.L"], rest["foot.L"] - rest["lowerleg01.L"]
    bent = _heads(people, knee_flexion=70)
    shin = bent["foot.L"] - bent["lowerleg01.L"]
    angle = torch.acos(torch.cosine_similarity(shin, knee[1], dim=0)) * 180 / math.pi
    assert abs(float(angle) - 70) < 3


def test_swapping_sides_mirrors_the_body(people):
    names = people.sampler.body.bone_names
    angles = PoseSampler()(CounterRandom(8, torch.arange(6)))
    for number, name in enumerate(ANGLES):
        if name.startswith(("arm_rotation", "forearm_rotation", "wrist_flexion", "finger")):
            angles[:, number] = 0  # about oblique axes, which do not mirror sign by sign
    mirrored = angles[:, PoseSampler().swapped]
    for name in ("spine_side", "spine_rotation", "neck_side", "neck_rotation"):
        mirrored[:, ANGLES.index(name)] *= -1
    heads, other = (people.sampler.body(people.sampler.pose(which))[1] for which in (angles, mirrored))
    swap = [
        names.index(name[:-1] + {"L": "R", "R": "L"}[name[-1]]) if name[-2] == "." else i
        for i, name in enumerate(names)
    ]
    limbs = [i for i, name in enumerate(names) if not name.startswith(("finger", "metacarpal"))]
    expected = (heads * torch.tensor([-1.0, 1.0, 1.0]))[:, swap]
    assert (other - expected)[:, limbs].abs().max() < 5e-3


def test_all_directions_occur_most_face_the_camera():
    rotations = sample_orientation(CounterRandom(1, torch.arange(4000)))
    eye = torch.eye(3).expand(4000, 3, 3)
    torch.testing.assert_close(rotations @ rotations.transpose(1, 2), eye, atol=1e-5, rtol=0)
    assert (torch.linalg.det(rotations) > 0.99).all()
    front = rotations @ torch.tensor([0.0, 0.0, 1.0])
    yaw = torch.atan2(front[:, 0], -front[:, 2])
    assert torch.histc(yaw, 12, -math.pi, math.pi).min() > 40
    assert 0.55 < (yaw.abs() < math.pi / 3).float().mean() < 0.85
    up = rotations @ torch.tensor([0.0, 1.0, 0.0])
    assert (up[:, 1] < -0.7).float().mean() > 0.85  # upright, with y down


def test_vertex_normals_point_outwards_like_trimeshs(mesh):
    import trimesh

    faces = torch.from_numpy(mesh.faces)
    incidence = face_incidence(mesh.faces, mesh.num_vertices)
    normals = vertex_normals(torch.from_numpy(mesh.vertices)[None], faces, incidence)[0]
    body = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert body.volume > 0
    cosine = (normals.numpy() * body.vertex_normals).sum(axis=1)  # trimesh weighs by angle, this by area
    assert np.quantile(cosine, 0.01) > 0.9


def test_photographs_are_windows_of_their_tiles():
    tiles = torch.zeros(3, 3, photographs.TILE, photographs.TILE)
    tiles += torch.tensor([0.1, 0.5, 0.9]).view(1, 3, 1, 1)
    sampled = photographs.sample_photographs(tiles, CounterRandom(0, torch.arange(60)), "x", 16)
    assert sampled.shape == (60, 3, 16, 16)
    values = sampled[:, 0, 8, 8]
    assert sampled.amax(dim=(1, 2, 3)).sub(sampled.amin(dim=(1, 2, 3))).max() < 1e-3  # never two tiles in one
    assert set(np.round(values.double().numpy(), 2).tolist()) == {0.1, 0.5, 0.9}


def test_bundled_photographs_load():
    tiles = photographs.load_tiles(("coffee.png", "chelsea.png"))
    assert tiles.dtype == torch.uint8 and tiles.shape[1:] == (3, photographs.TILE, photographs.TILE)
    assert len(tiles) > 2  # wide pictures give two
    with pytest.raises(FileNotFoundError, match=r"no_such\.png"):
        photographs.load_tiles(("no_such.png",))


def test_bad_arguments_are_named(mesh, people):
    with pytest.raises(ValueError, match="size"):
        SyntheticPeople(mesh, size=8)
    with pytest.raises(ValueError, match="anny-body"):
        SyntheticPeople(load_mesh("anny-hand"))
    with pytest.raises(ValueError, match="CUDA"):
        CapturedPeople(people, 4)


def traced_people(mesh):
    """People whose work per pixel is traced as if it were compiled, and the graphs that this makes."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    traced = SyntheticPeople(mesh, seed=3, size=SIZE, photographs=False)
    traced._parts = PixelParts().compiled(backend)
    return traced, graphs


def test_pixel_work_is_whole_graphs_that_hash_no_arange(mesh, people):
    """Inductor would turn ``arange * constant`` into a 32-bit index, too narrow for the constants of the hash."""
    traced, graphs = traced_people(mesh)
    for first in (0, 4, 8):  # drawing the first batch plainly fills the plan; it is drawn again by the parts
        indices = torch.arange(first, first + 2)
        assert torch.equal(traced(indices).images, people(indices).images)
    assert len(graphs) == len(PixelParts())
    aranges = [node for graph in graphs for node in graph.graph.nodes if node.target is torch.arange]
    constants = [c for node in aranges for user in node.users for c in user.args if isinstance(c, int)]
    assert aranges and all(abs(constant) < 2**31 for constant in constants)


def test_the_first_batch_is_made_by_compiled_parts_too(mesh):
    """Their bits may differ, and a training that is resumed has another first batch than one that is not."""
    traced, _ = traced_people(mesh)
    traced._parts = PixelParts(*traced._parts[:-1], photograph=lambda image, rng, tile: image.mul(0).byte())
    assert all(int(traced(torch.arange(2)).images.max()) == 0 for _ in range(2))


def test_compiled_parts_serve_people_of_other_seeds(mesh, people):
    """Nothing of one set is in a compiled program: another one with images of that size takes it as it is."""
    first, graphs = traced_people(mesh)
    other, plain = (SyntheticPeople(mesh, 2**40, size=SIZE, photographs=False) for _ in range(2))
    other._parts = first._parts
    for traced, expected in ((first, people), (other, plain)):
        for _ in range(2):
            assert torch.equal(traced(torch.arange(2)).images, expected(torch.arange(2)).images)
    assert len(graphs) == len(PixelParts())


def test_compiled_parts_take_any_number_of_images(mesh, people):
    """Synthetic images among rows of data sets are a few more or less in each batch: not a program for each number."""
    traced, graphs = traced_people(mesh)
    for count in (2, *range(2, 13)):
        indices = torch.arange(count)
        assert torch.equal(traced(indices).images, people(indices).images)
    assert len(graphs) == 2 * len(PixelParts())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("compile_images", [False, True])
def test_captured_images_are_the_same(mesh, compile_images):
    people = SyntheticPeople(mesh, 3, size=64, compile_images=compile_images).cuda()
    captured = CapturedPeople(people, 4)
    plain = SyntheticPeople(mesh, 3, size=64).cuda()
    for first in (0, 40):
        indices = torch.arange(first, first + 4, device="cuda")
        expected, actual = plain(indices), captured(indices)
        assert torch.equal(actual.labels.vertices, expected.labels.vertices)
        assert_same_images(actual.images.cpu(), expected.images.cpu())
    with pytest.raises(ValueError, match="indices must have shape"):
        captured(torch.arange(5, device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_captured_images_keep_what_they_are_made_of(mesh):
    """A graph does not keep the tables that it reads, and whoever captures it may let go of them."""
    captured = CapturedPeople(SyntheticPeople(mesh, 3, size=64).cuda(), 4)
    gc.collect()
    taken = [torch.full((size,), -1, device="cuda") for size in (16, 64, 512, 4096, 65536) for _ in range(64)]
    indices = torch.arange(4, device="cuda")
    expected, actual = SyntheticPeople(mesh, 3, size=64).cuda()(indices), captured(indices)
    assert torch.equal(actual.labels.vertices, expected.labels.vertices)
    assert_same_images(actual.images.cpu(), expected.images.cpu())
    assert all(bool((one == -1).all()) for one in taken)
