"""Batches of TSV rows: what is in them, bad rows, workers, and the two places where pixels are made."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler
from tsv_cases import Rows, assert_equal, cell, good, jpeg, label, rows, write_set

from fastmetro.data.augmentation import Draw, augment_label, cut_image, draw_samples, finish_image
from fastmetro.data.mixing import MixedSampler, Pick, Source
from fastmetro.data.tsv import TsvSource, check_data, decode_image, parse_label
from fastmetro.data.tsv.batch import TsvBatch
from fastmetro.data.tsv.dataset import PackedBatch, SkippedRow, TsvDataset, UnusableData, read_row
from fastmetro.data.tsv.loader import MixedDataset, make_loader
from fastmetro.data.tsv.rows import encode_image

SIZE = 32


def broken(name: str) -> tuple[str, bytes, str, str]:
    image, text = encode_image(jpeg()), cell(label())
    return {
        "base64": ("base64", b"!!!", text, "40 30"),
        "image": ("image", encode_image(jpeg()[:500]), text, "40 30"),
        "json": ("json", image, "[{", "40 30"),
        "size": ("size", image, text, "41 30"),
    }[name]


def dataset(folder: Path, content: Rows, **options) -> TsvDataset:
    return TsvDataset(TsvSource(write_set(folder, content)), "body", **({"size": SIZE} | options))


@pytest.mark.parametrize("compat", [None, "published"])
def test_a_batch_holds_what_its_rows_hold(tmp_path: Path, compat) -> None:
    content = good(3)
    data = dataset(tmp_path, content, seed=4, compat=compat)
    picks = [Pick(0, 2, 1001), Pick(0, 0, 5)]
    batch = data.collate(data.__getitems__(picks))
    assert isinstance(batch, TsvBatch)
    assert batch.keys == ["im2", "im0"] and batch.genders == ["female"] * 2 and batch.skipped == {}
    for place, (pick, draw) in enumerate(zip(picks, draw_samples(4, [1001, 5], "body"), strict=True)):
        image, given = decode_image(content[pick.row][1]), parse_label(content[pick.row][2].encode(), "body")
        box = np.array([15.0, 20.0]), 0.1 + 0.01 * pick.row
        expected = finish_image(cut_image(image, *box, draw, SIZE, compat), draw, SIZE, compat)
        np.testing.assert_allclose(batch.images[place], expected, rtol=0, atol=2 / 255 / 0.22 if compat is None else 0)
        crop = augment_label(given, draw, "body", SIZE, compat)
        np.testing.assert_allclose(batch.joints_2d[place], crop.joints_2d, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(batch.joints_3d[place], crop.joints_3d)
        np.testing.assert_array_equal(batch.pose[place], crop.pose)
        np.testing.assert_array_equal(batch.betas[place], given.betas)
    for flag, value in (("joints_2d", True), ("joints_3d", True), ("smpl", False)):
        found = getattr(batch, f"has_{flag}")
        assert found.dtype == torch.bool and found.tolist() == [value] * 2


def test_hands(tmp_path: Path) -> None:
    content = [(*row[:2], cell(label(21, 48)), row[3]) for row in good(3)]
    data = TsvDataset(TsvSource(write_set(tmp_path, content)), "hand", seed=0)
    batch = data.collate(data.__getitems__([0, 1, 2]))
    assert (
        batch.joints_2d.shape == (3, 21, 3) and batch.pose.shape == (3, 48) and batch.images.shape == (3, 3, 224, 224)
    )
    assert batch.joints_3d.shape == (3, 21, 4) and not batch.joints_3d[:, 0, :3].any()


def test_published_boxes_are_exact(tmp_path: Path) -> None:
    """FreiHAND's scale of 0.9 is no float32: its box would lose a column."""
    pixels = np.random.default_rng(0).integers(0, 255, (224, 224, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    content = [("a", encode_image(file.getvalue()), cell(label(center=[112, 112], scale=0.9)), "224 224")]
    data = dataset(tmp_path, content, size=180, compat="published")
    batch = data.collate(data.__getitems__([0]))
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    shown = (batch.images[0].permute(1, 2, 0) * deviation + mean) * 255
    np.testing.assert_allclose(shown, pixels[22:202, 22:202], atol=0.01)


def test_evaluation_is_plain_or_of_one_view(tmp_path: Path) -> None:
    content = good(2)
    draw = Draw(rotation=90.0, scale=1.2)
    for data, expected in ((dataset(tmp_path, content), Draw()), (dataset(tmp_path, content, view=draw), draw)):
        batch = data.collate(data.__getitems__([1, 1]))
        _, image, given = read_row(data.source, 1, "body")
        crop = finish_image(cut_image(image, given.center, given.scale, expected, SIZE), expected, SIZE)
        np.testing.assert_array_equal(batch.images, np.stack([crop, crop]))


def test_samples_depend_on_their_number_and_not_on_the_epoch(tmp_path: Path) -> None:
    data = dataset(tmp_path, good(2), seed=1)
    first, again, later = (data[Pick(0, 0, number)] for number in (3, 3, 4))
    np.testing.assert_array_equal(first.image, again.image)
    assert not np.array_equal(first.image, later.image)


def test_bad_rows_are_replaced_counted_and_reported_once(tmp_path: Path) -> None:
    data = dataset(tmp_path, [*good(6), broken("base64"), broken("size"), broken("json")], seed=2)
    with pytest.warns(RuntimeWarning) as caught:
        batch = data.collate(data.__getitems__([0, 6, 1, 7, 2, 3]))
    messages = [str(warning.message) for warning in caught]
    assert len(batch.keys) == 6 and [batch.keys[i] for i in (0, 2, 4, 5)] == ["im0", "im1", "im2", "im3"]
    assert set(batch.keys) <= {f"im{i}" for i in range(6)}
    assert batch.skipped["broken base64"] >= 1 and batch.skipped["size differs"] >= 1
    assert sum("row 6, 'base64': broken base64" in text and text.endswith("it is replaced") for text in messages) == 1
    assert sum("row 7, 'size': size differs: hw says 41 x 30" in text for text in messages) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data._reported[8] = True  # a replacement may be row 8
        repeated = data.collate(data.__getitems__([0, 6, 1, 7, 2, 3]))
    assert_equal(repeated, batch)


def test_rows_whose_tables_differ_are_bad_rows(tmp_path: Path) -> None:
    data = dataset(tmp_path, good(3), seed=2)
    lines = (tmp_path / "train.label.tsv").read_text().splitlines()
    lines[1] = lines[1].replace("im1", "imX")
    (tmp_path / "train.label.tsv").write_text("\n".join(lines) + "\n")
    data = TsvDataset(TsvSource(data.source.path), "body", seed=2, size=SIZE)
    with pytest.warns(RuntimeWarning, match="row 1, without a usable key: keys differ"):
        assert data[1].skipped[0] == "keys differ"


def test_a_broken_index_is_a_problem_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmetro.data.tsv.files._LOOKED_AT", 1)  # it would be made again
    path = write_set(tmp_path, good(4))
    index = tmp_path / "train.img.lineidx"
    starts = index.read_text().split()
    starts[2] = str(int(starts[2]) + 1)
    index.write_text("\n".join(starts) + "\n")
    data = TsvDataset(TsvSource(path), "body", size=SIZE)
    with pytest.warns(RuntimeWarning, match="row 2, without a usable key: broken index"):
        batch = data.collate(data.__getitems__([0, 2, 3]))
    assert batch.keys == ["im0", "im3"] and batch.skipped == {"broken index": 1}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_too_many_bad_rows_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = dataset(tmp_path, [broken("image")], seed=2)
    with pytest.raises(UnusableData, match=r"100 rows that were tried for one sample .*broken image: 100"):
        only[0]
    monkeypatch.setattr("fastmetro.data.tsv.dataset.MIN_TRIED", 64)
    data = dataset(tmp_path, [*good(3), *[broken("json")] * 20], seed=2)
    with pytest.raises(UnusableData, match=r"\d+ of \d+ rows that were tried .*broken JSON: \d+"):
        for _ in range(64):
            data.__getitems__(list(range(8, 12)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_luck_is_not_unusable(tmp_path: Path) -> None:
    """A batch of bad rows alone, in a set that has better ones."""
    data = dataset(tmp_path, [*good(30), *[broken("json")] * 19], seed=2)
    batch = data.collate(data.__getitems__(list(range(30, 49))))
    assert len(batch.keys) == 19 and batch.skipped["broken JSON"] >= 19
    for _ in range(100):
        data.__getitems__(list(range(0, 48, 4)))
    assert data._tried[0] > 1000


def test_evaluation_leaves_bad_rows_out(tmp_path: Path) -> None:
    data = dataset(tmp_path, [broken("json"), *good(2), broken("image")])
    with pytest.warns(RuntimeWarning, match="it is left out"):
        batches = list(make_loader(data, BatchSampler(range(4), 3, drop_last=False)))
    assert [batch.keys for batch in batches] == [["im0", "im1"], []]
    assert [batch.skipped for batch in batches] == [{"broken JSON": 1}, {"broken image": 1}]
    empty = batches[1]
    assert empty.images.shape == (0, 3, SIZE, SIZE) and empty.joints_3d.shape == (0, 24, 4)
    assert empty.has_smpl.shape == (0,) and empty.has_smpl.dtype == torch.bool
    assert data[0] == SkippedRow("broken JSON")


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("pixels", ["worker", "device"])
def test_workers_give_the_same_batches(tmp_path: Path, method: str, pixels) -> None:
    data = dataset(tmp_path, [*good(20), broken("json")], seed=3, pixels=pixels)
    sampler = MixedSampler([Source(1, len(data))], 8, seed=6, steps=6)
    data.source.row(0)  # the parent has the files open
    data._reported[20] = True
    here = [batch.to("cpu") for batch in make_loader(data, sampler)]
    there = [batch.to("cpu") for batch in make_loader(data, sampler, workers=2, start_method=method)]
    assert len(here) == 6 and sum(sum(batch.skipped.values()) for batch in here) >= 2
    for expected, actual in zip(here, there, strict=True):
        assert_equal(actual, expected)


def test_workers_share_what_was_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = dataset(tmp_path, [*good(3), broken("json")])
    list(make_loader(data, [[3, 0]] * 8, workers=2, start_method="spawn"))
    assert 1 <= capfd.readouterr().err.count("row 3, 'json': broken JSON") <= 2  # two may meet it at the same moment
    assert bool(data._reported[3])


def test_a_box_that_misses_the_image_is_a_bad_row(tmp_path: Path) -> None:
    """Its 2D joints may lie so far off that one row decides the loss. As released it is a black crop."""
    content = good(3)
    content[1] = (content[1][0], content[1][1], cell(label(center=[9e5, 20.0])), content[1][3])
    with pytest.warns(RuntimeWarning, match=r"row 1, .im1.: box misses the image: it has 40 pixels around .900000"):
        assert dataset(tmp_path, content)[1] == SkippedRow("box misses the image")
    assert check_data(tmp_path / "train.yaml").problems == {"box misses the image": 1}
    published = dataset(tmp_path, content, compat="published")[1]
    assert np.ptp(published.image, axis=(1, 2)).max() == 0


@pytest.mark.parametrize("compat", [None, "published"])
def test_pixels_made_on_the_device_are_the_same(tmp_path: Path, compat, device: torch.device) -> None:
    content = good(8)
    if compat:
        content[3] = (content[3][0], content[3][1], cell(label(center=[900.0, 20.0])), content[3][3])  # a black crop
    here, there = (dataset(tmp_path, content, seed=1, compat=compat, pixels=where) for where in ("worker", "device"))
    expected, packed = here.collate(here.__getitems__(range(8))), there.collate(there.__getitems__(range(8)))
    assert isinstance(packed, PackedBatch) and packed.cuts.pixels.dtype == torch.uint8
    level = 1 / 255 / 0.224
    actual = packed.to(device)
    assert actual.images.device.type == device.type and actual.pose.device.type == device.type
    assert_equal(actual, expected, 0.01 * level if compat else 2.9 * level)
    assert (actual.images.cpu() - expected.images).abs().mean() < (0.01 if compat else 0.5) * level


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pixels", ["worker", "device"])
def test_pinned_memory(tmp_path: Path, pixels) -> None:
    data = dataset(tmp_path, good(4), seed=1, pixels=pixels)
    (batch,) = make_loader(data, [[0, 1, 2, 3]], pin_memory=True)
    (expected,) = make_loader(data, [[0, 1, 2, 3]])
    labels = batch if isinstance(batch, TsvBatch) else batch.labels
    assert labels.pose.is_pinned()
    assert_equal(batch.to("cuda"), expected.to("cpu"), 0.02)


def test_a_mixture_of_sets_and_an_endless_source(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    first, second = dataset(tmp_path / "a", good(5), seed=1), dataset(tmp_path / "b", good(7, 50), seed=1)
    sampler = MixedSampler([Source(2, 5), Source(1), Source(1, 7)], 16, seed=0, steps=4)
    mixed = MixedDataset([first, None, second])
    for step, batch in enumerate(make_loader(mixed, sampler, workers=1)):
        picks = sampler.picks(step)
        a, b = ([pick for pick in picks if pick.source == source] for source in (0, 2))
        assert batch.keys == [f"im{pick.row}" for pick in a] + [f"im{50 + pick.row}" for pick in b]
        assert_equal(batch, first.collate([*first.__getitems__(a), *second.__getitems__(b)]))
    with pytest.raises(ValueError, match="source 1 of the pick has no data set"):
        mixed[Pick(1, 0, 0)]
    assert mixed[Pick(2, 3, 9)].key == "im53"


def test_sets_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    content = good(2)
    one = dataset(tmp_path, content, seed=1)
    with pytest.raises(ValueError, match=r"sets must have one size, got \[32, 64\]"):
        MixedDataset([one, dataset(tmp_path, content, seed=1, size=64)])
    with pytest.raises(ValueError, match="sets must be for training"):
        MixedDataset([one, dataset(tmp_path, content)])
    with pytest.raises(ValueError, match="at least one data set"):
        MixedDataset([None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixels": "gpu"}, "pixels must be one of 'worker', 'device', got 'gpu'"),
        ({"compat": "official"}, "compat must be one of None, 'published', got 'official'"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"seed": -1}, "seed must satisfy"),
        ({"seed": 1, "view": Draw()}, "view is of evaluations"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset(tmp_path, good(1), **options)
    source = TsvSource(write_set(tmp_path, good(1)))
    with pytest.raises(ValueError, match="kind must be one of 'body', 'hand', got 'foot'"):
        TsvDataset(source, "foot")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="view must not flip hands"):
        TsvDataset(source, "hand", view=Draw(flip=True))
    with pytest.raises(IndexError, match="rows 0 to 0, got 1"):
        dataset(tmp_path, good(1))[1]


def test_a_set_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source must have rows"):
        dataset(tmp_path, rows(0))
