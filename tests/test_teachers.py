"""Teachers that exist already: from a file, from timm or torchvision, from a stored run."""

import json
from pathlib import Path

import pytest
import torch
from helpers import error_of

from snnkd_nb.cli import main
from snnkd_nb.core import UserError, sha256_of, torchvision
from snnkd_nb.models.foreign import are_pretrained_weights_here, keep_file
from snnkd_nb.models.zoo import create_model
from snnkd_nb.spec import ModelSpec, OptimSpec, RunSpec
from snnkd_nb.store import Store, complete_id

SMALL = ["--student", "vggsnn", "--width", "0.0625", "--T", "2", "--epochs", "1", "--subset", "100"]
WEAK = ["--weak-teacher"]  # a teacher of one epoch


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("")
    (tmp_path / "nbs").mkdir()
    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def last_record(capsys):
    return json.loads(Path(capsys.readouterr().out.split()[-1]).read_text())


def small_teacher(seed=0):
    torch.manual_seed(seed)
    return create_model("vgg11_sastc", width=0.0625, in_channels=1, image_size=8)


def test_a_file_of_weights_teaches_as_it_is_and_its_hash_is_recorded(home, capsys):
    file = home / "teacher.pt"
    teacher = small_teacher()
    torch.save(teacher.state_dict(), file)
    words = ["train", *SMALL, *WEAK, "--teacher", "vgg11_sastc", "--teacher-weights", str(file)]
    assert main(words) == 0, capsys.readouterr()
    record = last_record(capsys)
    assert record["spec"]["teacher"]["model"]["args"]["weights"] == f"sha256:{sha256_of(file)}"
    assert record["spec"]["teacher"]["optim"]["epochs"] == 0
    teacher_record = Store().get(record["teacher"]["id"])
    assert teacher_record.metrics["acc_last"] == record["teacher"]["acc_last"]
    assert teacher_record.history["epoch"] == [0]
    # the same weights under another name are the same run, other weights are another
    renamed = file.rename(home / "other.pt")
    words[-1] = str(renamed)
    assert main(words) == 0
    assert last_record(capsys)["id"] == record["id"]
    torch.save(small_teacher(seed=1).state_dict(), renamed)
    assert main(words) == 0
    assert last_record(capsys)["id"] != record["id"]


def test_a_file_can_also_be_the_start_of_a_training(home, capsys):
    file = home / "teacher.pt"
    torch.save(small_teacher().state_dict(), file)
    words = ["train", *SMALL, *WEAK, "--teacher", "vgg11_sastc", "--teacher-weights", str(file)]
    assert main([*words, "--teacher-epochs", "1"]) == 0, capsys.readouterr()
    teacher = Store().get(last_record(capsys)["teacher"]["id"])
    assert teacher.history["epoch"] == [1]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--teacher", "vgg11_sastc", "--teacher-weights", "none.pt"], "none.pt exists"),
        (["--teacher-weights", "FILE"], "add --teacher NAME"),
        (["--teacher", "resnet20", "--teacher-weights", "FILE"], "does not fit"),
        (["--teacher", "resnet20", "--teacher-pretrained"], "take a network of timm"),
        (["--teacher", "torchvision:resnet18", "--teacher-pretrained"], "add --download"),
        (["--teacher", "timm:resnet18", "--teacher-pretrained"], "add --download"),
        (["--teacher", "run:digits"], "unknown run"),
        (["--teacher", "resnet20", "--teacher-epochs", "0"], "epochs = 0"),
        (["--teacher", "resnet20", "--teacher-args", "deep=3"], "unknown option"),
    ],
    ids=lambda value: None if isinstance(value, str) else "_".join(value),
)
@pytest.mark.parametrize("verb", ["train", "search"])
def test_a_teacher_that_cannot_be_used_is_one_line(home, capsys, verb, words, said):
    if verb == "search" and words[0] != "--teacher":
        said = "does not fit"  # the search has a default teacher
    torch.save(small_teacher().state_dict(), home / "file.pt")
    words = [str(home / "file.pt") if word == "FILE" else word for word in words]
    options = SMALL if verb == "train" else ["--generations", "1", "--population", "4"]
    assert said in error_of(capsys, verb, *options, *words)
    assert not list(home.glob("results/runs/*.json"))


