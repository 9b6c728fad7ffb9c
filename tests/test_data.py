"Data sets: loading, caching, loaders, augmentation, corruption, streaming; every error is one line with its cure."

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import check_one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from snnkd_nb.core import UserError, data_dir
from snnkd_nb.data import batches, decode, images, loaders
from snnkd_nb.data.batches import ImageData, Split
from snnkd_nb.data.images import few_shot, label_noise, load, load_spec, split_validation, subset
from snnkd_nb.spec import DataSpec

quick = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path / "cache"))
    images._load_spec.cache_clear()
    return tmp_path / "cache" / "decoded"


def paint(path, value, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def pets(tmp_path):
    for i, (s, c, k) in enumerate(
        (s, c, k) for s in ("train", "test") for c in ("cat", "dog", "owl") for k in range(4)
    ):
        paint(tmp_path / "pets" / s / c / f"{k}.png", i)
    return tmp_path / "pets"


def made(labels, K):
    "A data set whose images are their own numbers."
    n = len(labels)
    x = torch.zeros(n, 2, 2, 3, dtype=torch.uint8)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = torch.arange(n) % 256, torch.arange(n) // 256
    s = Split(x.permute(0, 3, 1, 2), torch.as_tensor(labels, dtype=torch.int64))
    return ImageData("made", [str(c) for c in range(K)], torch.zeros(3), torch.ones(3), s, s)


def numbers(split):
    return (split.images[:, 0, 0, 0].long() + 256 * split.images[:, 1, 0, 0].long()).tolist()


# augmentation


@quick
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_crop_is_the_loop(B, C, H, W, pad, seed, real):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (B, C, H, W), generator=g, dtype=torch.uint8)
    x = x.float() if real else x
    dy, dx = torch.randint(0, 2 * pad + 1, (2, B), generator=g)
    p = F.pad(x, (pad,) * 4)
    want = torch.stack(
        [im[:, a : a + H, b : b + W] for im, a, b in zip(p, dy.tolist(), dx.tolist())]
    )
    got = batches.crop_at(x.contiguous(memory_format=torch.channels_last), pad, dy, dx)
    assert (
        torch.equal(got, want)
        and got.is_contiguous(memory_format=torch.channels_last)
        and got.dtype == x.dtype
    )


@quick
@given(
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(2, 12),
    st.integers(2, 12),
    st.integers(1, 12),
    st.integers(0, 2**31),
)
def test_cutout_is_the_loop(B, C, H, W, length, seed):
    x = torch.randint(1, 256, (B, C, H, W), dtype=torch.uint8)
    g = torch.Generator().manual_seed(seed)
    ys, xs = torch.randint(0, H, (B,), generator=g), torch.randint(0, W, (B,), generator=g)
    want, half = x.clone(), length // 2
    for im, a, b in zip(want, ys.tolist(), xs.tolist()):
        im[:, max(0, a - half) : a + half, max(0, b - half) : b + half] = 0
    assert torch.equal(batches.cutout(x, length, torch.Generator().manual_seed(seed)), want)


@quick
@given(st.integers(1, 6), st.integers(2, 20), st.integers(2, 20), st.integers(0, 2**31))
def test_erase_is_one_rectangle_inside(B, H, W, seed):
    x = torch.ones(B, 2, H, W)
    out = batches.random_erase(x, torch.Generator().manual_seed(seed), p=1.0)
    for im in out:
        hole = (im == 0).all(0)
        rows, cols = hole.any(1), hole.any(0)
        assert torch.equal(hole, rows[:, None] & cols[None]) and torch.equal(hole, (im == 0).any(0))
        for side in (rows, cols):
            assert (side.int().diff() == 1).sum() <= 1


def test_flip_and_roll_keep_pixels():
    x, g = (
        torch.randint(0, 256, (64, 3, 5, 7), dtype=torch.uint8),
        lambda: torch.Generator().manual_seed(0),
    )
    flipped = batches.random_flip(x, g())
    same, mirrored = ((flipped == y).flatten(1).all(1) for y in (x, x.flip(3)))
    assert (same ^ mirrored).all() and same.any() and mirrored.any()
    assert torch.equal(
        batches.random_roll(x, 2, g()).flatten(1).sort().values, x.flatten(1).sort().values
    )


