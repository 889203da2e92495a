"""Images as a viewer shows them: Pillow's own transposition and conversion are the oracle."""
from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from utils.data.images import ImageError, check_image, image_size, pillow_to_bgr, read_image

WIDTH, HEIGHT = 61, 37


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    """(37, 61, 3) of smooth patches, so that JPEG keeps them; no symmetry."""
    small = np.random.default_rng(0).integers(0, 256, (5, 8, 3), np.uint8)
    return np.kron(small, np.ones((8, 8, 1), np.uint8))[:HEIGHT, :WIDTH]


def shown(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[..., ::-1]


def exif(orientation: int, padding: int = 0) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    if padding:
        tags[0x010E] = "x" * padding  # ImageDescription
    return tags


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_to_pixels_and_size(tmp_path, rgb, suffix, orientation):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(rgb).save(path, exif=exif(orientation), **({"lossless": True} if suffix == ".webp" else {}))
    image, expected = read_image(path), shown(path)
    assert image.shape == expected.shape == ((WIDTH, HEIGHT, 3) if orientation >= 5 else (HEIGHT, WIDTH, 3))
    assert np.abs(image.astype(int) - expected).max() <= (3 if suffix == ".jpg" else 0)
    assert image_size(path) == check_image(path) == (image.shape[1], image.shape[0])
    assert image.flags.c_contiguous and image.flags.writeable


def test_orientation_counts_behind_a_long_header_and_a_wrong_one_is_ignored(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "long.jpg", exif=exif(6, padding=20_000))
    assert image_size(tmp_path / "long.jpg") == (HEIGHT, WIDTH)
    entry = b"\0\1" + b"\x01\x12\0\3\0\0\0\1\0\6\0\0" + bytes(4)  # one SHORT: 6
    tiff = b"MM\0*" + (6000).to_bytes(4, "big") + bytes(5992) + entry  # the directory lies at the end
    Image.fromarray(rgb).save(tmp_path / "far.jpg", exif=b"Exif\0\0" + tiff)
    assert image_size(tmp_path / "far.jpg") == (HEIGHT, WIDTH)
    Image.fromarray(rgb).save(tmp_path / "wrong.jpg", exif=exif(9))
    assert image_size(tmp_path / "wrong.jpg") == (WIDTH, HEIGHT)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_colour_models_become_bgr(tmp_path, rgb, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.tiff" if mode == "YCbCr" else "a.png")
    Image.fromarray(rgb).convert(mode).save(path)
    try:
        shown(path)
    except OSError as error:
        pytest.skip(f"this Pillow does not read what it writes: {error}")
    image = read_image(path)
    assert image.shape == (HEIGHT, WIDTH, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - shown(path)).max() <= 1


def test_colours_are_in_bgr_order_in_every_format(tmp_path):
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    for suffix in (".jpg", ".png", ".bmp", ".tif", ".webp"):
        red.save(tmp_path / f"red{suffix}")
        assert np.abs(read_image(tmp_path / f"red{suffix}").astype(int) - (0, 0, 255)).max() <= 3, suffix


def test_transparency_lies_on_white(tmp_path):
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0].tolist() == [[0, 0, 255], [255, 255, 255], [204, 204, 204]]  # 255 * (1 - 51/255) = 204
    Image.fromarray(rgba[:, :, :3]).save(tmp_path / "key.png", transparency=(0, 0, 0))
    assert read_image(tmp_path / "key.png")[0].tolist() == [[0, 0, 255], [0, 0, 255], [255, 255, 255]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 255, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=1)
    assert read_image(tmp_path / "p.png")[0].tolist() == [[255, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_keep_the_high_byte(tmp_path, suffix, channels):
    deep = np.random.default_rng(1).integers(0, 65536, (5, 7, channels), np.uint16)
    cv2.imwrite(str(tmp_path / f"a{suffix}"), deep)
    assert np.array_equal(read_image(tmp_path / f"a{suffix}"), np.broadcast_to(deep >> 8, (5, 7, 3)))


@pytest.mark.parametrize("reduce", [2, 4, 8])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_can_be_decoded_smaller(tmp_path, rgb, reduce, mode):
    path = tmp_path / "a.jpg"
    Image.fromarray(rgb[:32, :56]).convert(mode).save(path, quality=95, subsampling=0)
    full, small = read_image(path), read_image(path, reduce)
    assert small.shape == (32 // reduce, 56 // reduce, 3)
    assert np.abs(small.astype(int) - cv2.resize(full, small.shape[1::-1], interpolation=cv2.INTER_AREA)).mean() < 3
    Image.fromarray(rgb).convert(mode).save(path, **({} if mode == "CMYK" else {"exif": exif(6)}))
    full, small = read_image(path), read_image(path, reduce)
    assert small.shape[:2] == (-(-full.shape[0] // reduce), -(-full.shape[1] // reduce))


def test_other_formats_ignore_reduce(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 4).shape == (HEIGHT, WIDTH, 3)


def test_32_bits_are_refused_and_not_black(tmp_path):
    """Whatever the values: of which range they are no file says."""
    for n, values in enumerate((np.full((8, 8), 200, np.int32), np.full((8, 8), 60_000, np.int32), np.full((8, 8), 0.5, np.float32))):
        Image.fromarray(values).save(tmp_path / f"{n}.tif")
        with pytest.raises(ImageError, match=r"\.tif: pixels of 32 bits: save it with 8 or 16 bits"):
            read_image(tmp_path / f"{n}.tif")


def test_16_bits_as_pillow_holds_them(tmp_path):
    Image.fromarray(np.full((8, 8), 51_200, np.uint16)).save(tmp_path / "grey.pgm")
    for image in (read_image(tmp_path / "grey.pgm"), pillow_to_bgr(Image.open(tmp_path / "grey.pgm"))):
        assert (image == 200).all()


def test_more_pixels_than_can_be_read_are_told_by_the_scan(tmp_path, monkeypatch):
    Image.new("1", (90, 80)).save(tmp_path / "large.png")
    assert check_image(tmp_path / "large.png") == (90, 80)
    monkeypatch.setattr("utils.data.images._MOST_PIXELS", 90 * 80 - 1)
    with pytest.raises(ImageError, match=r"large\.png: 90x80 pixels of its kind are more than can be read: cut it in tiles"):
        check_image(tmp_path / "large.png")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".webp"])
def test_truncated_files_are_refused(tmp_path, rgb, suffix):
    noise = np.random.default_rng(2).integers(0, 256, (90, 90, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format=Image.registered_extensions()[suffix])
    whole = buffer.getvalue()
    path = tmp_path / f"a{suffix}"
    for length in (0, 1, 5, len(whole) // 4, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(ImageError, match=r"a\.\w+: ") as error:
            read_image(path)
        assert "\n" not in str(error.value)
        if suffix != ".tif":  # its header says nothing about its length
            with pytest.raises(ImageError):
                check_image(path)


def test_a_complete_jpeg_with_bytes_behind_it_is_accepted(tmp_path, rgb):
    path = tmp_path / "a.jpg"
    Image.fromarray(rgb).save(path)
    expected = read_image(path)
    path.write_bytes(path.read_bytes() + b"trailer of a camera" * 9)
    assert check_image(path) == (WIDTH, HEIGHT)
    assert np.abs(read_image(path).astype(int) - expected).max() <= 2


def test_what_is_no_image_is_refused_in_one_line(tmp_path):
    (tmp_path / "text.jpg").write_text("hello\n" * 2000)
    (tmp_path / "folder.jpg").mkdir()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name in ("text.jpg", "folder.jpg", "missing.jpg"):
        for function in (read_image, image_size, check_image):
            with pytest.raises(ImageError, match=name):
                function(tmp_path / name)
    with pytest.raises(ImageError, match="8 or 16 bits"):
        read_image(tmp_path / "float.tif")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".bmp"])
def test_damaged_bytes_never_raise_anything_else(tmp_path, rgb, suffix):
    rng = np.random.default_rng(3)
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format=Image.registered_extensions()[suffix], exif=exif(6))
    whole = np.frombuffer(buffer.getvalue(), np.uint8)
    path = tmp_path / f"a{suffix}"
    for _ in range(60):
        damaged = whole.copy()
        damaged[rng.integers(0, min(len(whole), 400), 3)] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        try:
            height, width = read_image(path).shape[:2]
        except ImageError:
            continue
        assert image_size(path) == (width, height)


def test_real_photographs(shared):
    path = shared / "media" / "bus.jpg"
    assert image_size(path) == (810, 1080)
    assert np.abs(read_image(path).astype(int) - shown(path)).mean() < 0.5