def test_an_untrained_file_is_refused(home, capsys):
    torch.save(small_teacher().state_dict(), home / "teacher.pt")
    words = ["--teacher", "vgg11_sastc", "--teacher-weights", str(home / "teacher.pt")]
    assert "--weak-teacher" in error_of(capsys, "train", *SMALL, *words)


def test_a_stored_run_teaches(home, capsys):
    assert main(["train", "--student", "vgg11_sastc", "--T", "None", *SMALL[2:4], *SMALL[6:]]) == 0
    teacher = last_record(capsys)
    assert main(["train", *SMALL, *WEAK, "--teacher", f"run:{teacher['id'][:-4]}"]) == 0
    record = last_record(capsys)
    assert record["teacher"]["id"] == teacher["id"]
    assert record["teacher"]["sha256"] == teacher["weights"]["sha256"]
    words = ["train", *SMALL, "--teacher", f"run:{teacher['id']}"]
    assert "leave the flag out" in error_of(capsys, *words, "--teacher-epochs", "3")
    assert "same data and size" in error_of(capsys, *words, "--size", "6")
    assert "is no ordinary network" in error_of(
        capsys, "train", *SMALL, "--teacher", f"run:{record['id']}"
    )


def test_pretrained_weights_on_this_machine_need_no_download(home, capsys):
    name = "torchvision:squeezenet1_1"
    assert not are_pretrained_weights_here(name)
    models = torchvision("models")
    address = models.get_model_weights("squeezenet1_1").DEFAULT.url
    file = Path(torch.hub.get_dir(), "checkpoints", address.rpartition("/")[2])
    file.parent.mkdir(parents=True)
    torch.manual_seed(5)
    pretrained = models.squeezenet1_1(weights=None)
    torch.save(pretrained.state_dict(), file)
    assert are_pretrained_weights_here(name)
    net = create_model(name, num_classes=10, pretrained=True)
    assert net.net.features[0].weight.equal(pretrained.features[0].weight)


def test_only_a_run_from_a_file_may_have_no_epochs():
    with pytest.raises(UserError, match="epochs = 0"):
        RunSpec(optim=OptimSpec(epochs=0))
    with pytest.raises(UserError, match="nothing to distil"):
        RunSpec(
            model=ModelSpec(T=2, args={"weights": "x"}), optim=OptimSpec(epochs=0), method="tet"
        )


def test_a_network_starts_from_a_file_without_its_classifier(tmp_path):
    file = tmp_path / "five.pt"
    five = create_model("vgg11_sastc", num_classes=5, width=0.0625)
    torch.save(five.state_dict(), file)
    with pytest.raises(UserError, match="head=False"):
        create_model("vgg11_sastc", num_classes=7, width=0.0625, weights=file)
    seven = create_model("vgg11_sastc", num_classes=7, width=0.0625, weights=file, head=False, T=2)
    assert seven.stem.conv.weight.equal(five.stem.conv.weight)
    with pytest.raises(UserError, match="give weights=FILE"):
        create_model("vgg11_sastc", head=False)


def test_a_kept_file_that_is_damaged_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path))
    file = tmp_path / "weights.pt"
    net = create_model("vgg11_sastc", width=0.0625)
    torch.save(net.state_dict(), file)
    kept = keep_file(file)
    copy = next((tmp_path / "files").iterdir())
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="SHA-256"):
        create_model("vgg11_sastc", width=0.0625, weights=kept)


def test_an_id_may_be_shortened_while_it_is_unique(tmp_path):
    ids = ["digits-a-1", "digits-a-12", "digits-b-3"]
    assert complete_id("digits-a-1", ids) == "digits-a-1"
    assert complete_id("digits-b", ids) == "digits-b-3"
    with pytest.raises(UserError, match=r"2 runs begin with this \(digits-a-1, digits-a-12\)"):
        complete_id("digits-a", ids)
    with pytest.raises(UserError, match="unknown run"):
        complete_id("", ids)
    assert Store(tmp_path).get("digits-b-3") is None
