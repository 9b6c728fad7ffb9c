"Event data: frames, the simulated camera, CIFAR10-DVS and DVS128-Gesture in their true formats; every error is one line with its cure."

import itertools
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import draw_events
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from snnkd_nb.core import UserError
from snnkd_nb.data import events, images, neuromorphic
from snnkd_nb.data.events import (
    PROTOCOLS,
    Camera,
    frames_of,
    record,
    sense,
    spikingjelly_datasets,
)
from snnkd_nb.data.images import few_shot, label_noise, load, load_spec, split_validation
from snnkd_nb.models.zoo import create_model
from snnkd_nb.spec import DataSpec, ModelSpec
from snnkd_nb.training.job import build_model
from snnkd_nb.training.loop import evaluate, fit

quick = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path / "cache"))
    images._load_spec.cache_clear()
    return tmp_path / "cache" / "decoded"


@pytest.fixture
def shapes(tmp_path):
    "Six small images a split, of two classes."
    for s in ("train", "test"):
        for c in ("bars", "noise"):
            (folder := tmp_path / "shapes" / s / c).mkdir(parents=True)
            for i in range(3):
                a = (
                    np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)
                    if c == "noise"
                    else np.tile(np.arange(12) % (i + 2) * 80, (12, 1))
                )
                Image.fromarray(a.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path


# frames


@quick
@given(
    st.integers(1, 400),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(0, 2**31),
    st.sampled_from(("number", "time")),
)
def test_frames_are_spikingjellys(n, T, size, seed, slicing):
    e = draw_events(n, size, seed, 5000)
    if n < T:
        with pytest.raises(UserError, match=f"fewer than frames={T}"):
            frames_of(e, T, size, slicing)
        return
    ours = frames_of(e, T, size, slicing)
    assert ours.shape == (T, 2, size, size) and ours.sum() == n
    if slicing == "time":
        start, step = int(e["t"][0]), int(e["t"][-1] - e["t"][0]) // T
        edges = [start + step * i for i in range(T)] + [np.inf]
        assert ours.sum((1, 2, 3)).tolist() == [
            int(((e["t"] >= a) & (e["t"] < b)).sum()) for a, b in itertools.pairwise(edges)
        ]
        if (ours.sum((1, 2, 3)) == 0).any():
            return  # theirs stops there
    try:
        theirs = spikingjelly_datasets("utils").integrate_events_by_fixed_frames_number(
            e, slicing, T, size, size
        )
    except IndexError:
        return  # an empty piece of time
    assert (ours == theirs).all()


def test_an_event_behind_an_empty_last_piece_is_kept():
    t = np.array([0] * 5 + [10, 20, 30, 40, 50, 60, 70] + [92, 94, 96, 98])
    e = {"t": t, **{k: np.zeros(len(t), int) for k in "xyp"}}
    assert frames_of(e, 10, 1, "time").sum((1, 2, 3)).tolist() == [5, 1, 1, 1, 1, 1, 1, 1, 0, 4]


@quick
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=40),
    st.integers(1, 40),
    st.sampled_from(("number", "time")),
)
def test_every_event_is_in_exactly_one_frame(times, T, slicing):
    t = np.sort(np.array(times))
    left, right = events.SLICING[slicing](t, T)
    assert (
        len(left) == T
        and left[0] == 0
        and right[-1] == len(t)
        and (left[1:] == right[:-1]).all()
        and (left <= right).all()
    )


def test_equal_images_give_different_recordings(tmp_path):
    for s in ("train", "test"):
        (folder := tmp_path / "same" / s / "a").mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.tile(np.arange(12, dtype=np.uint8) * 20, (12, 1))).save(
                folder / f"{i}.png"
            )
    data = load("events:folder:same", tmp_path, noise=20.0)
    rows = [x for s in (data.train, data.test) for x in s.images]
    assert all(not torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i]), (
        "noise is another in every recording"
    )
    quiet = load("events:folder:same", tmp_path, noise=0.0)
    assert torch.equal(quiet.train.images[0], quiet.test.images[1])


