"""Cells of the published files: labels, images, sizes; whatever strangers put there."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from tsv_cases import cell, jpeg, label

from fastmetro.data.tsv import BadRow, decode_image, parse_label
from fastmetro.data.tsv import rows as rows_module
from fastmetro.data.tsv.rows import encode_image, parse_size


def test_a_label_is_what_its_json_says() -> None:
    found = parse_label(cell(label()).encode(), "body")
    assert found.center.tolist() == [15.0, 20.0] and found.scale == pytest.approx(0.2)
    assert found.joints_2d.shape == (24, 3) and found.joints_2d[5].tolist() == [5.0, 5.5, 1.0]
    assert found.joints_3d.shape == (24, 4) and found.joints_3d[2, 2] == pytest.approx(0.08)  # a leading axis of 1
    assert found.pose.shape == (72,) and found.betas[3] == pytest.approx(0.3)
    assert (found.has_joints_2d, found.has_joints_3d, found.has_smpl) == (True, True, False)
    assert found.gender == "female" and found.pose.dtype == np.float32


def test_a_hand_has_other_sizes_and_gender_is_optional() -> None:
    content = label(21, 48)
    del content["gender"]
    found = parse_label(json.dumps([content, {"ignored": 1}]).encode(), "hand")
    assert found.joints_3d.shape == (21, 4) and found.pose.shape == (48,) and found.gender == "none"


@pytest.mark.parametrize(
    ("written", "read"),
    [("male", "male"), ("m", "male"), ("F", "female"), ("Female", "female"), (" N ", "neutral"), ("NEUTRAL", "neutral"),
     ("None", "none"), ("Man", "Man"), ("", "")],
)  # fmt: skip
def test_genders_are_read_in_any_spelling_and_unknown_ones_kept(written: str, read: str) -> None:
    assert parse_label(cell(label(gender=written)).encode(), "body").gender == read


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in label().items() if name != key}


@pytest.mark.parametrize(
    ("text", "problem", "message"),
    [
        ("[{", "broken JSON", "Expecting"),
        ("{}", "broken JSON", "a list of objects"),
        ("[]", "broken JSON", "a list of objects"),
        ("[" * 100_000, "broken JSON", ""),
        (cell(_without("pose")), "missing key", "pose"),
        (cell(label(betas=[0.0] * 9)), "wrong shape", r"betas must be \[10\], got \[9\]"),
        (cell(label(21)), "wrong shape", r"2d_joints must be \[24, 3\], got \[21, 3\]"),
        (cell(label(center=[1.0, float("nan")])), "not finite", "center holds NaN"),
        (cell(label(scale=1e300)), "not finite", "scale holds NaN or infinity"),
        (cell(label(scale=0)), "empty box", "got 0.0"),
        (cell(label(pose=["a"] * 72)), "wrong value", "pose must be numbers"),
        (cell(label(pose=[[1], [1, 2]])), "wrong value", "pose must be numbers"),
        (cell(label(gender=3)), "wrong value", "gender must be a text"),
        (cell(label(center=[1.0, -2e6])), "too large", r"center must not exceed 1e\+06 in magnitude, got 2e\+06"),
        (cell(label(**{"3d_joints": [[3e38, 0, 0, 1]] * 24})), "too large", r"3d_joints must not exceed .* got 3e\+38"),
        (cell(label(pose=[1e25] * 72)), "too large", "pose must not exceed"),
    ],
)
def test_bad_labels_say_what_is_wrong(text: str, problem: str, message: str) -> None:
    with pytest.raises(BadRow, match=message) as caught:
        parse_label(text.encode(), "body")
    assert caught.value.problem == problem


def test_what_a_file_holds_can_always_be_printed() -> None:
    """A lone surrogate, control characters that a terminal would obey, and a text of a megabyte."""
    for changed, shown in (({"pose": "a\ud800\x1b[2J"}, "got a\\ud800\\x1b[2J"), ({"gender": [7] * 100_000}, "...")):
        with pytest.raises(BadRow) as caught:
            parse_label(cell(label(**changed)).encode(), "body")
        message = str(caught.value)
        assert message.endswith(shown) and message.isprintable() and len(message.encode()) < 400


def test_labels_that_are_too_long_are_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_LABEL_BYTES", 100)
    with pytest.raises(BadRow, match="label too long"):
        parse_label(cell(label()).encode(), "body")


def test_an_image_is_decoded_upright() -> None:
    data = jpeg()
    plain = decode_image(encode_image(data))
    assert plain.shape == (40, 30, 3) and plain.dtype == np.uint8
    with Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(plain, np.asarray(opened))
        exif, turned = Image.Exif(), io.BytesIO()
        exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to see it upright
        opened.save(turned, "JPEG", exif=exif, quality=95)
    assert decode_image(encode_image(turned.getvalue())).shape == (30, 40, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(orientation: int) -> None:
    with Image.open(io.BytesIO(jpeg())) as opened:
        exif, turned = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        opened.save(turned, "JPEG", exif=exif, quality=95)
    with Image.open(turned) as opened:
        assert np.array_equal(
            decode_image(encode_image(turned.getvalue())), np.asarray(ImageOps.exif_transpose(opened))
        )


def _exif(value: bytes) -> bytes:
    """A JPEG that is to be turned, with another entry that no writer of EXIF accepts."""
    entries = [b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00", value]
    body = b"MM\x00*\x00\x00\x00\x08" + len(entries).to_bytes(2, "big") + b"".join(entries) + b"\x00" * 4
    marker = b"\xff\xe1" + (len(body) + 8).to_bytes(2, "big") + b"Exif\x00\x00" + body
    plain = jpeg()
    return plain[:2] + marker + plain[2:]


@pytest.mark.parametrize(
    "value", [b"\x01\x1a\x00\x05\x00\x00\x00\x01\x00\x00\xff\xff", b"\x87\x69\x00\x02\x00\x00\x00\x03\x41\x00\xff\xff"]
)
def test_odd_metadata_cost_no_picture(value: bytes) -> None:
    assert decode_image(encode_image(_exif(value))).shape[2] == 3


def test_no_exception_of_a_library_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(rows_module, "_decoded", fail)
    with pytest.raises(BadRow, match=r"broken image: error: unpack requires"):
        decode_image(encode_image(jpeg()))
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    for at in range(8, len(png.getvalue())):
        for byte in (0, 1, 127, 255):
            data = bytearray(png.getvalue())
            data[at] = byte
            with contextlib.suppress(BadRow):
                decode_image(encode_image(bytes(data)))


def test_16_bits_a_pixel_are_not_cut_off() -> None:
    png = io.BytesIO()
    Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16)).save(png, "PNG")
    assert decode_image(encode_image(png.getvalue()))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}])
def test_the_fast_decoder_gives_the_pixels_of_pillow(mode: str, options: dict) -> None:
    """Also of damaged files: what Pillow reads is read, and what it does not is not."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", quality=80, **options)
    whole = file.getvalue()
    generator = np.random.default_rng(1)
    files = [whole, whole + b"more"]
    for _ in range(60):
        cut, changed = whole[: generator.integers(2, len(whole))], bytearray(whole)
        changed[generator.integers(2, len(whole))] = generator.integers(256)
        files += [cut, bytes(changed)]
    for data in files:
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as opened:
                expected = np.asarray(opened.convert("RGB"))
        except Exception:
            with pytest.raises(BadRow):
                decode_image(encode_image(data))
        else:
            assert np.array_equal(decode_image(encode_image(data)), expected)


