"A stored result is shown only if what is behind its names is what it was trained with."

import functools
import sys

import numpy as np
import pytest
import torch
from helpers import check_one_line
from PIL import Image

from snnkd_nb import spec as specs
from snnkd_nb.core import UserError, source_digest
from snnkd_nb.data import images
from snnkd_nb.data import images as image_sets
from snnkd_nb.data.decode import Source, cache_folder
from snnkd_nb.data.images import import_plugins, load, load_spec
from snnkd_nb.losses import zoo as methods
from snnkd_nb.models.blocks import MODELS
from snnkd_nb.models.resnet import resnet20
from snnkd_nb.neurons import lif
from snnkd_nb.spec import DataSpec, ModelSpec, OptimSpec, RunSpec, SearchSpec
from snnkd_nb.store import Store, dump, parse_record
from snnkd_nb.training.job import check_unchanged, collect_sources, find_changes, run_train

TINY = ModelSpec("resnet20", 1, 0.1, args={"depth": 0.34})
SHORT = OptimSpec(epochs=1, batch_size=20, lr=0.01)
DIGITS = DataSpec(subset=40, val=0.0)

NETWORK = """
from torch import nn
from snnkd_nb.models.blocks import register_model
from snnkd_nb.models.resnet import resnet20
{helper}

@register_model("mine", "nowhere")
def my_net(**options):
    "A network of mine."
    options["width"] = {width}
    return resnet20(depth=0.34, **options)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path))
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    images._load_spec.cache_clear()
    loaded = set(sys.modules)
    known = set(MODELS), set(methods._methods), set(image_sets.SOURCES)
    yield tmp_path
    for name in set(sys.modules) - loaded:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            forget(name)
    for table, before in zip((MODELS, methods._methods, image_sets.SOURCES), known, strict=True):
        for name in set(table) - before:
            del table[name]


def forget(name):
    "What a new process would not have."
    sys.modules.pop(name, None)
    image_sets._digests_at_import.pop(name, None)


def write_plugin(place, width=0.1, helper="", name="mine"):
    path = place / f"{name}.py"
    path.write_text(NETWORK.format(width=width, helper=helper))
    forget(name)
    import_plugins([str(path)])
    return path


# plug-ins


def test_an_edited_network_is_not_shown_with_the_old_result(place):
    store = Store()
    run = RunSpec(DIGITS, ModelSpec("my_net", 1), SHORT)
    write_plugin(place)
    record = run_train(run, store)
    assert run_train(run, store).weights == record.weights
    write_plugin(place, width=0.2)
    with pytest.raises(UserError) as error:
        run_train(run, store)
    check_one_line(error, run.id, "model my_net", "delete", str(store.path(run.id)))
    store.path(run.id).unlink()
    assert run_train(run, store).metrics["params"] > record.metrics["params"]


def test_an_edited_teacher_is_not_used_with_the_old_weights(place):
    store = Store()
    write_plugin(place)
    teacher = RunSpec(DIGITS, ModelSpec("my_net", None), SHORT)
    run_train(teacher, store, weights=True)
    write_plugin(place, helper="# another line")
    run = RunSpec(DIGITS, TINY, SHORT, "kd", teacher=teacher)
    with pytest.raises(UserError) as error:
        run_train(run, store, weak_teacher="accept")
    check_one_line(error, teacher.id, "model my_net")


def test_a_helper_of_the_plugin_counts(place):
    (place / "my_helper.py").write_text("FACTOR = 1\n")
    write_plugin(place, helper="from my_helper import FACTOR\nimport my_helper")
    first = source_digest(MODELS["my_net"]["make"])
    (place / "my_helper.py").write_text("FACTOR = 2\n")
    assert source_digest(MODELS["my_net"]["make"]) != first


def test_a_plugin_that_changed_under_a_running_process_is_refused(place):
    path = write_plugin(place)
    import_plugins([str(path)])
    path.write_text(path.read_text() + "\n# edited\n")
    with pytest.raises(UserError) as error:
        import_plugins([str(path)])
    check_one_line(error, "mine.py", "has changed")


def test_a_plugin_with_a_taken_name_is_refused(place):
    other = place / "other"
    other.mkdir()
    write_plugin(place)
    (other / "mine.py").write_text("")
    with pytest.raises(UserError, match="loaded already"):
        import_plugins([str(other / "mine.py")])
    (place / "json.py").write_text("")
    with pytest.raises(UserError, match="loaded already"):
        import_plugins([str(place / "json.py")])


def test_a_checkpoint_of_other_code_is_not_continued(place):
    from snnkd_nb.training.job import _checkpoint_path

    run = RunSpec(DIGITS, ModelSpec("my_net", 1), SHORT)
    write_plugin(place)
    before = _checkpoint_path(run)
    write_plugin(place, width=0.2)
    assert _checkpoint_path(run) != before
    own = RunSpec(DIGITS, TINY, SHORT)
    assert _checkpoint_path(own).name == f"{own.id}.ckpt"


def test_methods_and_neurons_of_the_user_have_sources(place, monkeypatch):
    class Mine(methods.method_class("kd")):
        pass

    monkeypatch.setitem(methods._methods, "mine", Mine)
    monkeypatch.setitem(lif.NEURONS, "mine", {"decay": 0.3})
    run = RunSpec(DIGITS, TINY.replace(neuron="mine"), SHORT, "mine", teacher=RunSpec(DIGITS))
    first = collect_sources(run)
    assert set(first) == {"method mine", "neuron mine"}
    monkeypatch.setitem(lif.NEURONS, "mine", {"decay": 0.4})
    assert collect_sources(run)["neuron mine"] != first["neuron mine"]
    assert "teacher's model my_net" in collect_sources_of_teacher(place)


def collect_sources_of_teacher(place):
    write_plugin(place)
    teacher = RunSpec(DIGITS, ModelSpec("my_net", None), SHORT)
    return collect_sources(RunSpec(DIGITS, TINY, SHORT, "kd", teacher=teacher))


def test_what_comes_with_the_package_has_no_source():
    teacher = RunSpec(DIGITS, ModelSpec("resnet18"))
    run = RunSpec(
        DataSpec("events:digits"),
        TINY,
        SHORT,
        "kd+0.5*feature",
        teacher=teacher,
        probes={"stm": {}},
    )
    assert collect_sources(run) == {}
    assert collect_sources(SearchSpec(DataSpec(), teacher)) == {}
    assert source_digest(resnet20) == source_digest(functools.partial(resnet20)) == ""
    assert source_digest(torch.relu) == source_digest(print) == ""


def test_a_network_that_replaces_one_of_ours_is_the_users(place, monkeypatch):
    monkeypatch.setitem(
        MODELS,
        "resnet20",
        MODELS["resnet20"] | {"make": test_an_edited_network_is_not_shown_with_the_old_result},
    )
    assert "model resnet20" in collect_sources(RunSpec(DIGITS, TINY, SHORT))


# data


def paint(folder, value):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(4):
        image = np.full((8, 8), value + 10 * i, np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")


def pets(place):
    for split in ("train", "test"):
        for label, value in (("cat", 10), ("dog", 150)):
            paint(place / "pets" / split / label, value)
    return DataSpec(f"folder:{place / 'pets'}", val=0.0)


def test_changed_images_are_not_shown_with_the_old_result(place):
    data, store = pets(place), Store()
    run = RunSpec(data, TINY, SHORT)
    run_train(run, store)
    run_train(run, store)
    paint(place / "pets" / "train" / "cat", 60)
    with pytest.raises(UserError) as error:
        run_train(run, store)
    check_one_line(error, run.id, "images or labels of folder:")


def test_data_that_are_not_here_stop_nobody(place, monkeypatch):
    data, store = pets(place), Store()
    record = run_train(RunSpec(data, TINY, SHORT), store)
    (place / "pets").rename(place / "moved")
    images._load_spec.cache_clear()
    assert find_changes(record, store) == []


def test_files_that_change_within_a_process_are_read_again(place):
    data = pets(place)
    before = load_spec(data)
    assert load_spec(data) is before
    paint(place / "pets" / "train" / "cat", 60)
    after = load_spec(data)
    assert after.fingerprint != before.fingerprint
    assert int(after.train.images.min()) == 60


def test_images_that_are_changed_in_place_have_another_fingerprint(place):
    data = load("digits")
    before = data.fingerprint
    data.train.images[0, 0, 0, 0] += 1
    assert data.fingerprint != before
    data.train.images[0, 0, 0, 0] -= 1
    assert data.fingerprint == before


def test_a_cached_data_set_that_somebody_changed_is_loaded_again(place):
    first = load_spec(DIGITS)
    fingerprint = first.fingerprint
    first.train.labels[:] = 0
    again = load_spec(DIGITS)
    assert again is not first
    assert again.fingerprint == fingerprint
    assert len(set(again.train.labels.tolist())) == 10


def test_an_edited_reader_has_another_cache(place, monkeypatch):
    def read():
        return ["a"], {}

    source = Source("mine", "v1", read)
    before = cache_folder(source, None)
    monkeypatch.setattr("snnkd_nb.data.decode.source_digest", lambda thing: "another code")
    assert cache_folder(source, None) != before
    monkeypatch.undo()
    assert source_digest(read) != ""
    assert source_digest(image_sets._read_digits) == ""


# weights


def test_a_file_of_weights_counts_by_its_content(place):
    path = place / "weights.bin"
    path.write_bytes(b"one")
    run = RunSpec(DIGITS, TINY.replace(T=None, args={"weights": str(path)}), SHORT)
    first = collect_sources(run)
    path.write_bytes(b"two")
    second = collect_sources(run)
    assert set(first) == set(second) == {f"weights {path}"}
    assert first != second


def test_another_teacher_under_the_same_name_is_noticed(place):
    store = Store()
    teacher = RunSpec(DIGITS, TINY.replace(T=None), SHORT)
    run = RunSpec(DIGITS, TINY, SHORT, "kd", teacher=teacher)
    record = run_train(run, store, weak_teacher="accept")
    check_unchanged(record, store)
    old = store.get(teacher)
    other = parse_record(dump(old))
    other.weights["sha256"] = "0" * 64
    store.put(other, replace=True)
    with pytest.raises(UserError) as error:
        run_train(run, store)
    check_one_line(error, "weights of the teacher")


# revisions


def test_a_revision_is_part_of_the_id(monkeypatch):
    teacher = RunSpec(DIGITS, ModelSpec("resnet18"))
    run = RunSpec(DIGITS, TINY, SHORT, "kd", teacher=teacher)
    ann = RunSpec(DIGITS, ModelSpec("resnet20"), SHORT)
    search = SearchSpec(DIGITS, teacher)
    before = [s.id for s in (run, ann, search)]

    def ids(table, name, number):
        monkeypatch.setitem(getattr(specs, table), name, number)
        found = [RunSpec.from_dict(specs.to_dict(s)).id for s in (run, ann)]
        found.append(SearchSpec.from_dict(specs.to_dict(search)).id)
        monkeypatch.delitem(getattr(specs, table), name)
        return [a != b for a, b in zip(before, found, strict=True)]

    for table, name in (
        ("METHOD_REVISIONS", "kd"),
        ("MODEL_REVISIONS", "resnet20"),
        ("NEURON_REVISIONS", "tet"),
    ):
        assert ids(table, name, 1) == [False] * 3
    assert ids("METHOD_REVISIONS", "kd", 2) == [True, False, False]
    assert ids("MODEL_REVISIONS", "resnet20", 2) == [True, True, False]
    assert ids("MODEL_REVISIONS", "resnet18", 2) == [True, False, True]  # of the teacher
    assert ids("NEURON_REVISIONS", "tet", 2) == [True, False, False]  # an ANN has no neuron
    assert ids("NEURON_REVISIONS", "dsas", 2) == [False, False, True]
    different = dict.fromkeys((2, 3), "")
    for number in different:
        monkeypatch.setitem(specs.MODEL_REVISIONS, "resnet20", number)
        different[number] = RunSpec.from_dict(specs.to_dict(run)).id
    assert len(set(different.values())) == 2