def test_augmenter_names():
    with pytest.raises(UserError) as e:
        batches.augmenter("crop+flop")
    check_one_line(e, "did you mean", "flip")
    x = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    for name in (*batches.AUGMENT, "crop+flip+cutout+erase", "none"):
        out = batches.augmenter(name, mean=torch.tensor([0.3]))(x, torch.Generator().manual_seed(0))
        assert out.shape == x.shape and out.dtype == torch.uint8


# loaders


@pytest.mark.parametrize("names", ["none", "crop+flip+cutout", "autoaugment+erase"])
def test_batches_depend_on_seed_and_epoch_alone(names):
    d = made(range(50), 50)

    def run(seed, epoch):
        return [
            (x.clone(), y)
            for x, y in d.loader(batch_size=16, seed=seed, epoch=epoch, augment=names)
        ]

    a = run(0, 3)
    torch.manual_seed(9)
    torch.rand(5)
    next(iter(d.loader(augment=names)))
    run(1, 0)
    for (x, y), (u, v) in zip(a, run(0, 3), strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    assert not torch.equal(torch.cat([y for _, y in a]), torch.cat([y for _, y in run(0, 4)]))
    assert sorted(torch.cat([y for _, y in a]).tolist()) == list(range(50))


def test_loader_gives_what_the_split_holds():
    d = dataclasses.replace(
        made(range(10), 10), mean=torch.tensor([0.1, 0.2, 0.3]), std=torch.tensor([0.5, 1.0, 2.0])
    )
    x, y = next(iter(d.loader("test", 10)))
    want = (d.test.images.float() / 255 - d.mean[:, None, None]) / d.std[:, None, None]
    assert (
        torch.allclose(x, want, atol=1e-6)
        and y.tolist() == list(range(10))
        and x.is_contiguous(memory_format=torch.channels_last)
    )
    before = d.train.images.clone()
    for x, _ in d.loader(augment="crop+cutout"):
        x.zero_()
    assert torch.equal(before, d.train.images), "a batch is the caller's to change"
    x, _ = next(iter(d.loader("test", 10, shuffle=False)))
    x.zero_()
    assert torch.equal(before, d.test.images)
    assert (
        len(list(d.loader(batch_size=4, drop_last=True)))
        == 2
        == len(d.loader(batch_size=4, drop_last=True))
    )


def test_loader_errors():
    d = made(range(4), 4)
    for kw, part in (
        ({"split": "val"}, "no validation split"),
        ({"split": "tset"}, "did you mean"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"batch_size": 5, "drop_last": True}, "leaves no batch"),
        ({"batch_size": 1.5}, "batch_size = 1.5"),
        ({"augment": "crpo"}, "did you mean 'crop'"),
    ):
        with pytest.raises(UserError) as e:
            d.loader(**kw)
        check_one_line(e, part)


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.rand(2, 3, 4, 4), "give uint8"),
        (torch.zeros(2, 3, dtype=torch.uint8), "shape (2, 3)"),
    ],
    ids=["real numbers", "no pixels"],
)
def test_images_of_another_form_are_refused(images, message):
    with pytest.raises(UserError) as e:
        Split(images, torch.tensor([0, 1]))
    check_one_line(e, message)


def test_old_names_still_work():
    with pytest.warns(DeprecationWarning, match="make_normalizer"):
        assert getattr(batches, "normaliser") is batches.make_normalizer  # noqa: B009


def test_streamed_data_are_shown_in_one_line(pets):
    data = load("imagefolder-stream:pets", pets.parent, size=8)
    assert repr(data) == (
        "ImageData('imagefolder-stream:pets', 12 train / 12 test, 3 classes, 3×8×8)"
    )


# corruption


LABELS = st.lists(st.integers(0, 4), min_size=10, max_size=120).map(lambda y: [0, 1, 2, 3, 4, *y])


@quick
@given(LABELS, st.floats(0, 1), st.integers(0, 5))
def test_label_noise_counts(labels, f, seed):
    d = made(labels, 5)
    n = label_noise(d, f, seed)
    assert (n.train.labels != d.train.labels).sum() == round(f * len(labels))
    assert n.train.labels.min() >= 0 and n.train.labels.max() < 5
    assert torch.equal(n.train.images, d.train.images) and n.test is d.test
    assert torch.equal(n.train.labels, label_noise(d, f, seed).train.labels)