def _remade(data: bytes, mode: str, orientation: int, **options: Any) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    with Image.open(io.BytesIO(data)) as opened:
        opened.convert(mode).save(file, "JPEG", exif=exif, quality=95, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_strict_reader_refuses_damaged_jpegs(mode: str, orientation: int) -> None:
    """Others read them to the same pixels as before, as every viewer does."""
    whole = _remade(jpeg(), mode, orientation)
    early = whole[: len(whole) * 3 // 4] + b"\xff\xd9"
    stray = whole[:-2] + b"\1" * 40 + whole[-2:]
    pixels = decode_image(encode_image(whole), strict=True)
    assert np.array_equal(pixels, decode_image(encode_image(whole)))
    assert np.array_equal(pixels, decode_image(encode_image(stray)))
    assert not np.array_equal(pixels, decode_image(encode_image(early)))
    for data, message in (
        (early, "premature end of data segment"),
        (stray, r"\d+ extraneous bytes before marker 0xd9"),
    ):
        with pytest.raises(BadRow, match=f"damaged JPEG: Corrupt JPEG data: {message}"):
            decode_image(encode_image(data), strict=True)
    with pytest.raises(BadRow, match="broken image"):  # nobody can read it
        decode_image(encode_image(whole[: len(whole) // 2]), strict=True)


def test_bad_huffman_codes_are_damage() -> None:
    whole = _remade(jpeg(200, 300), "RGB", 1, progressive=True)
    found = set()
    for at in range(len(whole) // 3, len(whole), 97):
        with contextlib.suppress(BadRow):
            changed = encode_image(whole[:at] + whole[at + 20 :])
            decode_image(changed)
            try:
                decode_image(changed, strict=True)
            except BadRow as error:
                found.add((error.problem, "bad Huffman code" in str(error)))
    assert ("damaged JPEG", True) in found and {problem for problem, _ in found} == {"damaged JPEG"}


def test_a_png_is_never_a_damaged_jpeg() -> None:
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    assert decode_image(encode_image(png.getvalue()), strict=True).shape == (4, 4, 3)


def _gif() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "GIF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"!!!!", "broken base64"),
        (encode_image(jpeg())[:-5], "broken base64"),
        (encode_image(jpeg()[:400]), "broken image"),
        (encode_image(b"no image"), "broken image"),
        (encode_image(_gif()), "broken image"),
        (b"", "broken image"),
    ],
)
def test_bad_images_say_what_is_wrong(text: bytes, problem: str) -> None:
    with pytest.raises(BadRow) as caught:
        decode_image(text)
    assert caught.value.problem == problem


def test_images_that_claim_too_many_pixels_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_PIXELS", 1000)
    with pytest.raises(BadRow, match="30 x 40 pixels"):
        decode_image(base64.b64encode(jpeg()))


def test_sizes_come_in_two_forms() -> None:
    assert parse_size(b'[{"height": 40, "width": 30}]') == parse_size(b"40 30") == (40, 30)
    for text in (
        b"40",
        b"40 30 20",
        b"a b",
        b"[{}]",
        b"[]",
        b'[{"height": null, "width": 1}]',
        b'[{"height": Infinity, "width": 1}]',
    ):
        with pytest.raises(BadRow, match="expected height and width"):
            parse_size(text)
    with pytest.raises(BadRow, match="must be positive, got 0 and 3"):
        parse_size(b"0 3")
