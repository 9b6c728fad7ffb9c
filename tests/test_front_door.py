"""One import for everything, trained runs, and files for other programs."""

import json
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers import run_python
from PIL import Image

import snnkd_nb
from snnkd_nb import load_run, predict
from snnkd_nb.core import UserError, root, sha256_of
from snnkd_nb.data.images import load_spec
from snnkd_nb.deploy.export import compare_logits, export, fold_norm, run_nir_file, to_nir
from snnkd_nb.deploy.runs import prepare_images
from snnkd_nb.models.zoo import create_model
from snnkd_nb.spec import DataSpec, ModelSpec, OptimSpec, RunSpec
from snnkd_nb.store import Store, dump, weights_path
from snnkd_nb.training.job import run_train


def test_the_package_loads_nothing_until_it_is_asked():
    code = """
        import sys
        before = set(sys.modules)
        import snnkd_nb
        loaded = sorted(set(sys.modules) - before)
        assert {"torch", "numpy", "PIL", "pandas"}.isdisjoint(sys.modules)
        assert [name for name in loaded if name.startswith("snnkd_nb.")] == []
        print(len(loaded))
    """
    assert int(run_python(code, "-W", "error")) < 60


def test_every_name_of_the_front_door_is_the_documented_function():
    from snnkd_nb.search.evolution import search

    for name, module in snnkd_nb.FRONT_DOOR.items():
        found = getattr(snnkd_nb, name)
        assert name in dir(snnkd_nb)
        if name != "search":
            assert found.__module__ == f"snnkd_nb.{module}" and callable(found)
    with pytest.raises(AttributeError, match="no attribute 'serch'"):
        snnkd_nb.serch  # noqa: B018
    assert callable(search)


@pytest.mark.parametrize("first", ["", "import snnkd_nb.search.evolution"])
def test_search_is_a_function_and_a_package(first):
    code = f"""
        {first}
        from snnkd_nb import search
        from snnkd_nb.search.evolution import search as function
        import snnkd_nb
        try:
            search(1, 2, population="few")
        except Exception as error:
            by_package = repr(error)
        try:
            function(1, 2, population="few")
        except Exception as error:
            assert repr(error) == by_package
        assert snnkd_nb.search.evolution.search is function
        print("same")
    """
    assert run_python(code) == "same\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("runs"))
    spec = RunSpec(
        data=DataSpec(subset=600, val=0.0),
        model=ModelSpec("vgg11_sastc", T=2, width=0.125),
        optim=OptimSpec(epochs=3, batch_size=32, schedule="onecycle"),
    )
    run_train(spec, store, on_event=str)
    return store, spec


def test_a_run_is_found_by_id_beginning_path_spec_and_record(trained, tmp_path):
    store, spec = trained
    record = store.get(spec)
    found = [load_run(run, store) for run in (spec.id, spec.id[:-3], spec, record)]
    found.append(load_run(store.path(spec.id)))
    assert {run.id for run in found} == {spec.id}
    states = [run.model.state_dict() for run in found]
    assert all(torch.equal(states[0][k], state[k]) for state in states for k in state)
    with pytest.raises(UserError, match="unknown run"):
        load_run("digits-nothing", store)
    with pytest.raises(UserError, match="no record of a run"):
        (tmp_path / "x.json").write_text("{}")
        load_run(tmp_path / "x.json")


def test_weights_next_to_a_record_are_enough(trained, tmp_path, monkeypatch):
    store, spec = trained
    record = store.get(spec)
    content = weights_path(record).read_bytes()
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path / "empty"))
    path = tmp_path / f"{spec.id}.json"
    path.write_text(store.path(spec.id).read_text())
    with pytest.raises(UserError, match="not on this machine"):
        load_run(path)
    path.with_suffix(".safetensors").write_bytes(content)
    assert load_run(path).classes == tuple("0123456789")
    path.with_suffix(".safetensors").write_bytes(content[:-1] + b"?")
    with pytest.raises(UserError, match="its hash is not the one in the record"):
        load_run(path)