@quick
@given(LABELS, st.floats(0.01, 1), st.integers(0, 5))
def test_few_shot_keeps_the_fraction_of_every_class(labels, f, seed):
    d = made(labels, 5)
    few = few_shot(d, f, seed)
    got, had = (
        torch.bincount(few.train.labels, minlength=5).tolist(),
        torch.bincount(d.train.labels, minlength=5).tolist(),
    )
    assert got == [max(1, round(f * n)) for n in had]
    assert few.train.labels.tolist() == [labels[i] for i in numbers(few.train)] and len(
        set(numbers(few.train))
    ) == sum(got)
    assert set(numbers(few.train)) <= set(numbers(few_shot(d, min(1, 2 * f), seed).train))


@quick
@given(LABELS, st.data(), st.integers(0, 5))
def test_subset_is_balanced_and_nested(labels, data, seed):
    d = made(labels, 5)
    n = data.draw(st.integers(5, len(labels)))
    s = subset(d, n, seed)
    got, had = (
        torch.bincount(s.train.labels, minlength=5),
        torch.bincount(d.train.labels, minlength=5),
    )
    assert got.sum() == n and (got[got < had] >= got.max() - 1).all()
    assert set(numbers(s.train)) <= set(numbers(subset(d, min(n + 3, len(labels)), seed).train))


@quick
@given(LABELS, st.floats(0.1, 0.5), st.integers(0, 5))
def test_validation_is_disjoint(labels, f, seed):
    d = made(labels * 5, 5)
    v = split_validation(d, f, seed)
    assert sorted(numbers(v.train) + numbers(v.val)) == list(range(len(labels) * 5))
    had = torch.bincount(d.train.labels)
    assert torch.bincount(v.val.labels, minlength=5).tolist() == [
        min(round(f * int(n)), int(n) - 1) for n in had
    ]


def test_corruption_errors():
    d = made([0, 1, 2, 0, 1, 2], 3)
    one = made([0, 0], 1)
    for fn, part in (
        (lambda: label_noise(d, -0.1), "label_noise = -0.1"),
        (lambda: label_noise(d, 1.01), "label_noise = 1.01"),
        (lambda: label_noise(d, float("nan")), "label_noise = nan"),
        (lambda: label_noise(one, 0.5), "only one class"),
        (lambda: few_shot(d, 0), "shots = 0"),
        (lambda: few_shot(d, 2), "shots = 2"),
        (lambda: subset(d, 7), "6 training images"),
        (lambda: subset(d, 2), "at least one image"),
        (lambda: subset(d, -1), "subset = -1"),
        (lambda: subset(d, 3.5), "subset = 3.5"),
        (lambda: split_validation(d, 6), "nothing would be left"),
        (lambda: split_validation(d, 1.5), "val = 1.5"),
        (lambda: split_validation(split_validation(d, 3), 0.5), "already"),
    ):
        with pytest.raises(UserError) as e:
            fn()
        check_one_line(e, part)


def test_composition_is_recorded():
    d = label_noise(few_shot(made(list(range(5)) * 20, 5), 0.5, seed=1), 0.2, seed=2)
    assert d.describe()["changes"] == [{"shots": 0.5, "seed": 1}, {"label_noise": 0.2, "seed": 2}]
    assert d.describe()["sizes"] == {"train": 50, "test": 100}
    assert (
        d.fingerprint
        == label_noise(few_shot(made(list(range(5)) * 20, 5), 0.5, seed=1), 0.2, seed=2).fingerprint
    )


# data sets by name


def test_digits_never_change():
    d = load("digits")
    assert d.fingerprint == "019fb8ad820d1b27", (
        "the split or the pixels changed; every stored run would lose its meaning"
    )
    noisy = load_spec(DataSpec("digits", subset=400, shots=0.5, label_noise=0.3, corrupt_seed=1))
    assert noisy.fingerprint == "8024c9f910966311", "a corruption changed"
    assert noisy.describe()["sizes"] == {"train": 180, "val": 20, "test": 359} and load(
        "digits", size=12
    ).shape == (1, 12, 12)


