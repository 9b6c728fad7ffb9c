"Images of every mode become 8 bits by the range of their mode, or one line names file and mode."

import io
import struct

import numpy as np
import pytest
from PIL import Image

from snnkd_nb.core import UserError
from snnkd_nb.data.batches import ImageData
from snnkd_nb.data.decode import Source, pixels, prepare_source
from snnkd_nb.data.images import load

RAMP = np.arange(0, 256, 17, dtype=np.uint8).reshape(4, 4)


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[:, :, None], 3, 2)


def saved(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def tiff(path, values, sample_format=1, bits=None, photometric=1):
    "Write an uncompressed TIFF with the given tags, independently of Pillow."
    height, width = values.shape
    data = values.tobytes()
    bits = bits or values.dtype.itemsize * 8
    tags = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, height),
        (279, len(data)),
        (339, sample_format),
    ]
    content = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags))
    for tag, value in tags:
        content += struct.pack("<HHII", tag, 3, 1, value)
    path.write_bytes(content + struct.pack("<I", 0))
    return path


def test_16_bits_png(tmp_path):
    path = saved(tmp_path, Image.fromarray(RAMP.astype(np.uint16) * 257))
    assert (pixels(path) == grey(RAMP)).all()


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits_tiff_in_both_byte_orders(tmp_path, order):
    values = RAMP.astype(np.uint16) * 257
    image = Image.frombytes(
        "I;16" if order == "<" else "I;16B", (4, 4), values.astype(f"{order}u2").tobytes()
    )
    assert (pixels(saved(tmp_path, image, "a.tiff")) == grey(RAMP)).all()


def test_16_bits_pgm(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 4095\n" + np.array([819, 4095], ">u2").tobytes())
    assert pixels(tmp_path / "a.pgm")[0, :, 0].tolist() == [51, 255]


def test_12_bits_tiff_uses_its_own_range(tmp_path):
    # two values of 12 bits in three bytes: 0x333 = 819 and 0xfff = 4095
    packed = np.array([[0x33, 0x3F, 0xFF]], np.uint8)
    path = tiff(tmp_path / "a.tif", packed, bits=12)
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack("<HHII", 256, 3, 1, 3))
    content[at : at + 12] = struct.pack("<HHII", 256, 3, 1, 2)
    path.write_bytes(content)
    assert pixels(path)[0, :, 0].tolist() == [51, 255]


def test_tiff_in_which_zero_is_white(tmp_path):
    path = tiff(tmp_path / "a.tif", RAMP.astype(np.uint16) * 257, photometric=0)
    assert (pixels(path) == grey(255 - RAMP)).all()


def test_32_bits_integers(tmp_path):
    full = (RAMP / 255 * (2**31 - 1)).astype(np.int32)
    path = saved(tmp_path, Image.fromarray(full), "a.tiff")
    assert (pixels(path) == grey(RAMP)).all()


def test_float_tiff(tmp_path):
    path = saved(tmp_path, Image.fromarray((RAMP / 255).astype(np.float32)), "a.tiff")
    assert (pixels(path) == grey(RAMP)).all()


@pytest.mark.parametrize(
    "values, mode",
    [
        (np.array([[0, 4095]], np.int32), "mode I "),  # 12 bits in 32: would become black
        (np.array([[-5, 2**30]], np.int32), "mode I "),
        (np.array([[0, 255]], np.uint16), "mode I;16 "),
        (np.array([[0, 255]], np.float32), "mode F "),
        (np.array([[-1, 1]], np.float32), "mode F "),
        (np.array([[0, np.nan]], np.float32), "mode F "),
    ],
)
def test_values_without_a_clear_range_are_refused(tmp_path, values, mode):
    path = saved(tmp_path, Image.fromarray(values), "a.tiff")
    with pytest.raises(UserError) as error:
        pixels(path)
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text and mode in text and "replace" in text


def test_signed_bytes_are_refused(tmp_path):
    path = tiff(tmp_path / "a.tif", np.array([[-1, 1]], np.int8), sample_format=2)
    with pytest.raises(UserError, match="signed"):
        pixels(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff", "a.webp"])
def test_exif_orientation(tmp_path, orientation, name):
    "The stored image is what a camera writes that shows RAMP upright."
    upright = np.zeros((16, 24), np.uint8)
    upright[:8, :8] = 255  # bright corner: top left
    upright[8:, :8] = 128
    back = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(back)).convert("RGB")
    options = {"quality": 95} if name != "a.png" and name != "a.tiff" else {}
    path = saved(tmp_path, stored, name, exif=exif, **options)
    found = pixels(path)
    assert found.shape == (16, 24, 3)
    assert np.abs(found.astype(int) - grey(upright)).max() < 12