@quick
@given(st.integers(0, 2**31), st.floats(0.02, 1.0), st.floats(0, 300))
def test_the_camera_keeps_its_rules(seed, theta, rest):
    level = np.random.default_rng(seed).normal(size=(12, 3, 3)).cumsum(0)
    e = sense(level, np.arange(12) * 100.0, theta, rest)
    assert (np.diff(e["t"]) >= 0).all() and (e["t"] >= 0).all() and (e["t"] <= 1100).all()
    for y, x in np.ndindex(3, 3):
        mine = (e["x"] == x) & (e["y"] == y)
        assert (np.diff(e["t"][mine]) >= rest - 1e-6).all()
        if rest == 0:
            assert (
                abs((2 * e["p"][mine] - 1).sum() * theta - (level[-1] - level[0])[y, x])
                <= theta + 1e-9
            )


def test_refractory_time_bounds_the_rate():
    image = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    n = [
        len(record(image, 16, PROTOCOLS["cifar10-dvs"], Camera(refractory=r, noise=0))["t"])
        for r in (0, 5, 50)
    ]
    assert n[0] > n[1] > n[2] > 0 and n[2] <= 256 * (400 / 50 + 1)


# simulated sets


def test_loaders_give_time_first(shapes):
    data = load("events:folder:shapes", shapes, frames=3)
    x, _y = next(iter(data.loader("test", 4)))
    assert (
        data.frames == 3
        and data.shape == (2, 12, 12)
        and data.describe()["frames"] == 3
        and "3 frames of 2×12×12" in repr(data)
    )
    assert (
        x.shape == (3, 4, 2, 12, 12)
        and x.dtype == torch.float32
        and x.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    )
    assert (
        torch.equal(x[1], data.test.images[:4, 2:4].float())
        and x.sum() == data.test.images[:4].sum()
    )
    assert "frames" not in load("folder:shapes", shapes).describe()


def test_changes_work_on_recordings(shapes):
    data = load("events:folder:shapes", shapes, noise=20.0)
    less = split_validation(label_noise(few_shot(data, 0.7), 0.5), 2)
    assert (
        less.frames == 4
        and less.describe()["sizes"] == {"train": 2, "val": 2, "test": 6}
        and less.fingerprint != data.fingerprint
    )
    for a in ("flip", "roll", "crop", "cutout", "erase", "crop+flip+roll"):
        x = next(iter(data.loader(batch_size=6, augment=a)))[0]
        assert x.shape == (4, 6, 2, 12, 12) and torch.equal(
            x, next(iter(data.loader(batch_size=6, augment=a)))[0]
        )
    with pytest.raises(UserError, match="channels"):
        next(iter(data.loader(augment="autoaugment")))


def test_recordings_are_made_once_and_alike_everywhere(shapes, cache, monkeypatch):
    one = load("events:folder:shapes", shapes, seed=3).fingerprint
    code = f"from snnkd_nb.data.images import load; print(load('events:folder:shapes', {str(shapes)!r}, seed=3).fingerprint)"
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "SNNKD_CACHE": str(shapes / "other"), "OMP_NUM_THREADS": "1"},
    )
    assert other.stdout.strip() == one, other.stderr
    monkeypatch.setattr(events, "record", None)
    assert (
        load("events:folder:shapes", shapes, seed=3).fingerprint == one
        and len(list(cache.iterdir())) == 1
    )


def test_options_and_images_decide(shapes):
    prints = {
        load("events:folder:shapes", shapes, **kw).fingerprint
        for kw in (
            {},
            {"frames": 5},
            {"slicing": "time"},
            {"protocol": "cifar10-dvs"},
            {"seed": 1},
            {"threshold": 0.3},
            {"noise": 9.0},
            {"refractory": 5.0},
            {"mismatch": 0.2},
            {"dark": 0.3},
            {"size": 16},
        )
    }
    assert len(prints) == 11


