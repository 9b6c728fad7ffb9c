"A teacher sees images as it was trained with, its accuracy is measured, and a weak one is refused."

import copy
import json

import pytest
import torch
from helpers import check_one_line
from torch import nn

from snnkd_nb.core import UserError
from snnkd_nb.data import images as image_sets
from snnkd_nb.data.decode import Source
from snnkd_nb.data.images import load, subset
from snnkd_nb.losses.zoo import create_distiller
from snnkd_nb.models.foreign import create_foreign
from snnkd_nb.models.taps import Foreign, renormalization
from snnkd_nb.models.zoo import create_model
from snnkd_nb.spec import DataSpec, ModelSpec, OptimSpec, RunSpec
from snnkd_nb.store import Store
from snnkd_nb.training import job
from snnkd_nb.training.job import run_train
from snnkd_nb.training.loop import describe_weakness, evaluate, fit

RAW = {"mean": 0.0, "std": 1 / 255}  # images from 0 to 255


@pytest.fixture(scope="module")
def data():
    return load("digits")


@pytest.fixture(scope="module")
def raw_net(data):
    "A classifier trained on images from 0 to 255, by plain PyTorch."
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 16, 3, padding=1)
    net = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10))
    x, y = data.train.images.float().contiguous(), data.train.labels
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def accuracy_by_hand(net, data):
    with torch.no_grad():
        guess = net(data.test.images.float().contiguous()).argmax(1)
    return 100 * (guess == data.test.labels).float().mean().item()


def student(seed=0, **options):
    torch.manual_seed(seed)
    return create_model(
        "resnet20", 10, T=2, in_channels=1, image_size=8, width=0.25, depth=0.34, **options
    )


def foreign(net, **options):
    return Foreign(copy.deepcopy(net), stages=["1"], image_size=8, **options)


def distil(data, teacher, **options):
    learner = student()
    distiller = create_distiller("kd", learner, teacher)
    few = subset(data, 60)
    return fit(learner, few, distiller, epochs=1, lr=0.01, **{"on_event": len} | options)


# the network's own normalization


def test_the_same_network_with_and_without_its_normalization(data, raw_net):
    expected = accuracy_by_hand(raw_net, data)
    assert expected > 90
    assert evaluate(foreign(raw_net, **RAW), data) == pytest.approx(expected, abs=0.3)
    assert evaluate(foreign(raw_net), data) < expected - 10


@pytest.mark.parametrize("own", [RAW, {"mean": [0.0], "std": torch.tensor([1 / 255])}])
def test_logits_are_those_of_the_network_on_its_own_images(data, raw_net, own):
    teacher = foreign(raw_net, **own)
    teacher.set_data(data)
    x, _ = next(iter(data.loader("test", 20)))
    with torch.no_grad():
        logits, features = teacher(x, features=True)
        raw = data.test.images[:20].float()
        assert torch.allclose(logits, raw_net(raw), rtol=1e-3, atol=1e-2)
        assert torch.allclose(features["1"], raw_net[:2](raw), rtol=1e-3, atol=1e-2)
        assert torch.allclose(teacher.forward_from("1", features["1"]), logits, rtol=1e-4)


def test_colours_have_their_own_numbers():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    own_mean, own_std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])

    def normalized(mean, std):
        return (images / 255 - mean[:, None, None]) / std[:, None, None]

    class Data:
        pass

    Data.mean, Data.std, Data.name = mean, std, "colours"
    factor, summand = renormalization(Data, own_mean, own_std)
    found = normalized(mean, std) * factor + summand
    assert torch.allclose(found, normalized(own_mean, own_std), atol=1e-5)


def test_equal_normalization_changes_no_bit(data, raw_net):
    plain = foreign(raw_net)
    own = foreign(raw_net, mean=data.mean, std=data.std)
    own.set_data(data)
    x, _ = next(iter(data.loader("test", 50)))
    with torch.no_grad():
        assert torch.equal(plain(x), own(x))


