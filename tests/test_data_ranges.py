"Ranges and types of data from outside: events, labels and normalization are converted or refused."

import numpy as np
import pytest
import torch
from helpers import check_one_line, draw_events

from snnkd_nb.core import UserError
from snnkd_nb.data import neuromorphic
from snnkd_nb.data.batches import ImageData, Split
from snnkd_nb.data.decode import Source, prepare_source
from snnkd_nb.data.events import PROTOCOLS, Camera, Recording, frames_of, sense
from snnkd_nb.data.neuromorphic import Recorded, read_event_file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path / "cache"))


# polarity


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float32])
def test_signed_polarity_in_memory(dtype):
    events = draw_events()
    signed = {**events, "p": (2 * events["p"] - 1).astype(dtype)}
    expected = frames_of(events, 4, 128)
    assert expected[:, 0].sum() > 0
    assert (frames_of(signed, 4, 128) == expected).all()


def test_boolean_polarity():
    events = draw_events()
    assert (frames_of({**events, "p": events["p"] == 1}, 4, 128) == frames_of(events, 4, 128)).all()


def test_only_darker_events():
    events = {**draw_events(), "p": np.full(300, -1)}
    frames = frames_of(events, 2, 128)
    assert frames[:, 0].sum() == 300 and frames[:, 1].sum() == 0


@pytest.mark.parametrize("values", [(1, 2), (-1, 0, 1), (0, 255)])
def test_other_polarities_are_refused(values):
    events = {**draw_events(), "p": np.resize(values, 300)}
    with pytest.raises(UserError) as error:
        frames_of(events, 2, 128, what="b.npz")
    check_one_line(error, "b.npz", "0 and 1, or -1 and 1")


def test_signed_polarity_in_an_npz(tmp_path):
    events = draw_events()
    np.savez(tmp_path / "a.npz", **events)
    np.savez(tmp_path / "b.npz", **{**events, "p": 2 * events["p"] - 1})
    plain, signed = (Recorded(tmp_path / f"{n}.npz", None, 2, "number", None)() for n in "ab")
    assert plain[:, :, 0].any()
    assert (plain == signed).all()


# times


@pytest.mark.parametrize("slicing", ["number", "time"])
def test_seconds_are_refused(slicing):
    events = draw_events()
    with pytest.raises(UserError) as error:
        frames_of({**events, "t": events["t"] / 1e6}, 4, 128, slicing)
    check_one_line(error, "whole microseconds")


def test_whole_seconds_are_refused_for_frames_of_equal_time():
    events = draw_events()
    with pytest.raises(UserError, match="too short for frames=4 of equal time"):
        frames_of({**events, "t": events["t"] // 10**6 + 2}, 4, 128, "time")


def test_seconds_in_an_npz_are_refused(tmp_path):
    events = draw_events()
    np.savez(tmp_path / "a.npz", **{**events, "t": events["t"] / 1e6})
    with pytest.raises(UserError) as error:
        read_event_file(tmp_path / "a.npz", None)
    check_one_line(error, "a.npz", "whole microseconds")


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64, np.int32, np.float64])
def test_types_of_times(dtype):
    events = draw_events()
    events["t"] -= events["t"][0]  # an unsigned difference below 0 must not wrap around
    typed = {**events, "t": events["t"].astype(dtype)}
    for slicing in ("number", "time"):
        assert (frames_of(typed, 4, 128, slicing) == frames_of(events, 4, 128, slicing)).all()


def test_floats_of_the_simulator_can_be_rounded():
    level = np.linspace(0, 3, 7)[:, None, None] * np.ones((1, 2, 2))
    events = sense(level, np.arange(7) * 1000.0, 0.3)
    with pytest.raises(UserError, match="whole microseconds"):
        frames_of(events, 2, 2)
    events["t"] = events["t"].round()
    assert frames_of(events, 2, 2).sum() == len(events["t"])


# coordinates, names and lengths


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_fractions_of_a_pixel_are_refused(value):
    events = draw_events()
    x = events["x"].astype(float)
    x[7] = value
    with pytest.raises(UserError) as error:
        frames_of({**events, "x": x}, 2, 128)
    check_one_line(error, "x has values")


