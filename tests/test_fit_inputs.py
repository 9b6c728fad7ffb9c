"""What `fit` takes: data of PyTorch, soft labels, mixed images, more epochs, trackers."""

import csv
import inspect
from types import SimpleNamespace

import pytest
import torch
from helpers import quiet
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from snnkd_nb.core import UserError
from snnkd_nb.data.images import load
from snnkd_nb.data.loaders import TorchData, worker_count
from snnkd_nb.losses.base import Distiller
from snnkd_nb.losses.zoo import create_distiller
from snnkd_nb.models.zoo import create_model
from snnkd_nb.spec import OptimSpec, RunSpec
from snnkd_nb.training.loop import _shard, create_optimizer, evaluate, fit, train_step

QUICK = {"epochs": 1, "batch_size": 32, "on_event": quiet, "device": "cpu"}


@pytest.fixture(scope="module")
def digits():
    "Images as real numbers, labels, and probabilities for the training images."
    data = load("digits")
    x, y = next(iter(data.loader("train", len(data.train), shuffle=False)))
    x_test, y_test = next(iter(data.loader("test", len(data.test))))
    return TensorDataset(x[:640], y[:640]), TensorDataset(x_test, y_test)


class Plain(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def same_weights(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def as_pixels(batch):
    "A collate function of one's own: bytes, and labels as a list."
    x = torch.stack([image for image, _ in batch])
    return (x * 100 + 128).clamp(0, 255).byte(), [int(label) for _, label in batch]


@pytest.mark.parametrize("kind", ["datasets", "loaders", "collate", "train only", "with val"])
def test_any_dataset_or_loader_trains(digits, kind):
    train, test = digits
    loader = DataLoader(train, 32, shuffle=True)
    data = {
        "datasets": (train, test),
        "loaders": (loader, DataLoader(test, 100)),
        "collate": (
            DataLoader(train, 32, shuffle=True, collate_fn=as_pixels),
            DataLoader(test, 100, collate_fn=as_pixels),
        ),
        "train only": loader,
        "with val": (train, test, test),
    }[kind]
    nets = [Plain(), Plain()]
    first, again = (fit(net, data, lr=0.3, **{**QUICK, "epochs": 4}) for net in nets)
    assert same_weights(*nets)
    if kind == "train only":
        assert first.acc_last is None and first.acc_best_test is None
        assert first[-1]["train_acc"] > 80
    else:
        assert first.acc_last > 80
        assert first.acc_last == again.acc_last == evaluate(nets[0], data)
    assert (first.acc_best_val is not None) == (kind == "with val")


def test_printing_needs_no_test_images(digits, capsys):
    fit(Plain(), digits[0], epochs=1, device="cpu")
    assert "train" in capsys.readouterr().out


def test_a_spiking_student_learns_from_soft_labels(digits):
    train, test = digits
    x, y = train.tensors
    soft = TensorDataset(x, nn.functional.one_hot(y, 10).float() * 0.9 + 0.01)
    student = create_model("vgg11_sastc", T=2, width=0.125, in_channels=1, image_size=8)
    distiller = create_distiller("kd", student, Plain())
    history = fit(student, (soft, test), distiller, **{**QUICK, "epochs": 2})
    assert history[-1]["train_acc"] > history[0]["train_acc"]


def test_soft_labels_that_are_certain_are_labels(digits):
    x, y = digits[0][:32]
    nets = [Distiller(Plain()), Distiller(Plain())]
    certain = nn.functional.one_hot(y, 10).float()
    for net, target in zip(nets, (y, certain), strict=True):
        train_step(net, create_optimizer(net, OptimSpec()), x, target)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", ["tet", "eskd"])
def test_a_method_with_its_own_cross_entropy_refuses_smoothing(method):
    net = create_model("resnet20", T=2, width=0.125, depth=0.34, in_channels=1, image_size=8)
    teacher = create_model("resnet20", width=0.125, depth=0.34, in_channels=1, image_size=8)
    distiller = create_distiller(method, net, teacher)
    with pytest.raises(UserError, match="leave label_smoothing out"):
        fit(net, load("digits"), distiller, label_smoothing=0.2, **QUICK)


@pytest.mark.parametrize(
    "option", [{"label_smoothing": 0.1}, {"mixup": 0.2}, {"cutmix": 1.0}, {"accumulate": 4}]
)
def test_each_option_changes_the_training_and_can_be_repeated(option):
    data = load("digits")
    nets = [Plain(), Plain(), Plain()]
    fit(nets[0], data, **QUICK)
    for net in nets[1:]:
        fit(net, data, **option, **QUICK)
    assert same_weights(nets[1], nets[2])
    assert not same_weights(nets[0], nets[1])


def test_four_batches_added_up_are_one_large_batch(digits):
    x, y = digits[0][:128]
    large, parts = Distiller(Plain()), Distiller(Plain())
    train_step(large, create_optimizer(large, OptimSpec()), x, y)
    optimizer = create_optimizer(parts, OptimSpec())
    for number in range(4):
        rows = slice(32 * number, 32 * number + 32)
        train_step(parts, optimizer, x[rows], y[rows], batch_number=number, batches_per_update=4)
    for a, b in zip(large.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_old_name_of_the_number_of_a_batch_warns(digits):
    x, y = digits[0][:32]
    old, new = Distiller(Plain()), Distiller(Plain())
    with pytest.warns(DeprecationWarning, match="batches_per_update"):
        train_step(old, create_optimizer(old, OptimSpec()), x, y, place=(1, 2))
    train_step(new, create_optimizer(new, OptimSpec()), x, y, batch_number=1, batches_per_update=2)
    assert same_weights(old, new)


def test_training_images_alone_are_enough_for_a_student_with_a_teacher(digits):
    train, _ = digits
    distiller = create_distiller("kd", student := Plain(), Plain())
    history = fit(student, DataLoader(train, 64), distiller, **QUICK)
    assert len(history) == 1
    assert history.teacher_acc is None


def test_data_without_a_batch_are_an_error_with_a_cure():
    with pytest.raises(UserError, match="gave no batches in epoch 1.*drop_last=False"):
        fit(
            Plain(),
            DataLoader(TensorDataset(torch.zeros(4, 1, 8, 8), torch.arange(4)), 8, drop_last=True),
            **QUICK,
        )


@pytest.mark.parametrize("num_images", [1, 5, 8])
def test_every_process_gets_an_equal_part_of_a_batch(num_images):
    x = torch.arange(num_images).reshape(1, num_images, 1, 1, 1)  # frames: (T, B, C, H, W)
    y = torch.arange(num_images)
    parts = []
    for rank in range(4):
        part_x, part_y = _shard(SimpleNamespace(num_processes=4, process_index=rank), x, y)
        assert torch.equal(part_x.flatten(), part_y)
        parts.append(part_y)
    part_size = -(-num_images // 4)
    filled_up = [index % num_images for index in range(4 * part_size)]
    assert torch.cat(parts).tolist() == filled_up


class Stream(IterableDataset):
    "Ten images that have an order of their own."

    def __iter__(self):
        for number in range(10):
            yield torch.full((1, 8, 8), float(number)), number

    def __len__(self):
        return 10


def test_an_iterable_data_set_with_a_length_keeps_its_order():
    loader = TorchData(Stream(), num_classes=10).loader("train", 4)
    assert len(loader) == 3
    assert [y.tolist() for _, y in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(fit(Plain(), TorchData(Stream(), num_classes=10), **QUICK)) == 1


def test_an_option_at_its_default_does_not_change_the_id():
    plain = RunSpec()
    for name, value in (("label_smoothing", 0.0), ("mixup", 0), ("cutmix", 0), ("accumulate", 1)):
        assert RunSpec(optim=OptimSpec(**{name: value})).id == plain.id
    assert RunSpec(optim=OptimSpec(mixup=0.2)).id != plain.id


def test_more_epochs_continue_a_finished_training_but_not_another(tmp_path):
    data = load("digits")
    checkpoint = tmp_path / "run.ckpt"
    short = fit(Plain(), data, checkpoint=checkpoint, **QUICK)
    longer = fit(Plain(), data, checkpoint=checkpoint, **{**QUICK, "epochs": 2})
    assert len(longer) == 2 and longer[0] == short[0]
    with pytest.warns(UserWarning, match="belongs to another training"):
        other = fit(Plain(), data, checkpoint=checkpoint, lr=0.2, **{**QUICK, "epochs": 3})
    assert other[0]["lr"] != longer[0]["lr"]
    with pytest.warns(UserWarning, match="belongs to another training"):  # shorter than it is
        fit(Plain(), data, checkpoint=checkpoint, lr=0.2, **QUICK)


@pytest.mark.parametrize("trackers", ["csv", "tensorboard", "csv+tensorboard"])
def test_trackers_write_the_history(tmp_path, trackers):
    options = {**QUICK, "epochs": 2, "trackers": trackers, "log_dir": tmp_path}
    history = fit(Plain(), load("digits"), **options)
    if "csv" in trackers:
        with open(tmp_path / "fit.csv") as file:
            rows = list(csv.DictReader(file))
        assert [float(row["test_acc"]) for row in rows] == [row["test_acc"] for row in history]
    if "tensorboard" in trackers:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "fit"))
        events.Reload()
        assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_help_shows_the_common_arguments_and_they_replace_those_of_optim():
    parameters = inspect.signature(fit).parameters
    assert {"epochs", "batch_size", "lr", "weight_decay", "schedule", "mixup"} <= set(parameters)
    optim = OptimSpec(epochs=3, batch_size=32)
    history = fit(Plain(), load("digits"), optim=optim, epochs=1, device="cpu", on_event=quiet)
    assert len(history) == 1


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1, 8, 8), 0


@pytest.mark.parametrize(
    "data, said",
    [
        ("digits", "give an ImageData"),
        (Endless(), "has no length"),
        (TorchData([({"image": 0}, 1)] * 4), "let the data set return"),
        (TorchData(TensorDataset(torch.zeros(4, 64), torch.arange(4))), "give images"),
        (TorchData(TensorDataset(torch.zeros(4, 1, 8, 8), torch.rand(4))), "fractions"),
        (None, "give an ImageData"),
    ],
    ids=["name", "endless", "dict", "flat", "real labels", "none"],
)
def test_data_that_cannot_be_used_are_one_line(data, said):
    with pytest.raises(UserError, match=said) as raised:
        fit(Plain(), data, **QUICK)
    assert "\n" not in str(raised.value)


def test_mixing_needs_the_number_of_classes(digits):
    with pytest.raises(UserError, match="num_classes=K"):
        fit(Plain(), digits, mixup=0.2, **QUICK)
    data = TorchData(*digits, num_classes=10)
    assert len(fit(Plain(), data, mixup=0.2, **QUICK)) == 1


@pytest.mark.parametrize("value", ["abc", "-1", "1.5"])
def test_a_wrong_number_of_workers_in_the_environment_is_one_line(monkeypatch, value):
    monkeypatch.setenv("SNNKD_WORKERS", value)
    with pytest.raises(UserError, match=f"SNNKD_WORKERS = '{value}': set it to a number"):
        worker_count(None)
