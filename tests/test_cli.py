"""The command line as a user meets it: exit codes, one line for every mistake, quick answers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import error_of, run_command
from PIL import Image

from snnkd_nb.cli import VERBS, comments_of, main, parse
from snnkd_nb.core import UserError
from snnkd_nb.papers.experiments import artefacts

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A project of its own with the real notebooks."
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path))
    return tmp_path


BAD = [
    (["lst"], "did you mean 'list'"),
    (["list", "sastc/tabel02"], "did you mean 'sastc/table02'"),
    (["run", "satsc"], "'sastc'"),
    (["list", "--scale", "smal"], "did you mean 'small'"),
    (["run", "dsas/table15", "--scale", "papr"], "did you mean 'paper'"),
    (["reproduce", "dsas/table15", "--executor", "dusk"], "did you mean 'dask'"),
    (["reproduce", "dsas/table15", "-j", "0"], "at least 1"),
    (["render", "dsas/table15", "--missing", "shw"], "did you mean 'show'"),
    (["render", "dsas/table15", "-p", "scal", "smoke"], "did you mean 'scale'"),
    (["render", "dsas/table15", "-p", "scale"], "-p"),
    (["render", "dsas/figure08", "-p", "reach", "far"], "give a float"),
    (["render"], "render what?"),
    (["list", "--jsn"], "did you mean --json"),
    (["run", "dsas/table15", "-j", "two"], "--jobs"),
    (["train", "--student", "resnet2O"], "did you mean 'resnet20'"),
    (["train", "--teacher", "resnet21", "--T", "2"], "did you mean 'resnet20'"),
    (["train", "--teacher", "resnet20", "--method", "kdd"], "did you mean 'kd'"),
    (["train", "--dataset", "digit"], "did you mean 'digits'"),
    (["train", "--neuron", "tett"], "did you mean 'tet'"),
    (["train", "--T", "0"], "T = 0"),
    (["train", "--T", "-2"], "T = -2"),
    (["train", "--T", "four"], "--T"),
    (["train", "--label-noise", "-0.1"], "label_noise = -0.1"),
    (["train", "--label-noise", "1.5"], "label_noise = 1.5"),
    (["train", "--shots", "0"], "shots = 0"),
    (["train", "--epochs", "0"], "epochs = 0"),
    (["train", "--width", "0"], "width = 0"),
    (["train", "--schedule", "cosin"], "did you mean 'cosine'"),
    (["train", "--precision", "fp8"], "did you mean 'fp32'"),
    (["train", "--augment", "crop+flp"], "did you mean 'flip'"),
    (["train", "--variant", "papr"], "did you mean 'paper'"),
    (["train", "--method", "kd"], "needs a teacher"),
    (["train", "--teacher", "resnet20", "--method", "none"], "no teacher"),
    (["train", "--subset", "3"], "subset"),
    (["train", "--dataset", "digits-events", "--frames", "8"], "give --frames 4 or --T 8"),
    (["train", "--plugin", "no_such_module"], "plugin no_such_module cannot be imported"),
    (["train", "--teacher", "torchvision:resnet19"], "did you mean 'resnet18'"),
    (
        ["train", "--teacher", "torchvision:resnet18", "--teacher-width", "0.5"],
        "has no width factor",
    ),
    (["train", "--student", "VGGSNN"], "did you mean 'vggsnn'"),
    (["train", "--subset", "100", "--teacher", "timm:vit_tiny_patch16_224"], "--size"),
    (["train", "--dataset", "folder:nowhere"], "no folder"),
    (["train", "--epochs", "none"], "--epochs"),
    (["train", "--method-args", "beta"], "write name=value"),
    (["train", "--gradient", "rates"], "did you mean 'rate'"),
    (["search", "--population", "1"], "population"),
    (["search", "--metric", "mass", "--teacher-epochs", "0"], "epochs = 0"),
    (["search", "--algorithm", "gaa"], "did you mean 'ga'"),
    (["measure", "overhed"], "did you mean 'overhead'"),
    (["list", "--papers"], "--papers needs a folder"),
    (["watch", "no-such-run"], "unknown run"),
]


@pytest.mark.parametrize("words, said", BAD, ids=[" ".join(w) for w, _ in BAD])
def test_a_mistake_is_one_line_with_the_nearest_names(home, capsys, words, said):
    assert said in error_of(capsys, *words)
    assert not list(home.glob("results/**/*.json"))


def picture(path, broken=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (10, 200, 30)).save(path)
    if broken:
        path.write_bytes(path.read_bytes()[:20])


FOLDERS = {
    "no classes": (["train/x.png", "test/y.png"], "class folders"),
    "unreadable image": (
        ["train/cat/a.png", "train/dog/BAD.png", "test/cat/a.png", "test/dog/b.png"],
        "BAD.png",
    ),
    "test class missing from train": (
        ["train/cat/a.png", "train/dog/a.png", "test/cat/a.png", "test/cow/b.png"],
        "cow",
    ),
    "no train folder": (["test/cat/a.png"], "train"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_bad_image_folder_is_one_line_that_names_the_place(home, capsys, kind):
    files, said = FOLDERS[kind]
    for f in files:
        picture(home / "images" / f, broken="BAD" in f)
    assert said in error_of(
        capsys, "train", "--dataset", f"folder:{home / 'images'}", "--epochs", "1"
    )


def test_what_is_not_built_yet_is_said_and_is_not_success(home, capsys, monkeypatch):
    absent = artefacts()[0].id
    monkeypatch.setattr(type(artefacts()[0]), "built", property(lambda self: self.id != absent))
    for verb in ("run", "render", "reproduce"):
        assert main([verb, absent]) == 1
        assert capsys.readouterr().err == f"snnkd: {absent} not built yet\n"


def test_the_process_has_the_exit_code_and_no_traceback(home):
    done = run_command("train", "--T", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"snnkd: T = 0: .+\n", done.stderr)
    assert run_command().returncode == 2
    assert run_command("--help").returncode == 0
    assert run_command("--version").stdout.startswith("snnkd_nb ")


def test_a_closed_pipe_is_no_error(home):
    r = subprocess.run(
        f"{sys.executable} -m snnkd_nb.cli list | head -1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert r.stdout.startswith("dsas/table01") and r.stderr == ""


def test_ctrl_c_is_130_and_one_line(home, capsys, monkeypatch):
    def stop(**kw):
        raise KeyboardInterrupt

    monkeypatch.setitem(VERBS, "status", stop)
    monkeypatch.setattr("snnkd_nb.cli.parse", lambda *words: {})
    assert main(["status"]) == 130
    err = capsys.readouterr().err
    assert err.startswith("snnkd: stopped") and err.count("\n") == 1


def test_list_knows_all_artefacts(home):
    rows = json.loads(run_command("list", "--json").stdout)
    assert len(rows) == len(artefacts())
    assert all(row["needed"] == row["stored"] + row["missing"] for row in rows)
    assert {row["id"] for row in rows if row["built"]} == {a.id for a in artefacts() if a.built}


def test_list_loads_nothing_heavy(home):
    code = "import sys; from snnkd_nb.cli import main; main(['list']); print(sorted({'torch', 'numpy', 'pandas', 'papermill', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
        == "[]\n"
    )


@pytest.mark.parametrize("verb", VERBS)
def test_every_parameter_is_explained_and_parses_to_its_default(verb, capsys):
    import inspect

    function = VERBS[verb]
    comments = comments_of(function)
    parameters = inspect.signature(function).parameters
    assert set(parameters) <= set(comments)
    assert function.__doc__
    with pytest.raises(SystemExit) as exit_:
        parse(verb, function, ["--help"])
    assert exit_.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in parameters:
        assert " ".join(comments[name].split()[:3]) in shown, shown
    words, expected = [], {}
    for name, parameter in parameters.items():
        expected[name] = parameter.default
        if parameter.default is parameter.empty:
            is_word = parameter.annotation is str
            expected[name] = "x" if is_word else []
            words += ["x"] * is_word
    assert parse(verb, function, words) == expected


@pytest.mark.parametrize(
    "words",
    [
        ["--epochs"],
        ["--what"],
        ["train", "--", "x"],
        ["list", "-x"],
        ["watch"],
        ["watch", "a", "b"],
        ["list", ""],
        ["train", ""],
    ],
)
def test_odd_words_are_usage_errors(home, capsys, words):
    error_of(capsys, *words)


def test_parse_does_not_leave_a_changed_environment():
    before = dict(os.environ)
    with pytest.raises(UserError):
        parse("list", VERBS["list"], ["--nope"])
    assert dict(os.environ) == before


def test_train_prints_accuracy_and_record_and_the_second_time_trains_nothing(home, capsys):
    words = [
        "train",
        "--student",
        "vgg11_sastc",
        "--teacher",
        "vgg11_sastc",
        "--width",
        "0.0625",
        "--T",
        "2",
        "--epochs",
        "1",
        "--teacher-epochs",
        "2",
        "--subset",
        "256",
        "--weak-teacher",
    ]
    assert main(words) == 0
    first = capsys.readouterr().out
    path = home / first.split()[-1]
    spec = json.loads(path.read_text())["spec"]
    assert spec["method"] == "kd"
    assert spec["teacher"]["optim"]["epochs"] == 2
    assert "test accuracy" in first
    assert main(words) == 0
    second = capsys.readouterr().out
    assert "epoch" not in second.replace("last epoch", "").replace("validation epoch", "")
    assert main(["watch", json.loads(path.read_text())["id"]]) == 0


PLUGIN = """
from torch import nn
from snnkd_nb.models.blocks import register_model
from snnkd_nb.models.taps import Foreign

