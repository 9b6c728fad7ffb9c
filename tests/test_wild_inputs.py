"""What users bring: states of modules, labels, weight files, teachers, images and options of every kind."""

import copy
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from snnkd_nb.cli import main
from snnkd_nb.core import UserError, sha256_of
from snnkd_nb.data.batches import ImageData, Split, hard_labels, read_labels
from snnkd_nb.data.images import few_shot, label_noise, split_validation
from snnkd_nb.losses.base import cross_entropy
from snnkd_nb.losses.zoo import create_distiller
from snnkd_nb.models.foreign import read_state, read_weights_into
from snnkd_nb.models.taps import Foreign
from snnkd_nb.models.zoo import create_model
from snnkd_nb.spec import DataSpec, ModelSpec, OptimSpec, RunSpec
from snnkd_nb.store import Store, dump_state, parse_state, with_weights
from snnkd_nb.training.job import rebuild_model, run_train
from snnkd_nb.training.loop import evaluate, fit, load_checkpoint, save_checkpoint

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
    options = {"weak_teacher": "accept", **options}
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


@pytest.mark.parametrize(
    "blob",
    [
        pickle.dumps({"state": "pickle"}),
        b"",
        b"\xff" * 40,
        dump_state({"weight": torch.zeros(2)}),
        dump_state({"weight": torch.zeros(2)}, state="[1]"),
        dump_state({"weight": torch.zeros(2)}, state="{"),
    ],
    ids=["pickle", "empty", "bytes", "no state", "a list", "no JSON"],
)
def test_a_signed_file_of_another_form_is_a_damaged_checkpoint(tmp_path, blob):
    net = nn.Linear(2, 1)
    path = tmp_path / "run.ckpt"
    path.write_bytes(sha256_of(blob).encode() + b"\n" + blob)
    with pytest.warns(UserWarning, match="damaged"):
        assert load_checkpoint(path, net, torch.optim.SGD(net.parameters(), 0.1)) is None


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
    read_weights_into(target, tmp_path / "w.pt")
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_a_network_in_a_wrapper_takes_plain_weights(tmp_path):
    source, target = tiny(), nn.DataParallel(tiny())
    torch.save(source.state_dict(), tmp_path / "w.pt")
    source.head.out.weight.data.fill_(3.0)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    read_weights_into(target, tmp_path / "w.pt")
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


# --- images that are not square -----------------------------------------------------------------


@pytest.mark.parametrize("T", [None, 2])
@pytest.mark.parametrize(
    "name", ["vgg11_sastc", "vggsnn", "vgg13", "resnet20", "dsas", "spikformer"]
)
def test_networks_take_images_that_are_not_square(name, T):
    options = {"dim": 16, "heads": 2, "blocks": 1} if name == "spikformer" else {}
    width = 1.0 if name == "spikformer" else 0.0625
    net = create_model(name, 3, T=T, width=width, in_channels=2, image_size=(16, 24), **options)
    x = torch.randn(2, 2, 16, 24)
    shape = net(x).shape
    assert shape == ((2, 3) if T is None else (T, 2, 3))
    assert all(len(size) == 3 for size in net.feature_shapes().values())


@pytest.mark.parametrize("name", ["vgg11_sastc", "vggsnn"])
def test_a_run_on_images_that_are_not_square(tmp_path, monkeypatch, name):
    for variable, folder in (("ROOT", "project"), ("CACHE", "cache"), ("DATA", "data")):
        monkeypatch.setenv(f"SNNKD_{variable}", str(tmp_path / folder))
    for split in ("train", "test"):
        for number, label in enumerate("ab"):
            folder = tmp_path / "data/set" / split / label
            folder.mkdir(parents=True)
            for i in range(8):
                pixels = np.full((16, 24, 3), 100 * number + i, np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    data = DataSpec("folder:set", val=0.0)
    optim = OptimSpec(epochs=1, batch_size=8, lr=0.01)
    teacher = RunSpec(data, ModelSpec(name, width=0.03125), optim)
    model = ModelSpec(name, T=1, width=0.03125)
    spec = RunSpec(data, model, optim, method="kd+feature", teacher=teacher)
    record = run_train(spec, weak_teacher="accept")
    assert record.dataset["shape"] == [3, 16, 24] and record.metrics["sops"] > 0
    assert rebuild_model(teacher, with_weights(teacher, Store())[1]).image_size == (16, 24)


@pytest.mark.parametrize("size", [0, -1, 1.5, "32", (16,), (16, 0), (16, 24, 1), None, True])
def test_other_sizes_are_refused(size):
    with pytest.raises(UserError, match=r"image_size = .*: give a whole number of at least 1, or"):
        create_model("resnet20", image_size=size)


# --- teachers -----------------------------------------------------------------------------------


class Logits(nn.Module):
    "A teacher whose forward pass returns its logits in some container."

    def __init__(self, wrap):
        super().__init__()
        self.net = tiny(image_size=16)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.net(x))