def test_a_record_of_an_earlier_version_takes_the_classes_from_the_data(trained):
    store, spec = trained
    record = store.get(spec)
    fields = {**vars(record), "extra": {}}
    old = type(record)(**fields)
    assert load_run(old, store).classes == load_run(spec, store).classes
    assert json.loads(dump(old))["extra"] == {}


def test_predictions_have_the_recorded_accuracy_in_every_form(trained, tmp_path):
    store, spec = trained
    run = load_run(spec, store)
    test = load_spec(spec.data).test
    answers = [prediction.index for prediction in predict(run, test.images, batch_size=50)]
    accuracy = 100 * (torch.tensor(answers) == test.labels).float().mean()
    assert abs(float(accuracy) - run.record.metrics["acc_last"]) < 1e-3
    array = test.images[0, 0].numpy()
    path = tmp_path / "digit.png"
    Image.fromarray(array).save(path)
    forms = [str(path), path, Image.fromarray(array), array, array / 255, test.images[0], [path]]
    expected = predict(run, test.images[:1])
    assert all(predict(run, form) == expected for form in forms)
    assert abs(sum(expected[0].probabilities.values()) - 1) < 1e-5
    assert str(expected[0]).startswith(expected[0].label)


@pytest.mark.parametrize(
    "images, said",
    [
        (torch.full((1, 8, 8), 3.0), "not normalized"),
        (torch.zeros(8, 8), "give \\(C, H, W\\)"),
        (np.zeros((8, 8, 2), np.uint8), "2 channels"),
        ("nothing.png", "there is no nothing.png"),
        ([], "no images"),
        (3, "give paths"),
    ],
    ids=["normalized", "flat", "channels", "missing", "empty", "number"],
)
def test_an_image_that_cannot_be_used_is_one_line(trained, images, said):
    store, spec = trained
    with pytest.raises(UserError, match=said):
        predict(load_run(spec, store), images)


def test_a_colour_image_of_another_size_is_fitted(trained):
    store, spec = trained
    run = load_run(spec, store)
    grey = Image.new("L", (40, 24), 200)
    assert prepare_images(run, grey.convert("RGB")).equal(prepare_images(run, grey))
    assert prepare_images(run, grey).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx", ".nir"])
def test_an_exported_student_answers_as_ours(trained, tmp_path, suffix):
    store, spec = trained
    run = load_run(spec, store)
    path = tmp_path / f"student{suffix}"
    exported = export(run.model, path, classes=run.classes)
    assert exported.same_classes == 1.0 and exported.largest_difference < 1e-3
    x = prepare_images(run, load_spec(spec.data).test.images[:64])
    with torch.no_grad():
        ours = run.model(x).mean(0)
    assert ours.std() > 0.1
    if suffix == ".nir":
        theirs = run_nir_file(path, x, run.model.T).mean(0)
    elif suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        theirs = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
        about = json.loads(session.get_modelmeta().custom_metadata_map["about"])
        assert about["classes"] == list(run.classes)
    else:
        code = f"""
            import sys, torch
            program = torch.export.load({str(path)!r})
            torch.manual_seed(0)
            print(program.module()(torch.rand(3, 1, 8, 8)).sum().item())
            assert not any(name.startswith("snnkd") for name in sys.modules)
        """
        torch.manual_seed(0)
        with torch.no_grad():
            expected = run.model(torch.rand(3, 1, 8, 8)).mean(0).sum()
        assert abs(float(run_python(code)) - float(expected)) < 1e-3
        theirs = torch.export.load(path).module()(x)
    # a potential at its threshold may fire in one program and not in the other
    agree = (theirs - ours).abs().amax(1) < 1e-3
    assert agree.float().mean() > 0.9