def test_size_is_the_edge_that_the_network_sees():
    seen = []
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    teacher = Foreign(net, stages=["0"], image_size=8, size=12)
    net.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    teacher(torch.rand(2, 1, 8, 8))
    assert seen == [(2, 1, 12, 12)]
    with pytest.raises(UserError, match="differ"):
        Foreign(net, stages=["0"], size=12, input_size=8)


@pytest.mark.parametrize(
    "options, part",
    [
        ({"mean": 0.5}, "give both"),
        ({"mean": 0.5, "std": 0.0}, "above 0"),
        ({"mean": [0.5, 0.5], "std": 0.2}, "one for each of 1 channels"),
        ({"mean": "imagenet", "std": 0.2}, "give a number"),
        ({"mean": float("nan"), "std": 0.2}, "give a number"),
    ],
)
def test_wrong_normalizations_are_refused(raw_net, options, part):
    with pytest.raises(UserError) as error:
        foreign(raw_net, **options)
    check_one_line(error, part)


def test_a_distiller_does_not_guess_the_data(data, raw_net):
    distiller = create_distiller("kd", student(), foreign(raw_net, **RAW))
    x, y = next(iter(data.loader("test", 20)))
    with pytest.raises(UserError) as error:
        distiller(x, y)
    check_one_line(error, "set_data")
    distiller.teacher.set_data(data)
    distiller(x, y)


def test_a_network_of_a_library_takes_its_normalization():
    net = create_foreign(
        "torchvision", "squeezenet1_1", 10, image_size=32, mean=[0.5, 0.4, 0.3], std=0.25
    )
    assert net.own_mean.tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert net.own_std.tolist() == [0.25] * 3


# the teacher's accuracy


def test_accuracy_is_measured_shown_and_kept(data, raw_net):
    expected = accuracy_by_hand(raw_net, data)
    events = []
    history = distil(data, foreign(raw_net, **RAW), on_event=events.append)
    assert history.teacher_acc == pytest.approx(expected, abs=0.3)
    assert [event["event"] for event in events] == ["epoch"]
    assert events[0]["teacher_acc"] == history.teacher_acc


def test_accuracy_is_printed(data, raw_net, capsys):
    history = distil(data, foreign(raw_net, **RAW), on_event=None)
    assert f"teacher {history.teacher_acc:5.2f} %" in capsys.readouterr().out


def test_a_teacher_with_a_wrong_normalization_is_refused(data, raw_net):
    "The network has learned images from 0 to 255 and gets ones that are nearly 0."
    dark = foreign(raw_net, mean=0.5, std=2000.0)
    with pytest.raises(UserError) as error:
        distil(data, dark)
    check_one_line(
        error, "the teacher reaches", "near the 10.00 %", "mean, std", "weak_teacher='accept'"
    )
    history = distil(data, foreign(raw_net, mean=0.5, std=2000.0), weak_teacher="accept")
    assert history.teacher_acc < 15


def test_a_teacher_far_below_its_record_is_refused(data, raw_net):
    teacher = foreign(raw_net, **RAW)
    acc = evaluate(teacher, data)
    with pytest.raises(UserError) as error:
        distil(data, teacher, recorded=acc + 6)
    check_one_line(error, f"{acc:.2f} %", f"{acc + 6:.2f} % in its record")
    assert len(distil(data, teacher, recorded=acc + 4)) == 1


@pytest.mark.parametrize(
    "acc, num_classes, recorded, weak_teacher, refused",
    [
        (10.0, 10, None, "refuse", True),
        (14.4, 10, None, "refuse", True),
        (20.0, 10, None, "refuse", False),
        (51.0, 2, None, "refuse", True),
        (60.0, 2, None, "refuse", False),
        (3.0, 100, None, "refuse", True),
        (10.0, 10, None, "accept", False),
        (10.0, 10, 10.0, "refuse", True),
        (10.0, 10, 10.0, "as recorded", False),
        (10.0, 10, None, "as recorded", True),
        (80.0, 10, 90.0, "as recorded", True),
        (80.0, 10, 90.0, "accept", False),
    ],
)
def test_which_teachers_are_weak(acc, num_classes, recorded, weak_teacher, refused):
    assert bool(describe_weakness(acc, num_classes, recorded, weak_teacher)) is refused