def test_names_and_lengths():
    events = draw_events()
    with pytest.raises(UserError) as error:
        frames_of({"timestamp": events["t"], "x": events["x"], "y": events["y"]}, 2, 128)
    check_one_line(error, "no t, p", "timestamp")
    with pytest.raises(UserError, match="different lengths"):
        frames_of({**events, "x": events["x"][:-1]}, 2, 128)
    with pytest.raises(UserError, match="not one number per event"):
        frames_of({**events, "x": events["x"][:, None]}, 2, 128)


def test_array_with_named_fields():
    events = draw_events()
    table = np.zeros(300, [("x", "i2"), ("y", "i2"), ("t", "i8"), ("p", "?")])
    for name, values in events.items():
        table[name] = values
    assert (frames_of(table, 3, 128) == frames_of(events, 3, 128)).all()


@pytest.mark.parametrize("size, fits", [(34, False), (64, False), (128, True), (240, False)])
def test_sensors_of_other_sizes(tmp_path, size, fits):
    np.savez(tmp_path / "a.npz", **draw_events(size=size))
    recording = Recorded(tmp_path / "a.npz", None, 2, "number", None)
    if fits:
        assert recording().sum() == 300
        return
    with pytest.raises(UserError) as error:
        recording()
    check_one_line(error, "a.npz", "another camera")


def test_old_caches_of_events_are_not_used():
    assert neuromorphic.READER >= 3


def test_simulated_camera_does_not_drop_channels():
    def recording(item):
        camera = PROTOCOLS["n-mnist"], Camera(noise=0)
        return Recording(item, "it", 8, 2, "number", *camera, (0, "train", 0))()

    image = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    assert (recording(image) == recording(image[:, :, None])).all()
    with pytest.raises(UserError, match="it has 4 channels"):
        recording(np.stack([image] * 4, 2))


# labels and normalization


def source(labels, num_classes=2):
    images = [np.full((2, 2), 40 * i, np.uint8) for i in range(4)]
    parts = {"train": (images, labels), "test": (images, [0, 1, 0, 1])}
    return Source("labelled", str(labels), lambda: (list("abcdef")[:num_classes], parts))


def test_whole_labels_of_any_type():
    for labels in ([0, 1, 1, 0], np.array([0, 1, 1, 0], np.uint8), np.array([0.0, 1, 1, 0])):
        assert prepare_source(source(labels)).train.labels.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    "labels, part",
    [
        ([0, 0.9, 1, 0], "not whole numbers"),
        ([1, 2, 1, 2], "from 1 to 2 for 2 classes"),
        ([-1, 1, 0, 1], "from -1 to 1"),
        ([0, 1, 0], "(3,) for 4 images"),
        ([[0], [1], [0], [1]], "(4, 1) for 4 images"),
    ],
)
def test_other_labels_are_refused(labels, part):
    with pytest.raises(UserError) as error:
        prepare_source(source(labels))
    check_one_line(error, "labelled: the train split", part)


def made(labels=(0, 1), classes="ab", mean=0.5, std=0.25, channels=1):
    images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    good = Split(images, torch.tensor([0, 1]))
    moments = [torch.full((channels,), float(value)) for value in (mean, std)]
    return ImageData("made", list(classes), *moments, good, Split(images, torch.tensor(labels)))


@pytest.mark.parametrize(
    "options, part",
    [
        ({"labels": (1, 2)}, "test has labels from 1 to 2 for 2 classes"),
        ({"labels": (-1, 0)}, "test has labels from -1 to 0"),
        ({"mean": 120}, "divided by 255"),
        ({"mean": float("nan")}, "full brightness"),
        ({"std": 0}, "above 0"),
        ({"std": float("inf")}, "above 0"),
        ({"channels": 3}, "1 channels"),
    ],
)
def test_data_in_memory(options, part):
    assert made().num_classes == 2
    with pytest.raises(UserError) as error:
        made(**options)
    check_one_line(error, part)