def test_a_file_can_normalize_images_itself(trained, tmp_path):
    store, spec = trained
    run = load_run(spec, store)
    export(run.model, tmp_path / "n.pt2", mean=run.mean, std=run.std)
    images = load_spec(spec.data).test.images[:8]
    with torch.no_grad():
        ours = run.model(prepare_images(run, images)).mean(0)
    theirs = torch.export.load(tmp_path / "n.pt2").module()(images.float() / 255)
    assert ((theirs - ours).abs().amax(1) < 1e-3).float().mean() > 0.8


@pytest.mark.parametrize("name", ["resnet20", "wrn16_2"])
def test_a_residual_network_goes_through_nir(tmp_path, name):
    torch.manual_seed(0)
    net = create_model(name, T=2, width=0.125, in_channels=1, image_size=8)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.2, 0.5)
            torch.nn.init.uniform_(module.bias, 0, 1)
    images = torch.rand(16, 1, 8, 8)
    with torch.no_grad():
        ours = net.eval()(images)
    assert ours.std(1).mean() > 1e-3  # the network answers
    exported = export(net, tmp_path / f"{name}.nir")
    assert exported.largest_difference < 1e-3
    theirs = run_nir_file(exported.path, images, 2)
    assert ((theirs - ours).abs().amax((0, 2)) < 1e-3).float().mean() > 0.9


def test_a_wrong_file_is_noticed(tmp_path):
    ours, theirs = torch.randn(5, 10), torch.randn(5, 10)
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="does not compute this network"):
        compare_logits(tmp_path / "x", "onnx", theirs, ours)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"neuron": "rate"}, "no soft reset"),
        ({"T": None}, "no time steps"),
        ({"neuron_args": {"v_reset": -0.1}}, "leak would go to v_reset"),
    ],
    ids=["soft", "ann", "reset"],
)
def test_what_nir_cannot_hold_is_one_line(options, said):
    arguments = {"T": 2, "width": 0.125, "in_channels": 1, "image_size": 8, **options}
    with pytest.raises(UserError, match=said):
        to_nir(create_model("resnet20", **arguments))


def test_max_pooling_has_no_node():
    net = create_model("vgg13", T=2, width=0.0625, in_channels=1, image_size=8)
    with pytest.raises(UserError, match="format='onnx'"):
        to_nir(net)


def test_missing_packages_are_named(monkeypatch, tmp_path):
    net = create_model("vgg11_sastc", T=2, width=0.0625, in_channels=1, image_size=8)
    for package, suffix in (("nir", "nir"), ("onnxruntime", "onnx")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=f'{package} is not installed: pip install "snnkd_nb'):
            export(net, tmp_path / f"x.{suffix}")


def test_a_folded_norm_without_weights():
    norm = torch.nn.BatchNorm2d(3, affine=False).eval()
    norm.running_var.uniform_(0.5, 2.0)
    x = torch.randn(2, 3, 4, 4)
    with warnings.catch_warnings(), torch.no_grad():
        torch.testing.assert_close(fold_norm(norm)(x), norm(x))


SHIPPED = sorted((root() / "results" / "weights").glob("*.safetensors"))


def test_shipped_weights_belong_to_stored_runs():
    cards = (root() / "results" / "weights" / "README.md").read_text()
    assert sum(path.stat().st_size for path in SHIPPED) <= 16 * 2**20
    assert len(SHIPPED) == cards.count("\n## ")
    for path in SHIPPED:
        record = Store().get(path.stem)
        assert sha256_of(path.read_bytes()) == record.weights["sha256"]
        assert f"## {path.stem}\n" in cards
        assert f"{record.metrics['acc_last']:.2f} %" in cards


def test_shipped_networks_load_and_answer_without_cache_and_data(tmp_path, monkeypatch):
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("SNNKD_DATA", str(tmp_path / "nothing"))
    for path in SHIPPED:
        run = load_run(path.stem)
        pixels = torch.randint(0, 256, (3, *run.shape[1:], 3), dtype=torch.uint8)
        answers = predict(run, list(pixels.numpy()))
        assert len(answers) == 3
        assert {answer.label for answer in answers} <= set(run.classes)