@register_model("me", "here", spiking=False)
def my_own_teacher(**common):
    "Mine."
    net = nn.Sequential(nn.Conv2d(common["in_channels"], 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, common["num_classes"]))
    return Foreign(net, ["1"], common["image_size"])
"""


def test_a_plugin_brings_a_network_and_workers_import_it_too(home, capsys, monkeypatch):
    from snnkd_nb.models.blocks import MODELS
    from snnkd_nb.runner.jobs import execute
    from snnkd_nb.spec import ModelSpec, OptimSpec, RunSpec

    (home / "my_own_nets.py").write_text(PLUGIN)
    monkeypatch.setenv("SNNKD_PLUGIN", "")
    words = [
        "train",
        "--student",
        "vggsnn",
        "--width",
        "0.0625",
        "--T",
        "2",
        "--epochs",
        "1",
        "--subset",
        "100",
        "--teacher",
        "my_own_teacher",
        "--weak-teacher",
    ]
    assert "unknown model 'my_own_teacher'" in error_of(capsys, *words)
    try:
        monkeypatch.chdir(home)
        for seed, plugin in enumerate(
            (str(home / "my_own_nets.py"), "my_own_nets.py", "my_own_nets")
        ):
            assert main([*words, "--seed", str(seed), "--plugin", plugin]) == 0, capsys.readouterr()
        spec = json.loads((home / capsys.readouterr().out.split()[-1]).read_text())["spec"]
        assert spec["teacher"]["model"]["name"] == "my_own_teacher" and os.environ[
            "SNNKD_PLUGIN"
        ] == str(home / "my_own_nets.py")
        run = RunSpec(model=ModelSpec("my_own_teacher"), optim=OptimSpec(epochs=1))
        assert execute([run], 1, on_line=lambda line: None).ok, "in a worker process"
    finally:
        MODELS.pop("my_own_teacher", None)
        sys.modules.pop("my_own_nets", None)


def test_a_teacher_of_a_library_has_no_width(home, capsys):
    words = [
        "train",
        "--student",
        "vggsnn",
        "--width",
        "0.0625",
        "--T",
        "2",
        "--epochs",
        "1",
        "--subset",
        "100",
        "--teacher",
        "torchvision:squeezenet1_1",
        "--size",
        "32",
        "--weak-teacher",
    ]
    assert main(words) == 0, capsys.readouterr()
    spec = json.loads((home / capsys.readouterr().out.split()[-1]).read_text())["spec"]
    assert (spec["model"]["width"], spec["teacher"]["model"]["width"]) == (0.0625, 1.0)


def test_a_folder_of_papers_must_hold_a_paper(home, capsys, monkeypatch):
    monkeypatch.setenv("SNNKD_PAPERS", "")
    (home / "empty").mkdir()
    assert "no paper.toml" in error_of(capsys, "--papers", str(home / "empty"), "list")


def test_help_names_every_augmentation():
    from snnkd_nb.spec import AUGMENTATIONS

    assert all(a in comments_of(VERBS["train"])["augment"] for a in AUGMENTATIONS if a != "none")


def test_status_readme_and_doctor(home, capsys):
    assert main(["status"]) == 0
    assert (home / "results/README.md").read_text().startswith("# Results")
    assert main(["readme", "--check"]) == 1
    assert main(["readme"]) == 0
    assert main(["readme", "--check"]) == 0
    capsys.readouterr()
    assert main(["doctor"]) == 0
    assert "everything that is required is in place" in capsys.readouterr().out


def test_options_of_one_method_and_words_that_are_flags():
    from snnkd_nb.cli import _parse_options

    assert _parse_options(
        ("kd.temp=4.0", "shared=false", "norm=None", "stage=('stage3','4')"), "--method-args"
    ) == {"kd.temp": 4.0, "shared": False, "norm": None, "stage": ("stage3", "4")}
    for bad in ("kd.=1", "2x=1", "temp"):
        with pytest.raises(UserError, match="write name=value"):
            _parse_options((bad,), "--method-args")