def test_a_teacher_sees_the_mean_and_a_wrong_T_says_so(shapes):
    data = load("events:folder:shapes", shapes, frames=2)
    x, _y = next(iter(data.loader("test", 6)))
    ann = create_model("vggsnn", width=0.05, in_channels=2, image_size=12).eval()
    assert torch.equal(ann(x), ann(x.mean(0))) and 0 <= evaluate(ann, data) <= 100
    assert build_model(ModelSpec("resnet20", T=2, width=0.1), data)(x).shape == (2, 6, 2)
    with pytest.raises(
        UserError,
        match=r"has 2 frames a recording, the model runs T=4 steps: DataSpec\(args=\{'frames': 4\}\)",
    ):
        build_model(ModelSpec("resnet20", T=4, width=0.1), data)
    with pytest.raises(UserError, match="2 frames, the model runs T=4"):
        create_model("resnet20", T=4, width=0.1, in_channels=2)(x)


def test_a_narrow_network_learns_digits_events():
    data = load_spec(DataSpec("digits-events", val=0.0))
    torch.manual_seed(0)
    model = create_model("vggsnn", T=4, width=0.125, in_channels=2, image_size=data.shape[-1])
    assert fit(model, data, epochs=3, batch_size=32, lr=0.1, on_event=lambda e: None).acc_last > 60


# real sets, written in their own formats


