"""What users bring: states of modules, labels, weight files, teachers, images and options of every kind."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from snnkd_nb.core import UserError
from snnkd_nb.data.batches import ImageData, Split, hard_labels, read_labels
from snnkd_nb.data.corrupt import few_shot, label_noise, split_validation
from snnkd_nb.losses.base import cross_entropy
from snnkd_nb.losses.zoo import create_distiller
from snnkd_nb.models.foreign import load_weights, read_state
from snnkd_nb.models.zoo import create_model
from snnkd_nb.store import dump_state, parse_state
from snnkd_nb.training.checkpoint import load_checkpoint, save_checkpoint
from snnkd_nb.training.loop import evaluate, fit

RNG = np.random.default_rng(0)
IMAGES = torch.from_numpy(RNG.integers(0, 256, (24, 1, 8, 8), np.uint8))
LABELS = torch.arange(24) % 3


def make_data(labels=LABELS, images=IMAGES):
    split = Split(images, labels)
    channels = images.shape[1]
    mean, std = torch.full((channels,), 0.5), torch.full((channels,), 0.25)
    return ImageData("made", ["a", "b", "c"], mean, std, split, split)


def tiny(T=None, **options):
    torch.manual_seed(0)
    options = {"in_channels": 1, "image_size": 8, "width": 0.0625, **options}
    return create_model("vgg11_sastc", 3, T=T, **options)


def train(student, data, distiller=None, epochs=2, **options):
    options = {"batch_size": 8, "lr": 0.05, "on_event": lambda event: None, **options}
    return fit(student, data, distiller, epochs=epochs, device="cpu", **options)


# --- states that are more than tensors of their own ---------------------------------------------


class Awkward(nn.Module):
    "A classifier with tied weights, views, transposed memory and extra state of every kind."

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight  # shared storage
        self.out = nn.Linear(64, 3)
        self.out.weight = nn.Parameter(torch.randn(64, 3).T)  # not contiguous
        statistics = torch.zeros(4, 3)
        self.register_buffer("row", statistics[1])  # views of one tensor
        self.register_buffer("rows", statistics[:3])
        self.register_buffer("none", torch.zeros(0))
        self.register_buffer("complex", torch.zeros(2, dtype=torch.complex64))
        self.seen = {"calls": 0, 3: [1.5, None, True], "pair": (1, b"\x00\xff")}
        self.memory = torch.zeros(2)
        self.names = {"a", "b"}

    def get_extra_state(self):
        array = np.arange(3)
        return {**self.seen, "memory": self.memory, "names": self.names, "array": array}

    def set_extra_state(self, state):
        assert isinstance(state["pair"], tuple) and state["array"].tolist() == [0, 1, 2]
        self.memory = state.pop("memory")
        self.names = state.pop("names")
        state.pop("array")
        self.seen = state

    def forward(self, x):
        if self.training:
            self.seen["calls"] += 1
            self.memory += 1
            self.row += 1
        x = x.flatten(1)
        return self.out(self.second(torch.relu(self.first(x))))


def test_a_student_with_shared_memory_and_extra_state_resumes_to_the_same_bits(tmp_path):
    def stop(event):
        if event["epoch"] == 2:
            raise KeyboardInterrupt

    path = tmp_path / "awkward.ckpt"
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(Awkward())
    train(nets[0], make_data(), epochs=3)
    with pytest.raises(KeyboardInterrupt):
        train(nets[1], make_data(), epochs=3, checkpoint=path, on_event=stop)
    torch.manual_seed(1)
    resumed = Awkward()
    history = train(resumed, make_data(), epochs=3, checkpoint=path)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    for name, value in nets[0].state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(resumed.state_dict()[name], value), name
    assert resumed.seen == nets[0].seen and resumed.seen["calls"] == 9
    assert resumed.names == {"a", "b"} and resumed.memory.tolist() == [9, 9]
    assert resumed.second.weight is resumed.first.weight
    assert resumed.row.tolist() == [9] * 3 == resumed.rows[1].tolist()


def test_a_distiller_of_such_networks_is_saved(tmp_path):
    student, teacher = Awkward(), Awkward()
    distiller = create_distiller("kd", student, teacher)
    path = tmp_path / "c"
    assert len(train(student, make_data(), distiller, epochs=1, checkpoint=path)) == 1
    optimizer = torch.optim.SGD(distiller.parameters(), 0.1)
    fresh = create_distiller("kd", Awkward(), teacher)
    assert load_checkpoint(path, fresh, torch.optim.SGD(fresh.parameters(), 0.1)) is not None
    assert torch.equal(fresh.student.first.weight, student.first.weight)
    save_checkpoint(path, distiller, optimizer, {"epoch": 1})


def test_plain_states_have_the_bytes_they_always_had():
    from safetensors.torch import save

    net = tiny(T=2)
    state = {name: value.contiguous() for name, value in net.state_dict().items()}
    assert dump_state(net.state_dict()) == save(state)
    again, metadata = parse_state(dump_state(net.state_dict(), text="ü"))
    assert metadata == {"text": "ü"} and again.keys() == state.keys()


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"a._extra_state": object()}, "extra state with a object"),
        ({"a": torch.eye(2).to_sparse()}, "is stored as torch.sparse_coo"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "of torch.complex128"),
        ({"a": torch.zeros(2, device="meta")}, "has no values"),
    ],
    ids=["object", "sparse", "complex128", "meta"],
)
def test_what_cannot_be_stored_is_refused_with_its_name(state, reason):
    with pytest.raises(UserError, match=rf"^a\S* .*{reason}"):
        dump_state(state)


def test_it_is_refused_before_the_training(tmp_path):
    class Odd(Awkward):
        def get_extra_state(self):
            return self.forward

    events = []
    with pytest.raises(UserError, match="without pickle"):
        train(Odd(), make_data(), checkpoint=tmp_path / "c", on_event=events.append)
    assert events == []


# --- labels -------------------------------------------------------------------------------------

ONE_HOT = F.one_hot(LABELS, 3)


@pytest.mark.parametrize(
    "labels",
    [
        LABELS.int(),
        LABELS.to(torch.uint8),
        LABELS.float(),
        LABELS.double()[:, None],
        LABELS[:, None],
        ONE_HOT,
        ONE_HOT.float(),
        ONE_HOT.half(),
        LABELS.numpy(),
        LABELS.numpy().astype(np.uint16),
        LABELS.numpy().astype(">i4"),
        ONE_HOT.numpy().astype(float),
        LABELS.tolist(),
        tuple(LABELS.tolist()),
        list(LABELS),
        [[label] for label in LABELS.tolist()],
    ],
    ids=lambda labels: f"{type(labels).__name__}-{getattr(labels, 'dtype', '')}",
)
def test_labels_that_mean_one_thing_are_converted(labels):
    data = make_data(labels)
    assert data.train.labels.dtype == torch.int64 and torch.equal(data.train.labels, LABELS)
    assert data.fingerprint == make_data().fingerprint


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (LABELS[:-1], r"\(23,\) for 24 images"),
        ([*LABELS.tolist(), 0], r"\(25,\) for 24 images"),
        (LABELS + 0.5, "with fractions"),
        (LABELS * float("nan"), "with fractions, or not finite"),
        (ONE_HOT * 0.3, "whose rows are no shares"),
        (ONE_HOT + torch.tensor([1, -1, 0]), "whose rows are no shares"),
        (ONE_HOT[:, :, None], r"shape \(24, 3, 1\)"),
        (["cat"] * 24, "of type <U3"),
        ([None] * 24, "of type object"),
        (LABELS.to(torch.complex64), "complex64"),
        (torch.tensor(1), r"shape \(\)"),
    ],
)
def test_other_labels_are_refused_where_they_enter(labels, reason):
    with pytest.raises(UserError, match=rf"labels .*{reason}.*: give one whole number per image"):
        Split(IMAGES, labels)


def test_a_class_too_many_is_refused():
    with pytest.raises(UserError, match="soft labels for 4 classes"):
        make_data(torch.full((24, 4), 0.25))
    with pytest.raises(UserError, match="labels from 0 to 3 for 3 classes"):
        make_data(torch.arange(24) % 4)


SOFT = 0.8 * ONE_HOT + 0.2 / 3


def test_soft_labels_give_the_loss_of_the_shares():
    logits = torch.randn(2, 24, 3)
    log_probs = F.log_softmax(logits, -1)
    expected = -(SOFT * log_probs).sum(-1).mean()
    assert torch.allclose(cross_entropy(logits, SOFT, "each"), expected)
    expected = -(SOFT * F.log_softmax(logits.mean(0), -1)).sum(-1).mean()
    assert torch.allclose(cross_entropy(logits, SOFT), expected)
    assert torch.equal(hard_labels(read_labels(SOFT)), LABELS)


@pytest.mark.parametrize("method", ["none", "tet", "kd", "samd", "bkd", "eskd", "sastc"])
def test_methods_train_on_soft_labels(method):
    data = make_data(SOFT)
    student = tiny(T=2)
    teacher = None if method in ("none", "tet") else tiny()
    options = {"layers": "stage1"} if method == "samd" else {}
    distiller = None
    if method != "none":
        distiller = create_distiller(method, student, teacher, **options)
    history = train(student, data, distiller, epochs=1)
    assert 0 <= history[0]["train_acc"] <= 100 and np.isfinite(history[0]["loss"])


def test_soft_labels_near_one_hot_train_as_hard_ones():
    soft = (1 - 1e-6) * ONE_HOT.double() + 1e-6 / 3
    losses = [train(tiny(), make_data(labels), epochs=1)[0]["loss"] for labels in (soft, LABELS)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert read_labels(soft).dim() == 2


def test_soft_labels_are_split_by_their_class():
    soft, hard = make_data(SOFT), make_data()
    for change in (lambda data: few_shot(data, 0.5), lambda data: split_validation(data, 0.25)):
        assert torch.equal(hard_labels(change(soft).train.labels), change(hard).train.labels)
    with pytest.raises(UserError, match="has soft labels"):
        label_noise(soft, 0.2)


def test_labels_of_a_loader_of_the_user():
    "A column of labels was compared with every row: accuracies above 100 %."
    net, data = tiny(), make_data()

    class Other:
        train, test, val = data.train, data.test, None

        def __init__(self, change):
            self.change = change

        def loader(self, *args, **options):
            for x, y in data.loader(*args, **options):
                yield x, self.change(y)

    expected = evaluate(net, data)
    for change in (torch.Tensor.int, torch.Tensor.float, lambda y: y[:, None], ONE_HOT.__getitem__):
        if change is ONE_HOT.__getitem__:
            change = lambda y: F.one_hot(y, 3)  # noqa: E731
        assert evaluate(net, Other(change)) == expected
        distiller = create_distiller("tet", net)
        x, y = next(iter(data.loader("train", 8)))
        assert torch.equal(distiller(x, change(y))[0]["ce"], distiller(x, y)[0]["ce"])


# --- weight files -------------------------------------------------------------------------------


def wrapped(kind, state):
    under = {f"module.{name}": value for name, value in state.items()}
    compiled = {f"_orig_mod.{name}": value for name, value in state.items()}
    return {
        "net": {"net": under, "acc": 93.1, "epoch": 200},
        "compiled": compiled,
        "both": {"model_state_dict": {f"module.{n}": v for n, v in compiled.items()}},
        "other order": {"model": {f"_orig_mod.{n}": v for n, v in under.items()}},
        "lightning": {"state_dict": {f"model.{n}": v for n, v in state.items()}, "epoch": 3},
        "student": {"state_dict": {f"student.net.{n}": v for n, v in state.items()}},
        "ema": {"ema": {**under, "n_averaged": torch.tensor(3)}, "args": {"lr": 0.1}},
        "nested": {"model": {"state_dict": state}},
        "deepspeed": {"module": state, "optimizer": {}},
        "partly compiled": {n.replace("stage1.", "stage1._orig_mod."): v for n, v in state.items()},
        "plain": state,
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "net",
        "compiled",
        "both",
        "other order",
        "lightning",
        "student",
        "ema",
        "nested",
        "deepspeed",
        "partly compiled",
        "plain",
    ],
)
def test_weights_in_the_files_of_usual_programs(tmp_path, kind):
    source, target = tiny(), tiny()
    for parameter in target.parameters():
        parameter.data.zero_()
    torch.save(wrapped(kind, source.state_dict()), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_a_network_in_a_wrapper_takes_plain_weights(tmp_path):
    source, target = tiny(), nn.DataParallel(tiny())
    torch.save(source.state_dict(), tmp_path / "w.pt")
    source.head.out.weight.data.fill_(3.0)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert target.module.head.out.weight.eq(3).all()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"generator": {}, "epoch": 3}, "the keys 'generator', 'epoch'"),
        ({"state_dict": {"epoch": 3}}, "the keys 'epoch'"),
        ({}, "an empty dict"),
        ([torch.zeros(2)], "a list"),
        (torch.zeros(2), "a Tensor"),
    ],
)
def test_a_file_without_weights_tells_what_it_holds(tmp_path, content, found):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=f"holds no state dict of tensors but {found}"):
        read_state(tmp_path / "w.pt")
