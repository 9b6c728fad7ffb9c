"""Specs: every wrong value is refused where it is written, and ids are those of the stored results."""

import pickle

import pytest

import snnkd_nb.spec as spec_module
from snnkd_nb.core import UserError, sha256_of
from snnkd_nb.spec import (
    METHOD_REVISIONS,
    DataSpec,
    ModelSpec,
    OptimSpec,
    RunSpec,
    SearchSpec,
    method_names,
)

TEACHER = RunSpec(model=ModelSpec("resnet20"))
SEARCH = SearchSpec(teacher=TEACHER)
RATES = {"model": ModelSpec(T=2), "optim": OptimSpec(gradient="rate")}


@pytest.mark.parametrize(
    "make, arguments, message",
    [
        (DataSpec, {"label_noise": 1.5}, "label_noise = 1.5"),
        (DataSpec, {"shots": 0}, "no image would be left"),
        (DataSpec, {"args": [1]}, "dict of options"),
        (DataSpec, {"args": {"x": float("nan")}}, "not a finite number"),
        (DataSpec, {"args": {"x": object()}}, "can be recorded"),
        (ModelSpec, {"T": -1}, "T = -1"),
        (OptimSpec, {"gradient": "rates"}, "did you mean 'rate'"),
        (OptimSpec, {"milestones": 5}, "milestones = 5"),
        (OptimSpec, {"nesterov": "no"}, "True or False"),
        (OptimSpec, {"clip": 0}, "clip = 0"),
        (OptimSpec, {"nesterov": True, "momentum": 0}, "momentum above 0"),
        (RunSpec, {"optim": OptimSpec(gradient="rate")}, "no firing rates"),
        (RunSpec, {"data": "digits"}, "give a DataSpec"),
        (RunSpec, {"method": "kd", "teacher": "resnet20"}, "give a RunSpec"),
        (RunSpec, {"method_args": [1]}, "dict of options"),
        (RunSpec, {"method_args": {"variant": "code"}}, "is a field of the run itself"),
        (RunSpec, {"method": "tet", **RATES}, "rates have none"),
        (RunSpec, {"method_args": {"ce": "each"}, **RATES}, "rates have none"),
        (RunSpec, {"method": "none", "teacher": TEACHER}, "uses no teacher"),
        (RunSpec, {"method": "1e-1*tet", "teacher": TEACHER}, "uses no teacher"),
        (RunSpec, {"variant": "papers"}, "did you mean 'paper'"),
        (RunSpec, {"probes": {"stm": 3}}, "give a dict of its options"),
        (RunSpec, {"reference": TEACHER}, "give probes"),
        (SEARCH.replace, {"generations": 0}, "generations = 0"),
        (SEARCH.replace, {"teacher": RunSpec(model=ModelSpec(T=2))}, "under an ordinary network"),
        (SEARCH.replace, {"algorithm": "gaa"}, "did you mean 'ga'"),
        (SEARCH.replace, {"metric_args": 3}, "dict of options"),
    ],
)
def test_wrong_values_are_refused_in_one_line(make, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        make(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", [TEACHER, SEARCH, DataSpec(args={"frames": 4}), OptimSpec(lr=1)])
def test_specs_survive_copies(spec):
    assert pickle.loads(pickle.dumps(spec)) == spec == spec.replace()
    assert hash(spec) == hash(spec.replace())


def test_a_revision_changes_the_ids_of_its_method_alone(monkeypatch):
    runs = {
        (method, variant): RunSpec(method=method, variant=variant, teacher=TEACHER)
        for method in ("kd", "samd", "0.5*samd+kd", "ckdsnn")
        for variant in ("paper", "scaled", "code")
    }
    taught = RunSpec(method="kd", teacher=runs["samd", "paper"])
    with_revisions = {key: run.id for key, run in runs.items()}
    taught_id = taught.id
    monkeypatch.setattr("snnkd_nb.spec.METHOD_REVISIONS", {})
    changed = {key for key, run in runs.items() if run.id != with_revisions[key]}
    assert changed == {(m, "paper") for m in ("samd", "0.5*samd+kd", "ckdsnn")}
    assert taught.id != taught_id
    assert METHOD_REVISIONS == {"samd": 2, "ckdsnn": 2}


def test_method_names_drop_weights():
    assert method_names("kd+0.5*feature + 1e-3*samd") == ["kd", "feature", "samd"]


def test_require_has_its_old_name():
    with pytest.warns(DeprecationWarning, match="is now snnkd_nb.spec.require"):
        old = getattr(spec_module, "need")  # noqa: B009
    assert old is spec_module.require


def test_a_spec_that_names_its_rescaling_keeps_its_id():
    "With `rescale` given, the numbers did not change when equation 4 became the default."
    teacher = RunSpec(model=ModelSpec("resnet20"))
    given = RunSpec(method="samd", teacher=teacher, method_args={"rescale": "sample"})
    dotted = RunSpec(method="samd", teacher=teacher, method_args={"samd.rescale": "sample"})
    assert all(s.id.endswith(sha256_of(s.canonical())[:10]) for s in (given, dotted))
    default = RunSpec(method="samd", teacher=teacher)
    assert not default.id.endswith(sha256_of(default.canonical())[:10])