def test_orientation_of_16_bits(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.fromarray(np.rot90(RAMP).astype(np.uint16) * 257)
    assert (pixels(saved(tmp_path, wide, exif=exif)) == grey(RAMP)).all()


def test_hidden_colour_does_not_appear(tmp_path):
    hidden = np.zeros((1, 3, 4), np.uint8)
    hidden[0, :, :3] = 255, 0, 0
    hidden[0, :, 3] = 0, 128, 255
    found = pixels(saved(tmp_path, Image.fromarray(hidden)))
    assert found[0].tolist() == [[255, 255, 255], [255, 127, 127], [255, 0, 0]]


def test_grey_with_alpha(tmp_path):
    values = np.array([[[0, 0], [0, 255]]], np.uint8)
    image = Image.frombytes("LA", (2, 1), values.tobytes())
    assert pixels(saved(tmp_path, image))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("mode, colour", [("L", 7), ("RGB", (9, 8, 7)), ("P", 0)])
def test_transparent_colour(tmp_path, mode, colour):
    image = Image.new(mode, (2, 1), colour)
    if mode == "P":
        image.putpalette([9, 8, 7, 1, 2, 3])
    path = saved(tmp_path, image, transparency=colour)
    assert pixels(path)[0].tolist() == [[255] * 3] * 2


def test_palette_cmyk_black_and_white(tmp_path):
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixels(saved(tmp_path, palette))[0, 0].tolist() == [10, 20, 30]
    cyan = Image.new("CMYK", (1, 1), (255, 0, 0, 0))
    assert pixels(saved(tmp_path, cyan, "a.tiff"))[0, 0].tolist() == [0, 255, 255]
    assert pixels(saved(tmp_path, Image.new("1", (1, 1), 1)))[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tiff"])
def test_first_frame_of_an_animation(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("blue", "red", "lime")]
    options = {"lossless": True} if name == "a.webp" else {}
    path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
    assert pixels(path)[4, 4].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    "values",
    [
        RAMP,
        RAMP[:, :, None],
        RAMP.astype(np.uint16) * 257,
        (RAMP / 255).astype(np.float32),
        RAMP / 255,
    ],
)
def test_arrays_in_memory(values):
    found = pixels(values)
    assert found.dtype == np.uint8
    assert (found == RAMP[:, :, None]).all()


def test_booleans_in_memory():
    assert pixels(np.array([[True, False]]))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize(
    "values, part",
    [
        (RAMP.astype(np.int64), "int64"),
        (RAMP.astype(np.float32), "from 0 to 1"),
        (np.full((2, 2), np.nan), "float64"),
        (RAMP[0], "shape"),
    ],
)
def test_other_arrays_are_refused(values, part):
    with pytest.raises(UserError, match=part):
        pixels(values)


def test_function_with_another_type_is_refused():
    with pytest.raises(UserError, match="float64"):
        pixels(lambda: np.zeros((2, 2, 1)))


def test_data_set_of_floats_keeps_its_values(tmp_path, monkeypatch):
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path))
    parts = {"train": ([RAMP / 255, RAMP[::-1] / 255], [0, 1]), "test": ([RAMP / 255], [0])}
    data = prepare_source(Source("floats", "v1", lambda: (["a", "b"], parts)))
    assert isinstance(data, ImageData)
    assert (data.train.images[0, 0].numpy() == RAMP).all()


def test_a_folder_reads_16_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        for label, shift in (("a", 0), ("b", 1)):
            folder = tmp_path / "set" / split / label
            folder.mkdir(parents=True)
            wide = np.roll(RAMP, shift).astype(np.uint16) * 257
            Image.fromarray(wide).save(folder / "0.png")
    data = load(f"folder:{tmp_path / 'set'}")
    assert (data.test.images[0].numpy() == RAMP).all()


def test_broken_metadata_does_not_stop_an_image(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(grey(RAMP)).save(buffer, "png", exif=b"Exif\0\0broken")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert (pixels(tmp_path / "a.png") == grey(RAMP)).all()