class ModelOutput(dict):
    "As in transformers: a dict whose entries are attributes."

    @property
    def logits(self):
        return self["logits"]


def with_extra(logits):
    return torch.zeros(len(logits), 5, 4, 4), logits


TEACHERS = {
    "half": lambda net: net.half(),
    "bfloat16": lambda net: net.bfloat16(),
    "double": lambda net: net.double(),
    "parallel": nn.DataParallel,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "both": lambda net: torch.compile(nn.DataParallel(net), backend="eager"),
    "tuple": lambda net: Logits(lambda logits: (logits, None)),
    "list": lambda net: Logits(lambda logits: [logits]),
    "maps first": lambda net: Logits(with_extra),
    "dict": lambda net: Logits(lambda logits: {"loss": None, "logits": logits}),
    "dict of one": lambda net: Logits(lambda logits: {"out": logits, "aux": logits + 1}),
    "output": lambda net: Logits(lambda logits: ModelOutput(loss=None, logits=logits)),
}


def images():
    torch.manual_seed(1)
    return torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("kind", TEACHERS)
def test_teachers_of_every_kind_teach_as_a_plain_one(kind):
    student, plain = tiny(T=2, image_size=16), tiny(image_size=16)
    tolerance = {"half": 2e-2, "bfloat16": 1e-1}.get(kind, 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher = TEACHERS[kind](copy.deepcopy(plain))
        x, y = images()
        terms = create_distiller("kd", student, teacher)(x, y)[0]
    expected = create_distiller("kd", student, plain)(x, y)[0]
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(float(value), abs=tolerance), name
    dtype = next(teacher.parameters()).dtype
    of_precision = {"half": torch.half, "bfloat16": torch.bfloat16, "double": torch.double}
    assert dtype == of_precision.get(kind, torch.float32), "the user's network is left as it was"


@pytest.mark.parametrize("kind", ["half", "double", "parallel", "compiled", "tuple", "output"])
@pytest.mark.parametrize("method", ["feature", "sastc", "samd"])
def test_features_of_such_teachers(method, kind):
    student, plain = tiny(T=2, image_size=16), tiny(image_size=16)
    teacher = TEACHERS[kind](copy.deepcopy(plain))
    own = "net.stage2" if isinstance(teacher, Logits) else "stage2"
    options = {"layers": {"student": "stage2", "teacher": own}}
    if method == "sastc":
        options = {"layers": {"student": ["stage2"], "teacher": [own]}, "batch_size": 4}
    x, y = images()
    torch.manual_seed(0)
    terms = create_distiller(method, student, teacher, **options)(x, y)[0]
    if method != "sastc":
        options["layers"]["teacher"] = "stage2"
    else:
        options["layers"]["teacher"] = ["stage2"]
    torch.manual_seed(0)
    expected = create_distiller(method, student, plain, **options)(x, y)[0]
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(float(value), rel=3e-2, abs=1e-3), name


@pytest.mark.parametrize("kind", ["half", "double", "parallel", "compiled"])
def test_a_wrapped_teacher_in_foreign(kind):
    plain = tiny(image_size=16)
    teacher = Foreign(TEACHERS[kind](copy.deepcopy(plain)), ["stage1"], image_size=16).eval()
    logits, features = teacher(images()[0], features=True)
    assert torch.allclose(logits.float(), plain.eval()(images()[0]), atol=5e-2)
    assert list(features) == ["stage1"]
    data = make_data(images=torch.zeros(24, 1, 16, 16, dtype=torch.uint8))
    assert 0 <= evaluate(teacher, data) <= 100


@pytest.mark.parametrize(
    ("teacher", "advice"),
    [
        ("weights.pt", r"teacher = weights\.pt: give the network itself: create_model"),
        (Path("weights.pt"), r"create_model\(NAME, weights=FILE\)"),
        ({"weight": torch.zeros(2)}, r"teacher = a dict: .*load_state_dict"),
        (torch.zeros(2), "teacher = a Tensor: give a network"),
        (tiny, "teacher = a function"),
    ],
)
def test_what_is_no_network_is_refused(teacher, advice):
    with pytest.raises(UserError, match=advice):
        create_distiller("kd", tiny(T=2), teacher)
    with pytest.raises(UserError, match=advice.replace("teacher", "student")):
        create_distiller("kd", teacher, tiny())
    with pytest.raises(UserError, match=advice.replace("teacher", "model")):
        Foreign(teacher)


def test_an_output_without_logits_is_described():
    teacher = Logits(lambda logits: {"loss": logits.mean()})
    with pytest.raises(UserError, match="the network returned a list"):
        create_distiller("kd", tiny(image_size=16), teacher)(*images())


# --- option values ------------------------------------------------------------------------------

BAD = ([], "", "x", None, 0, -1, float("inf"), float("nan"), {}, [[]])


@pytest.mark.parametrize(
    ("name", "option", "valid"),
    [
        ("resnet20", "depth", {}),
        ("wrn16_2", "depth", {}),
        ("pyramidnet18", "depth", {}),
        ("vgg11_rate", "head_std", {}),
        ("preact_resnet18", "bias", {}),
        ("preact_resnet18", "stem", {}),
        ("resnet19_ckd", "last", {}),
        ("spikformer", "blocks", {}),
        ("dsas", "slopes", {None}),
        ("dsas", "genome", {None}),
        ("vit_small", "patch", {None}),
        ("vit_small", "input_size", {None}),
    ],
)
def test_model_options_are_checked_like_all_others(name, option, valid):
    for value in BAD:
        if value is None and None in valid:
            continue
        with torch.device("meta"), pytest.raises(UserError, match=option.rstrip("s")):
            create_model(name, 3, **{option: value})


@pytest.mark.parametrize("words", ["depth=none", "depth=0", "depth=x", "depth=[]", "bias=1"])
def test_they_are_checked_on_the_command_line(words, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path))
    network = "preact_resnet18" if "bias" in words else "resnet20"
    assert main(["train", "--student", network, "--student-args", words, "--subset", "64"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words.split("=")[0] in error and "give" in error


@pytest.mark.parametrize("field", ["lr", "weight_decay", "warmup", "gamma", "clip"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1, "x", [], True])
def test_numbers_of_a_training_are_finite(field, value):
    with pytest.raises(UserError, match=f"{field} = "):
        OptimSpec(**{field: value})


OPTION_WORDS = {
    "classes": "class",
    "rescale": "rescal",
    "layers": "layer|module path",
    "pairs": "pair|layer",
}


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("bkd", "clip"),
        ("tet", "phi"),
        ("kd", "temp"),
        ("samd", "classes"),
        ("samd", "rescale"),
        ("samd", "squared"),
        ("samd", "layers"),
        ("samd", "input_shape"),
        ("nld", "mix"),
        ("feature", "pairs"),
        ("feature", "weight"),
        ("feature", "input_shape"),
        ("eskd", "pairs"),
        ("catkd", "size"),
        ("sastc", "batch_size"),
    ],
)
def test_method_options_are_checked(method, option):
    student, teacher = tiny(T=2, image_size=16), tiny(image_size=16)
    optional = ("classes", "rescale", "squared", "layers", "input_shape", "mix", "pairs")
    for value in BAD:
        is_weight = option in ("weight", "phi") and value == 0
        is_any_number = option == "phi" and value == -1
        if (value is None and option in optional) or is_weight or is_any_number:
            continue
        with pytest.raises(UserError, match=OPTION_WORDS.get(option, option)):
            create_distiller(method, student, teacher, **{option: value})


@pytest.mark.parametrize(
    "option", ["v_threshold", "decay", "decay_input", "detach_reset", "strict"]
)
def test_neuron_options_are_checked(option):
    for value in ([], "x", "", {}, float("inf"), float("nan"), [[]]):
        with pytest.raises(UserError, match=option):
            create_model("resnet20", T=2, neuron_args={option: value})
    for value in ("x", 3, [[]]):
        with pytest.raises(UserError, match="neuron_args"):
            create_model("resnet20", T=2, neuron_args=value)