def test_the_second_load_reads_no_image(pets, cache, monkeypatch):
    first = load("folder:pets", pets.parent)
    assert (
        first.shape == (3, 4, 6)
        and first.classes == ["cat", "dog", "owl"]
        and first.describe()["sizes"] == {"train": 12, "test": 12}
    )
    for s in ("train", "test"):
        files = sorted((pets / s).rglob("*.png"))
        assert all(
            (np.asarray(Image.open(f)) == i.permute(1, 2, 0).numpy()).all()
            for f, i in zip(files, first.split(s).images, strict=True)
        )
    monkeypatch.setattr(decode, "pixels", lambda *a: pytest.fail("an image was read"))
    again = load("folder:pets", pets.parent)
    assert (
        again.fingerprint == first.fingerprint
        and again.train.digest
        == Split(
            first.train.images.clone(memory_format=torch.channels_last), first.train.labels
        ).digest
    )


@pytest.mark.parametrize("file", ["images.npy", "labels.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone"])
def test_a_damaged_cache_is_made_again(pets, cache, file, damage):
    fingerprint = load("folder:pets", pets.parent).fingerprint
    (path,) = cache.glob(f"*/{file}")
    b = bytearray(path.read_bytes())
    b[len(b) // 2 + 40] ^= 16
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": bytes(b[:-9]), "flip": bytes(b), "empty": b""}[damage])
    assert load("folder:pets", pets.parent).fingerprint == fingerprint
    assert [p.name for p in cache.iterdir()] == [path.parent.name]


def test_a_changed_folder_is_decoded_again(pets):
    a = load("folder:pets", pets.parent)
    paint(pets / "train" / "cat" / "0.png", 77)
    b = load("folder:pets", pets.parent)
    paint(pets / "train" / "cat" / "9.png", 78)
    assert len({a.fingerprint, b.fingerprint, load("folder:pets", pets.parent).fingerprint}) == 3


def test_the_fingerprint_is_of_the_content(pets, tmp_path):
    import shutil

    shutil.copytree(pets, tmp_path / "elsewhere" / "other", copy_function=shutil.copy)
    assert (
        load("folder:other", tmp_path / "elsewhere").fingerprint
        == load("folder:pets", tmp_path).fingerprint
    )


def test_nothing_is_left_of_a_killed_preparation(pets, cache):
    code = (
        "import os; from snnkd_nb.data import decode, images; whole = decode.pixels\n"
        "def pixels(item, size): return whole(item, size) if 'dog' not in str(item) else os.kill(os.getpid(), 9)\n"
        f"decode.pixels = pixels; images.load('folder:pets', {str(pets.parent)!r})"
    )
    r = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SNNKD_CACHE": str(cache.parent)},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
    )
    assert r.returncode == -9, r.stderr
    load("folder:pets", pets.parent)
    assert [p.name[0] for p in cache.iterdir()] == ["f"]


def test_a_full_disk_is_one_line(pets, cache, monkeypatch):
    def full(*a):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError) as e:
        load("folder:pets", pets.parent)
    check_one_line(e, "No space left", "SNNKD_CACHE")
    assert not list(cache.iterdir())


@pytest.mark.parametrize("kind", ["folder", "imagefolder-stream"])
def test_folder_errors(pets, cache, kind):
    def error(*parts, **kw):
        with pytest.raises(UserError) as e:
            data = load(f"{kind}:pets", pets.parent, **kw)
            for s in data.splits:
                list(data.loader(s))
        check_one_line(e, *parts)
        assert not cache.exists() or not list(cache.iterdir())

    error("size = 0", size=0)
    error("size = -3", size=-3)
    (pets / "test" / "newt").mkdir()
    error("newt", "has no images")
    paint(pets / "test" / "newt" / "0.png", 0)
    error("test has 1 class(es) that train lacks (newt)")
    (pets / "test" / "newt").rename(pets / "train" / "newt")
    error("train has 1 class(es) that test lacks (newt)")
    (pets / "train" / "newt" / "0.png").unlink()
    (pets / "train" / "newt").rmdir()
    (bad := pets / "train" / "dog" / "2.png").write_bytes(bad.read_bytes()[:60])
    error(str(bad), "replace or remove", **({"workers": 0} if kind != "folder" else {}))
    (pets / "test").rename(pets / "tests")
    error("is no image folder", "test/<class>")
    (pets / "tests").rename(pets / "test")
    (pets / "train").rename(pets / "old")
    (pets / "train").mkdir()
    error("has no class folders")


