"""Commands about single runs: YAML, export, predict, folders, devices, notebooks, small comforts."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers import error_of
from PIL import Image
from torch import nn

from snnkd_nb import Foreign, create_distiller, load_run, predict, register_method, register_model
from snnkd_nb.cli import main
from snnkd_nb.core import UserError, source_digest
from snnkd_nb.data.images import load_spec
from snnkd_nb.deploy.runs import draw_maps, find_teacher
from snnkd_nb.losses.base import Method
from snnkd_nb.losses.zoo import _methods, adapt_loss, parse_methods
from snnkd_nb.metrics.activity import NAMES, energy, sops
from snnkd_nb.models.blocks import MODELS
from snnkd_nb.models.zoo import create_model
from snnkd_nb.runner.doctor import check_torchvision
from snnkd_nb.runner.notebooks import check_parameters, read_choices
from snnkd_nb.runner.status import find_stored_scale
from snnkd_nb.spec import DataSpec, ModelSpec, OptimSpec, RunSpec
from snnkd_nb.training.job import run_train
from snnkd_nb.training.loop import _plain_options

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--student", "vggsnn", "--width", "0.0625", "--T", "2", "--epochs", "1", "--subset", "100"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("")
    (tmp_path / "nbs").mkdir()
    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_prints_itself_as_yaml_and_the_yaml_trains_the_same_run(home, capsys):
    flags = ["--weight-decay", "0.001", "--mixup", "0.2", "--accumulate", "2"]
    assert main(["train", *SMALL, *flags, "--print-config"]) == 0
    printed = capsys.readouterr().out
    values = yaml.safe_load(printed)
    assert values["optim"]["mixup"] == 0.2 and values["optim"]["accumulate"] == 2
    assert not list(home.glob("results/runs/*"))
    (home / "run.yaml").write_text(printed)
    out = home / "own"
    assert main(["train", "--config", "run.yaml", "--out", str(out), "--trackers", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    weights, record = (Path(line.split()[-1]) for line in lines[-2:])
    assert weights.is_absolute() and weights.parent == record.parent == out
    run_id = json.loads(record.read_text())["id"]
    assert RunSpec.from_dict(values).id == run_id
    assert not list(home.glob("results/runs/*.json"))
    rows = (home / "logs" / f"{run_id}.csv").read_text().splitlines()
    assert len(rows) == 2 and "test_acc" in rows[0]
    assert load_run(record).id == run_id
    # flags about the run itself would be ignored
    error = error_of(capsys, "train", "--config", "run.yaml", "--epochs", "3")
    assert "--epochs and --config" in error


@pytest.mark.parametrize(
    "text, said",
    [
        ("data: [1", "is no YAML"),
        ("5", "holds no run"),
        ("optim: {epoch: 3}", "did you mean 'epochs'"),
        ("optim: 3", "print one with"),
        ("optim: {lr: 1e-3}", "lr = '1e-3'"),
    ],
)
def test_a_wrong_file_is_one_line(home, capsys, text, said):
    (home / "run.yaml").write_text(text)
    assert said in error_of(capsys, "train", "--config", "run.yaml")


def test_a_stored_run_is_printed_exported_and_asked(home, capsys):
    assert main(["train", *SMALL, "--device", "cpu"]) == 0
    run_id = json.loads(Path(capsys.readouterr().out.split()[-1]).read_text())["id"]
    assert main(["config", run_id[:-3]]) == 0
    assert RunSpec.from_dict(yaml.safe_load(capsys.readouterr().out)).id == run_id
    assert main(["export", run_id, "--to", "student.pt2"]) == 0
    assert "not in the file" in capsys.readouterr().out
    program = torch.export.load(home / "student.pt2").module()
    assert program(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    Image.new("L", (8, 8), 99).save(home / "digit.png")
    assert main(["predict", run_id, "digit.png"]) == 0
    assert capsys.readouterr().out.startswith("digit.png ")
    assert "did you mean 'onnx'" in error_of(capsys, "export", run_id, "--format", "onx")
    assert "unknown run" in error_of(capsys, "export", "none")


def test_energy_and_maps_of_a_stored_run(home, capsys):
    words = ["--student", "resnet20", "--width", "0.25", "--T", "2", "--epochs", "1"]
    taught = ["--teacher", "resnet20", "--weak-teacher", "--device", "cpu"]
    options = ["--student-args", "depth=0.34", "--teacher-args", "depth=0.34"]
    assert main(["train", *words, *taught, *options, "--subset", "100"]) == 0
    run_id = json.loads(Path(capsys.readouterr().out.split()[-1]).read_text())["id"]
    assert main(["energy", run_id]) == 0
    shown = capsys.readouterr().out
    assert "spikes per neuron and time step" in shown
    assert all(convention in shown for convention in NAMES)
    Image.new("L", (8, 8), 99).save(home / "digit.png")
    assert main(["energy", run_id, "digit.png"]) == 0
    assert main(["maps", run_id, "digit.png", "--to", "where.png"]) == 0
    assert Image.open(home / "where.png").width > 100
    run = load_run(run_id)
    titles = [ax.get_title() for ax in draw_maps(run, home / "digit.png").axes]
    assert titles == ["image", "class map", "spikes"]
    both = draw_maps(run, home / "digit.png", find_teacher(run), stage="stage2").axes
    assert "teacher" in both[1].get_title() and len(both) == 4
    assert "maps of what?" in error_of(capsys, "maps", run_id)
    assert "did you mean 'stage3'" in error_of(
        capsys, "maps", run_id, "digit.png", "--stage", "stage33"
    )


def test_a_network_with_its_own_normalization_is_loaded(home):
    args = {"depth": 0.34, "mean": 0.4, "std": 0.2}
    data = DataSpec(subset=100, val=0.0)
    spec = RunSpec(data, ModelSpec("own_normal_net", None, args=args), OptimSpec(epochs=1))

    @register_model(spiking=False)
    def own_normal_net(depth=1.0, mean=None, std=None, **common):
        plain = create_model("resnet20", depth=depth, **{**common, "T": None})
        size, channels = common["image_size"], common["in_channels"]
        return Foreign(plain, None, size, channels, mean=mean, std=std)

    try:
        record = run_train(spec, on_event=str)
        test = load_spec(data).test
        answers = [answer.index for answer in predict(spec, test.images)]
        accuracy = 100 * (torch.tensor(answers) == test.labels).float().mean()
        assert accuracy.item() == pytest.approx(record.metrics["acc_last"], abs=1e-3)
    finally:
        MODELS.pop("own_normal_net")


def test_an_unknown_device_is_one_line(home, capsys):
    assert "valid: cpu" in error_of(capsys, "train", *SMALL, "--device", "gpu")


@pytest.mark.parametrize("flag", ["--T", "--subset", "--teacher-width"])
def test_a_word_in_place_of_a_number_is_explained_in_words(capsys, flag):
    error = error_of(capsys, "train", flag, "two")
    assert "'two'" in error and "or None" in error and "{None}" not in error


def test_help_lists_methods_and_networks(capsys):
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("sastc", "ckdsnn", "resnet20", "spikformer", "tet"))


def test_version_is_a_command(capsys):
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith("snnkd_nb ")


def test_notebooks_are_copied_into_a_folder_where_commands_work(home, capsys, monkeypatch):
    monkeypatch.delenv("SNNKD_ROOT")
    target = home / "work"
    assert main(["notebooks", "--to", str(target)]) == 0
    assert (target / "nbs" / "papers" / "sastc" / "table02.ipynb").is_file()
    assert len(list((target / "results" / "runs").glob("*.json"))) > 100
    monkeypatch.setenv("SNNKD_ROOT", str(target))
    capsys.readouterr()
    assert main(["list", "sastc/table02"]) == 0
    assert "not built yet" not in capsys.readouterr().out.splitlines()[0]
    assert "not empty" in error_of(capsys, "notebooks", "--to", str(target))


def test_without_notebooks_list_says_how_to_get_them(home, capsys):
    (home / "nbs").rmdir()
    assert main(["list", "sastc/table02"]) == 0
    assert "snnkd notebooks --to DIR" in capsys.readouterr().err
    assert main(["render", "sastc/table02"]) == 1
    assert "snnkd notebooks --to DIR" in capsys.readouterr().err


def test_list_shows_the_scale_of_the_tables_that_are_here(home, capsys):
    assert find_stored_scale() == "smoke"
    tables = home / "results" / "tables" / "sastc"
    tables.mkdir(parents=True)
    for scale in ("smoke", "small"):
        (tables / f"table02-{scale}.md").write_text("")
    assert find_stored_scale() == "small"
    main(["list", "sastc/table02"])
    assert "at scale small" in capsys.readouterr().out


def test_a_value_that_a_page_does_not_list_fails_before_anything_runs(monkeypatch, capsys):
    page = json.loads((ROOT / "nbs/papers/sastc/table02.ipynb").read_text())
    assert read_choices(page)["metric"] == ["acc_last", "acc_best_val", "acc_best_test"]
    assert check_parameters("x", page, {"metric": "acc_best_val"}) == {"metric": "acc_best_val"}

    def run_nothing(*args, **kwargs):
        raise AssertionError("a page was run")

    monkeypatch.setattr("snnkd_nb.runner.notebooks._start_rendering", run_nothing)
    words = ["render", "sastc/table02", "--missing", "run", "-p", "metric", "acc_best"]
    assert "did you mean 'acc_best" in error_of(capsys, *words)


def test_every_default_is_among_the_values_its_page_lists():
    for path in (ROOT / "nbs").glob("*/*/*.ipynb"):
        for name, values in read_choices(json.loads(path.read_text())).items():
            assert all(value.strip() == value and value for value in values), (path, name)


def test_energy_of_a_network_names_the_call_and_prints_no_tensor():
    net = create_model("vgg11_sastc", T=2, width=0.0625, in_channels=1, image_size=8)
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(UserError, match=r"energy\(sops\(network, images\)\)"):
        energy(net, x)
    with pytest.raises(UserError) as raised:
        energy(sops(net, x), x)
    assert "tensor(" not in str(raised.value) and "\n" not in str(raised.value)


def test_register_model_without_parentheses():
    try:

        @register_model
        def my_bare_net(**common):
            "Mine."
            return create_model("vgg11_sastc", **common)

        net = create_model("my_bare_net", T=2, width=0.0625, in_channels=1, image_size=8)
        assert net(torch.rand(1, 1, 8, 8)).shape == (2, 1, 10)
        assert MODELS["my_bare_net"]["summary"] == "Mine."
    finally:
        MODELS.pop("my_bare_net", None)


class Squared:
    "A loss without a base class."

    def __init__(self, teacher, scale=1.0):
        self.teacher = teacher
        self.scale = scale

    def terms(self, batch):
        return {"squared": self.scale * (batch.logits_s.mean(0) - batch.logits_t).square().mean()}


class Entropy(Method):
    needs_teacher = False

    def terms(self, batch):
        probabilities = batch.logits_s.mean(0).softmax(1)
        return {"entropy": -(probabilities * probabilities.log()).sum(1).mean()}


@pytest.mark.parametrize("named", [False, True])
def test_a_class_with_terms_is_a_loss(named):
    student = create_model("vgg11_sastc", T=2, width=0.0625, in_channels=1, image_size=8)
    teacher = create_model("vgg11_sastc", width=0.0625, in_channels=1, image_size=8)
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    try:
        methods = (Squared, Entropy)
        if named:
            for cls in methods:
                register_method(f"my-{cls.__name__.lower()}", cls)
            methods = ("my-squared", "my-entropy")
        squared = create_distiller(methods[0], student, teacher, scale=2.0)
        terms, _ = squared(x, y)
        assert set(terms) == {"ce", "squared"} and terms["squared"] > 0
        assert set(create_distiller(methods[1], student)(x, y)[0]) == {"ce", "entropy"}
        with pytest.raises(UserError, match="did you mean 'scale'"):
            create_distiller(methods[0], student, teacher, scales=2.0)
        with pytest.raises(UserError, match="needs a teacher"):
            create_distiller(methods[0], student)
        if named:
            both = create_distiller("my-squared+0.5*kd", student, teacher)
            assert set(both(x, y)[0]) == {"ce", "squared", "kd"}
    finally:
        for cls in (Squared, Entropy):
            _methods.pop(f"my-{cls.__name__.lower()}", None)


def test_a_class_without_terms_is_refused():
    with pytest.raises(UserError, match="is no method"):
        create_distiller(nn.Linear, None)
    with pytest.raises(UserError, match="is no method"):
        create_distiller(lambda: 0, None)


def squared_distance(batch, scale: float = 1.0):
    return scale * (batch.logits_s.mean(0) - batch.logits_t).square().mean()


def two_terms(batch):
    return {"largest": batch.logits_s.max(), "mean": batch.logits_s.mean()}


two_terms.needs_teacher = False


def test_a_function_is_a_loss():
    student = create_model("vgg11_sastc", T=2, width=0.0625, in_channels=1, image_size=8)
    teacher = create_model("vgg11_sastc", width=0.0625, in_channels=1, image_size=8)
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    single = create_distiller(squared_distance, student, teacher)
    double = create_distiller(squared_distance, student, teacher, scale=2.0)
    term = single(x, y)[0]["squared_distance"]
    assert torch.allclose(double(x, y)[0]["squared_distance"], 2 * term, rtol=1e-3)
    assert set(create_distiller(two_terms, student)(x, y)[0]) == {"ce", "largest", "mean"}
    with pytest.raises(UserError, match="squared_distance needs a teacher"):
        create_distiller(squared_distance, student)
    with pytest.raises(UserError, match="did you mean 'scale'"):
        create_distiller(squared_distance, student, teacher, scales=2.0)
    try:
        register_method("my-distance", squared_distance)
        weighted = create_distiller("0.5*my-distance", student, teacher, scale=4.0)
        assert torch.allclose(weighted(x, y)[0]["squared_distance"] * weighted.weights[0], term)
        with pytest.raises(UserError, match="scale = 'much'"):
            create_distiller("my-distance", student, teacher, scale="much")
    finally:
        _methods.pop("my-distance", None)


@pytest.mark.parametrize("loss", [Squared, squared_distance])
def test_a_record_and_a_checkpoint_tell_code_and_options_of_a_loss(loss):
    student = create_model("vgg11_sastc", T=2, width=0.0625, in_channels=1, image_size=8)
    teacher = create_model("vgg11_sastc", width=0.0625, in_channels=1, image_size=8)
    adapted = adapt_loss(loss)
    assert source_digest(adapted) == source_digest(loss) != ""
    once, twice = (_plain_options(adapted(student, teacher, scale=s)) for s in (1.0, 2.0))
    assert once != twice


def test_a_method_of_a_plug_in_is_found_by_its_name(tmp_path, monkeypatch):
    path = tmp_path / "plugged_loss.py"
    path.write_text(
        "from snnkd_nb import register_method\n"
        "def plugged(batch):\n"
        "    return batch.logits_s.mean()\n"
        "register_method('plugged', plugged)\n"
    )
    monkeypatch.setenv("SNNKD_PLUGIN", str(path))
    try:
        assert parse_methods("0.5*plugged+kd") == [(0.5, "plugged"), (1.0, "kd")]
    finally:
        _methods.pop("plugged", None)


def test_the_advice_for_a_spikingjelly_student_works():
    from spikingjelly.activation_based import functional, layer, neuron

    student = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1),
        neuron.LIFNode(),
        layer.AdaptiveAvgPool2d(1),
        layer.Flatten(),
        layer.Linear(4, 10),
    )
    functional.set_step_mode(student, "m")

    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = student
            self.image_size, self.in_channels = 8, 1

        def forward(self, x):
            functional.reset_net(self.net)
            return self.net(x.expand(2, *x.shape))

    net = Repeated()
    teacher = create_model("vgg11_sastc", width=0.0625, in_channels=1, image_size=8)
    with pytest.raises(UserError) as raised:
        create_distiller("kd+feature", net, teacher)
    message = str(raised.value)
    assert "the student" in message and "Foreign" not in message and "layers={" in message
    layers = {"student": ["net.1"], "teacher": ["stage1"]}
    distiller = create_distiller("kd+feature", net, teacher, layers=layers)
    terms, _ = distiller(torch.rand(4, 1, 8, 8), torch.arange(4))
    assert {"ce", "kd"} < set(terms)


def test_doctor_tells_a_torchvision_that_does_not_load_from_one_of_another_build():
    ok = check_torchvision("2.13.0+cpu", "0.28.0+cpu")
    broken = check_torchvision("2.13.0+cpu", "0.28.0+cpu", loads=False)
    other = check_torchvision("2.13.0+cpu", "0.28.0+cu126", loads=False)
    assert ok.level == "ok"
    assert "cannot be imported outside this package" in str(broken)
    assert "pip install --force-reinstall" in str(broken) and "another build" in str(other)