def test_an_unknown_answer_is_refused(data, raw_net):
    with pytest.raises(UserError, match="weak_teacher"):
        distil(data, foreign(raw_net, **RAW), weak_teacher="yes")


# stored runs

TINY = ModelSpec("resnet20", None, 0.25, args={"depth": 0.34})
SHORT = OptimSpec(epochs=2, batch_size=32, lr=0.05, schedule="onecycle")


def digits_as(name, mean, std):
    "The digits with a convention of their own for mean and deviation."

    def open_set(arg="", root=None, download=False, size=None):
        return Source(name, "v1", image_sets._read_digits, ([mean], [std]))

    return open_set


@pytest.fixture
def two_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path))
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(image_sets.SOURCES, "bright", digits_as("bright", 0.3, 0.4))
    monkeypatch.setitem(image_sets.SOURCES, "dark", digits_as("dark", 0.9, 0.02))
    return Store(tmp_path / "runs")


def test_a_stored_teacher_sees_what_it_has_learned(two_sets):
    teacher = RunSpec(DataSpec("bright"), TINY, SHORT)
    run = RunSpec(
        DataSpec("dark"), TINY.replace(T=2), SHORT.replace(epochs=1), "kd", teacher=teacher
    )
    record = run_train(run, two_sets)
    recorded = two_sets.get(teacher).metrics["acc_last"]
    assert recorded > 50
    assert record.teacher["acc_here"] == pytest.approx(recorded, abs=0.3)


def test_a_weak_stored_teacher_is_refused(two_sets, monkeypatch):
    teacher = RunSpec(DataSpec("bright"), TINY, SHORT.replace(lr=0.0))
    run = RunSpec(
        DataSpec("bright"), TINY.replace(T=2), SHORT.replace(epochs=1), "kd", teacher=teacher
    )
    with pytest.raises(UserError, match="near the 10.00 %"):
        run_train(run, two_sets)
    assert two_sets.get(run) is None
    record = run_train(run, two_sets, weak_teacher="as recorded")
    assert record.teacher["acc_here"] == pytest.approx(record.teacher["acc_last"], abs=0.3)


def test_damaged_behaviour_of_a_stored_teacher_is_noticed(two_sets, monkeypatch):
    "The weights are the recorded ones, but the network computes something else today."
    teacher = RunSpec(DataSpec("bright"), TINY, SHORT)
    run = RunSpec(
        DataSpec("bright"), TINY.replace(T=2), SHORT.replace(epochs=1), "kd", teacher=teacher
    )
    run_train(teacher, two_sets, weights=True)
    real = job.load_model

    def changed(spec, store):
        model, record = real(spec, store)
        nn.init.zeros_(next(model.parameters()))
        return model, record

    monkeypatch.setattr(job, "load_model", changed)
    with pytest.raises(UserError, match="in its record"):
        run_train(run, two_sets, weak_teacher="as recorded")


def test_the_command_line_asks_for_a_weak_teacher(tmp_path, monkeypatch, capsys):
    from snnkd_nb.cli import train_command

    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path))
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path / "cache"))
    options = {
        "width": 0.25,
        "student_args": ("depth=0.34",),
        "teacher": "resnet20",
        "teacher_args": ("depth=0.34",),
        "lr": 0.0,
        "epochs": 1,
        "T": 2,
        "subset": 100,
    }
    with pytest.raises(UserError, match="the teacher reaches"):
        train_command(**options)
    train_command(**options, weak_teacher=True)
    assert " % on the test images" in capsys.readouterr().out
    [path] = (tmp_path / "results" / "runs").glob("*kd*.json")
    assert json.loads(path.read_text())["teacher"]["acc_here"] < 20