def test_images_of_several_sizes(pets):
    paint(pets / "test" / "owl" / "7.png", 1, size=(9, 5))
    with pytest.raises(UserError) as e:
        load("folder:pets", pets.parent)
    check_one_line(e, "7.png is 9x5", "size=")
    d = load("folder:pets", pets.parent, size=4)
    assert d.shape == (3, 4, 4)
    assert torch.equal(
        d.train.images[0],
        torch.from_numpy(
            np.asarray(Image.open(pets / "train" / "cat" / "0.png"))[:, 1:5]
            .transpose(2, 0, 1)
            .copy()
        ),
    )


def test_a_folder_with_validation_keeps_it(pets):
    for c in ("cat", "dog", "owl"):
        paint(pets / "val" / c / "0.png", 3)
    assert load("folder:pets", pets.parent).describe()["sizes"] == {
        "train": 12,
        "val": 3,
        "test": 12,
    }
    for spec in (DataSpec("folder:pets"), DataSpec("folder:pets", val=0)):
        data = load_spec(spec, pets.parent)
        assert len(data.val) == 3 and data.changes == ()
    with pytest.raises(UserError, match="val = 0.5: .* has its own validation split of 3 images"):
        load_spec(DataSpec("folder:pets", val=0.5), pets.parent)


def test_names():
    for name, parts in (
        ("digit", ["did you mean 'digits'"]),
        ("cifar", ["cifar10"]),
        ("folder", ["folder:NAME"]),
        ("folder:none-such", ["no folder", "SNNKD_DATA"]),
        ("tiny-imagenet:none-such", ["no folder"]),
        ("", ["unknown data set"]),
    ):
        with pytest.raises(UserError) as e:
            load(name)
        check_one_line(e, *parts)
    with pytest.raises(UserError) as e:
        load("digits", frames=2)
    check_one_line(e, "unknown option of digits 'frames'")
    with pytest.raises(UserError) as e:
        load("cifar10", kind="cifar100")
    check_one_line(e, "unknown option of cifar10 'kind'")


def test_a_plugin_that_fails_is_one_line(tmp_path):
    (tmp_path / "bad_plugin.py").write_text("import nothing_of_this_name")
    with pytest.raises(UserError) as e:
        images.import_plugins([str(tmp_path / "bad_plugin.py")])
    check_one_line(e, "bad_plugin.py cannot be imported", "nothing_of_this_name")
    assert "bad_plugin" not in sys.modules


def test_tiny_imagenet_needs_its_layout(pets):
    with pytest.raises(UserError) as e:
        images.tiny_imagenet("pets", pets.parent)
    check_one_line(e, "is not laid out as Tiny-ImageNet")


def test_cifar_by_torchvision(tmp_path, monkeypatch):
    with pytest.raises(UserError) as e:
        load("cifar100", tmp_path)
    check_one_line(
        e, "download=True", "cifar-100-python.tar.gz", str(tmp_path / "cifar-100-python")
    )
    asked = []

    class Fake:
        def __init__(self, root, train=True, download=False):
            asked.append(download)
            if download:
                (Path(root) / "cifar-10-batches-py").mkdir()
                (Path(root) / "cifar-10-batches-py" / "data_batch_1").write_text("x")
            rng = np.random.default_rng(train)
            self.data, self.targets, self.classes = (
                rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8),
                [0, 1] * 10,
                ["plane", "car"],
            )

    monkeypatch.setattr(images, "torchvision", lambda part: SimpleNamespace(CIFAR10=Fake))
    with pytest.raises(UserError):
        load("cifar10", tmp_path)
    assert not asked, "nothing is fetched unasked"
    d = load("cifar10", tmp_path, download=True)
    assert asked == [True, False, False] and torch.equal(
        d.train.images, torch.from_numpy(Fake(tmp_path).data).permute(0, 3, 1, 2)
    )
    assert d.mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465]) and d.classes == [
        "plane",
        "car",
    ]
    n = len(asked)
    load("cifar10", tmp_path)
    assert len(asked) == n, "the second load does not read it"