def write_aedat2(path, e):
    address = (127 - e["x"]) << 8 | (127 - e["y"]) << 1 | (1 - e["p"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n"
        + np.stack([address, e["t"]], 1).astype(">u4").tobytes()
    )


def write_aedat3(path, e, packet=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    out = [b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n"]
    for i in range(0, len(e["t"]), packet):
        word, t = (
            (e["x"] << 17 | e["y"] << 2 | e["p"] << 1 | 1)[i : i + packet],
            e["t"][i : i + packet],
        )
        out += [
            struct.pack("<HHIIIIII", 1, 1, 8, 4, 0, *[len(t)] * 3),
            np.stack([word, t], 1).astype("<u4").tobytes(),
        ]
    path.write_bytes(b"".join(out))


@pytest.fixture
def dvs(tmp_path):
    for k, c in enumerate(neuromorphic.CLASSES):
        for i in (0, 1, 99, 100, 101):
            write_aedat2(
                tmp_path / "dvs" / "extract" / c / f"cifar10_{c}_{i}.aedat",
                draw_events(200, seed=10 * i + k),
            )
    return tmp_path


@pytest.fixture
def gesture(tmp_path):
    home = tmp_path / "gesture" / "extract" / "DvsGesture"
    for k, (user, s) in enumerate(
        (("user01_lab", "train"), ("user23_led", "train"), ("user24_led", "test"))
    ):
        write_aedat3(home / f"{user}.aedat", draw_events(3000, seed=k))
        rows = [f"{c},{80000 * i},{80000 * i + 75000}" for i, c in enumerate((*range(1, 12), 8))]
        (home / f"{user}_labels.csv").write_text(
            "\n".join(["class,startTime_usec,endTime_usec", *rows, ""])
        )
        with (home / f"trials_to_{s}.txt").open("a") as f:
            f.write(f"{user}.aedat\n")
    return tmp_path


def test_cifar10_dvs_is_spikingjellys(dvs):
    theirs = spikingjelly_datasets("cifar10_dvs").CIFAR10DVS
    (dvs / "dvs" / "events_np").mkdir()
    theirs.create_raw_from_extracted(dvs / "dvs" / "extract", dvs / "dvs" / "events_np")
    ours = load("cifar10-dvs:dvs", dvs, frames=4, split="first-100-per-class", partial=True)
    want = sorted((y, x.tobytes()) for x, y in theirs(str(dvs / "dvs"), "frame", 4, "number"))
    assert (
        len(ours.train) == 20
        and len(ours.test) == 30
        and ours.classes == list(neuromorphic.CLASSES)
    )
    assert want == sorted(
        (y, x.tobytes())
        for s in (ours.train, ours.test)
        for x, y in zip(
            s.images.unflatten(1, (4, 2)).float().contiguous().numpy(), s.labels.tolist()
        )
    )


def test_splits_have_names(dvs, cache):
    def write(i):
        return [
            write_aedat2(
                dvs / "dvs" / "extract" / c / f"cifar10_{c}_{i}.aedat", draw_events(200, seed=i)
            )
            for c in neuromorphic.CLASSES
        ]

    for i in range(102, 107):
        write(i)
    kw = {"size": 48, "frames": 2, "partial": True}
    parts = [
        load("cifar10-dvs:dvs", dvs, split=s, seed=seed, **kw)
        for s, seed in (("random-0.9", 0), ("random-0.9", 1), ("first-100-per-class", 0))
    ]
    assert [len(p.test) for p in parts] == [10, 10, 30] and len({p.fingerprint for p in parts}) == 3
    assert (
        parts[0].shape == (2, 48, 48) and torch.bincount(parts[0].test.labels).tolist() == [1] * 10
    )
    spec = DataSpec(
        "cifar10-dvs:dvs",
        size=48,
        val=0.0,
        args={"frames": 2, "partial": True, "split": "first-100-per-class"},
    )
    assert (
        load_spec(spec, dvs).fingerprint == parts[2].fingerprint
        and "first-100-per-class" in spec.canonical()
    )


def test_gesture_is_spikingjellys(gesture):
    module = spikingjelly_datasets("dvs128_gesture")
    (raw := gesture / "gesture" / "events_np").mkdir()
    module.DVS128Gesture.create_raw_from_extracted(gesture / "gesture" / "extract", raw)
    ours = load("dvs-gesture:gesture", gesture, frames=4, partial=True)
    assert (len(ours.train), len(ours.test), ours.num_classes) == (24, 12, 11)
    for s, split in (("train", ours.train), ("test", ours.test)):
        theirs = module.DVS128Gesture(str(gesture / "gesture"), s == "train", "frame", 4, "number")
        want = sorted((int(theirs.classes[y]), x.tobytes()) for x, y in theirs)
        have = sorted(
            (y, x.numpy().tobytes())
            for x, y in zip(
                split.images.unflatten(1, (4, 2)).float().contiguous(), split.labels.tolist()
            )
        )
        assert want == have


def error(cache, *args, **kw):
    with pytest.raises(UserError) as e:
        load(*args, **kw)
    assert "\n" not in str(e.value)
    assert not cache.exists() or not list(cache.iterdir()), "nothing is cached from a failure"
    return str(e.value)


def test_bad_cifar10_dvs(dvs, cache):
    kw = {"frames": 4, "size": 48, "partial": True, "split": "first-100-per-class"}
    at = ("cifar10-dvs:dvs", dvs)
    file = dvs / "dvs" / "extract" / "dog" / "cifar10_dog_1.aedat"
    whole = file.read_bytes()
    assert (
        "figshare.com" in (text := error(cache, "cifar10-dvs:none", dvs))
        and f"{dvs}/none/airplane/cifar10_airplane_0.aedat" in text
    )
    assert "did you mean 'random-0.9'" in error(cache, *at, **kw | {"split": "random-0.8"})
    assert "5 recordings where 1000 belong" in error(cache, *at, **kw | {"partial": False})
    assert "has 200 events, fewer than frames=201" in error(cache, *at, **kw | {"frames": 201})
    assert "did you mean 'number'" in error(cache, *at, **kw | {"slicing": "numbers"})
    for lost in (1, 4, 7):
        file.write_bytes(whole[:-lost])
        assert "cifar10_dog_1.aedat is cut short" in error(cache, *at, **kw)
    file.write_bytes(whole[: whole.rfind(b"\r\n") + 2])
    assert "cifar10_dog_1.aedat is empty" in error(cache, *at, **kw)
    file.write_bytes(b"")
    assert "is empty" in error(cache, *at, **kw)
    for wrong in (
        b"<!DOCTYPE html><html><body>Sign in</body></html>",
        np.random.default_rng(0).bytes(8000),
        whole.replace(b"DAT2.0", b"DAT3.1"),
    ):
        file.write_bytes(wrong)
        assert "cifar10_dog_1.aedat is no recording: it begins with" in error(cache, *at, **kw)
    e = draw_events(200)
    write_aedat2(file, {**e, "t": np.append(e["t"][100:], e["t"][:100])})
    assert "cifar10_dog_1.aedat goes back in time 1 times, first at event 100" in error(
        cache, *at, **kw
    )
    assert "is a file; give the folder" in error(cache, f"cifar10-dvs:{file}", **kw)
    for bad in ({"seed": "a"}, {"seed": -1}, {"seed": 1.5}, {"seed": None}, {"steps": True}):
        assert f"{next(iter(bad))} = {next(iter(bad.values()))!r}" in error(cache, *at, **kw | bad)
    file.write_bytes(whole)
    assert load(*at, **kw).frames == 4 and len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    "name, said",
    [
        ("cifar10_dog_99.npz", "recording 99 twice, cifar10_dog_99.aedat and cifar10_dog_99.npz"),
        ("copy_99.aedat", "recording 99 twice"),
        ("cifar10_dog.aedat", "no number from 0 to 999"),
        ("cifar10_dog_99 (1).aedat", "no number from 0 to 999"),
        ("cifar10_dog_1000.aedat", "no number from 0 to 999"),
    ],
)
def test_no_recording_is_trained_and_tested_on(dvs, cache, name, said, partial):
    (dvs / "dvs" / "extract" / "dog" / name).write_bytes(b"x")
    for split in ("random-0.9", "first-100-per-class"):
        assert said in error(cache, "cifar10-dvs:dvs", dvs, frames=4, partial=partial, split=split)


def test_hidden_files_are_no_recordings(dvs, cache):
    (dvs / "dvs" / "extract" / "dog" / "._cifar10_dog_99.aedat").write_bytes(b"x")
    assert (
        len(load("cifar10-dvs:dvs", dvs, frames=4, partial=True, split="first-100-per-class").train)
        == 20
    )


def test_too_many_recordings_are_refused():
    with pytest.raises(UserError, match="take away those"):
        neuromorphic.check_count("x", 4, 3, True, "")
    with pytest.raises(UserError, match="0 recordings where 3 belong; unpack"):
        neuromorphic.check_count("x", 0, 3, True, "unpack")


def test_a_file_written_again_is_read_again(dvs):
    file = dvs / "dvs" / "extract" / "dog" / "cifar10_dog_1.aedat"
    first = neuromorphic.read_event_file(file, neuromorphic.read_aedat2)
    write_aedat2(file, draw_events(150, seed=9))
    assert (
        neuromorphic.read_event_file(file, neuromorphic.read_aedat2)["t"]
        == draw_events(150, seed=9)["t"]
    ).all() and len(first["t"]) == 200
    with pytest.raises(UserError, match="is no recording"):
        neuromorphic.read_event_file(file, neuromorphic.read_aedat3)


def test_a_damaged_npz_is_named(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK")
    recording = neuromorphic.Recorded(tmp_path / "a.npz", None, 2, "time", 48)
    with pytest.raises(UserError, match="cannot read .*a.npz: .*; fetch it again"):
        recording()


def test_a_bug_of_ours_is_no_damaged_file(dvs):
    def broken(path):
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        neuromorphic.read_event_file(
            dvs / "dvs" / "extract" / "dog" / "cifar10_dog_1.aedat", broken
        )

    def unreadable(path):
        raise OSError("disk. on fire")

    with pytest.raises(UserError, match="disk; fetch") as e:
        neuromorphic.read_event_file(
            dvs / "dvs" / "extract" / "dog" / "cifar10_dog_1.aedat", unreadable
        )
    assert isinstance(e.value.__cause__, OSError)


def test_bad_gesture(gesture, cache):
    at, kw, home = (
        ("dvs-gesture:gesture", gesture),
        {"frames": 4, "partial": True},
        gesture / "gesture" / "extract" / "DvsGesture",
    )
    file, csv = home / "user24_led.aedat", home / "user24_led_labels.csv"
    whole, text = file.read_bytes(), csv.read_text()
    assert "24 recordings where 1176 belong" in error(cache, *at, frames=4)
    assert "valid: official" in error(cache, *at, **kw | {"split": "random-0.9"})
    assert "fewer than frames=1024" in error(cache, *at, **kw | {"frames": 1024})
    csv.unlink()
    assert "user24_led_labels.csv is missing" in error(cache, *at, **kw)
    for bad in (
        "class,startTime_usec,endTime_usec\n",
        "class,a,b\n12,0,5\n",
        "class,a\n1,2\n",
        "class,a,b\none,2,3\n",
    ):
        csv.write_text(bad)
        assert "user24_led_labels.csv" in error(cache, *at, **kw)
    csv.write_text(text + "2,5000000,6000000\n")
    assert "from 5000000 to 6000000 µs: the file ends at 99" in error(cache, *at, **kw)
    csv.write_text(text.replace("8,880000,955000", "8,955000,880000"))
    assert (
        "user24_led_labels.csv has a gesture from 955000 to 880000 µs, which ends before it starts"
        in error(cache, *at, **kw)
    )
    csv.write_bytes(b"\xff\xfe" + text.encode("utf-16-le"))
    assert "user24_led_labels.csv is no text file" in error(cache, *at, **kw)
    csv.write_text(text)
    file.write_bytes(whole[: whole.index(b"#!END-HEADER\r\n") + 15 + 30 * (28 + 8 * 64) - 1])
    assert "the file ends at" in error(cache, *at, **kw), "cut between two packets"
    at_24 = whole.index(struct.pack("<HHIIIIII", 1, 1, 8, 4, 0, 64, 64, 64)) + 20
    file.write_bytes(whole[:at_24] + struct.pack("<II", 65, 65) + whole[at_24 + 8 :])
    assert "a packet for 64 events says it has 65" in error(cache, *at, **kw)
    file.write_bytes(whole)
    lists = home / "trials_to_train.txt"
    names = lists.read_text()
    lists.write_text("\n")
    assert "the train split" in (said := error(cache, *at, **kw)) and "0 recordings" in said
    lists.write_text(names + "user24_led.aedat\n")
    assert "user24_led.aedat is listed in trials_to_train.txt and in trials_to_test.txt" in error(
        cache, *at, **kw
    )
    lists.write_text(names)
    for lost in (3, 8, 64 * 8 + 8):
        file.write_bytes(whole[:-lost])
        assert "user24_led.aedat is cut short" in error(cache, *at, **kw)
    file.unlink()
    assert "user24_led.aedat is missing" in error(cache, *at, **kw)
    (home / "trials_to_test.txt").unlink()
    assert "DvsGesture.tar.gz" in error(cache, *at, **kw) and "trials_to_train.txt" in error(
        cache, "dvs-gesture:none", gesture
    )


def test_bad_simulation(shapes, cache):
    assert "events needs an image data set" in error(cache, "events")
    assert "did you mean 'digits'" in error(cache, "events:digit")
    assert "digits-events is none" in error(cache, "events:digits-events")
    assert "frames = 0" in error(cache, "digits-events", frames=0) and "frames = 2.5" in error(
        cache, "digits-events", frames=2.5
    )
    assert "threshold = 0" in error(cache, "digits-events", threshold=0) and "noise = -1" in error(
        cache, "digits-events", noise=-1
    )
    assert "did you mean 'n-mnist'" in error(cache, "digits-events", protocol="mnist")
    assert "did you mean 'frames'" in error(cache, "digits-events", frame=4)
    assert (
        "0.png is empty"
        in (said := error(cache, "events:folder:shapes", shapes, threshold=9.0, noise=0))
        and "take a lower threshold= or a larger size=" in said
        and "remove" not in said
    )
    assert "size = 3000: simulating a sensor of 3000x3000 pixels takes 20" in error(
        cache, "digits-events", size=3000
    )
    for seed in ("a", -1, 1.5, None):
        assert f"seed = {seed!r}" in error(cache, "digits-events", seed=seed)
    Image.new("L", (13, 12)).save(shapes / "shapes" / "train" / "bars" / "1.png")
    assert "1.png is empty" in error(cache, "events:folder:shapes", shapes, noise=0.0)