@pytest.fixture
def tiny(tmp_path):
    top = tmp_path / "tiny"
    for k, w in enumerate(("n3", "n1")):
        for i in range(3):
            paint(top / "train" / w / "images" / f"{w}_{i}.JPEG", 10 * k + i, (8, 8))
        paint(top / "val" / "images" / f"val_{k}.JPEG", 50 + k, (8, 8))
    (top / "wnids.txt").write_text("n2\nn3\nn1\n")
    (top / "words.txt").write_text("n1\tcrane\nn2\tcod, fish\nn3\tcrane, machine\n")
    (top / "val" / "val_annotations.txt").write_text(
        "val_1.JPEG\tn1\t0\t0\t9\t9\nval_0.JPEG\tn3\t0\t0\t9\t9\nval_7.JPEG\tn2\t0\t0\t9\t9\n"
    )
    return top


def test_tiny_imagenet(tiny):
    d = load("tiny-imagenet:tiny", tiny.parent)
    assert (
        d.classes == ["crane (n3)", "crane (n1)"]
        and d.shape == (3, 8, 8)
        and d.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    )
    want = torch.from_numpy(
        np.asarray(Image.open(tiny / "val" / "images" / "val_1.JPEG")).copy()
    ).permute(2, 0, 1)
    assert d.test.labels.tolist() == [0, 1] and torch.equal(d.test.images[1], want)
    (tiny / "val" / "images" / "val_0.JPEG").unlink()
    with pytest.raises(UserError) as e:
        load("tiny-imagenet:tiny", tiny.parent)
    check_one_line(e, "train has 1 class(es) that val lacks (n3)")
    (tiny / "val" / "val_annotations.txt").unlink()
    with pytest.raises(UserError) as e:
        load("tiny-imagenet:tiny", tiny.parent)
    check_one_line(e, "val_annotations.txt is missing")


def test_streaming_is_pure_in_seed_and_epoch(pets):
    def run(workers, epoch, augment="crop+flip+erase"):
        d = load("imagefolder-stream:pets", pets.parent, size=8, workers=workers)
        return [(x.clone(), y) for x, y in d.loader(batch_size=5, epoch=epoch, augment=augment)]

    a = run(0, 1)
    for b in (run(2, 1), run(0, 1)):
        for (x, y), (u, v) in zip(a, b, strict=True):
            assert torch.equal(x, u) and torch.equal(y, v)
    assert not torch.equal(a[0][0], run(0, 2)[0][0]) and a[0][0].shape == (5, 3, 8, 8)
    d = load_spec(
        DataSpec(
            "imagefolder-stream:pets",
            size=8,
            subset=6,
            label_noise=0.5,
            val=0.5,
            args={"workers": 0},
        ),
        pets.parent,
    )
    assert d.describe()["sizes"] == {"train": 3, "val": 3, "test": 12} and [
        len(y) for _, y in d.loader("val")
    ] == [3]
    assert loaders.worker_count(3) == 3


def test_an_unreadable_streamed_image_is_named_from_a_worker(pets):
    (bad := pets / "test" / "owl" / "1.png").write_bytes(b"x")
    d = load("imagefolder-stream:pets", pets.parent, size=8, workers=1)
    with pytest.raises(UserError) as e:
        list(d.loader("test"))
    check_one_line(e, str(bad))


def test_persistent_workers_load_once(pets):
    spec = DataSpec("folder:pets", val=0.25)
    assert load_spec(spec, pets.parent) is load_spec(spec.replace(augment="flip"), pets.parent)


REAL = data_dir() / "cifar10-jpeg"


@pytest.mark.skipif(not REAL.is_dir(), reason="needs cifar10-jpeg in the data root")
def test_real_folder_listing():
    found = images.folder_splits(REAL)
    assert {s: sum(map(len, by.values())) for s, by in found.items()} == {
        "train": 50000,
        "test": 10000,
    }
    some = [f[0] for by in found.values() for files in by.values() for f in files[::1000]]
    assert {a.shape for a in decode.decode(some, None)} == {(32, 32, 3)}
    assert batches.count_batches(50000, 128, False) == 391


@pytest.mark.parametrize(
    "change, value, message",
    [
        (label_noise, -0.1, "label_noise = -0.1"),
        (subset, 5, "at least one image"),
        (split_validation, 1438, "nothing would be left"),
        (split_validation, 0.0001, "no image"),
    ],
)
def test_changes_that_leave_nothing_are_refused(change, value, message):
    with pytest.raises(UserError, match=message):
        change(load("digits"), value)
