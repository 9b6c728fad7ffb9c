"""What all losses share: the option `layers` and its old names, checks of options, errors in one line."""

import pytest
import torch
from torch import nn

from snnkd_nb.core import UserError
from snnkd_nb.losses.base import (
    Distiller,
    check_same_classes,
    feature_shapes,
    label_range,
    layers_from_lists,
    layers_from_pairs,
    layers_from_stage,
    read_layer_pair,
    read_layer_pairs,
    read_layers,
)
from snnkd_nb.losses.baselines import TET
from snnkd_nb.losses.ckdsnn import CKDSNN, SAMD, nld_loss
from snnkd_nb.losses.eskd import (
    ESKD,
    HybridNet,
    alpha_at,
    check_alpha,
    compute_betas,
    create_hybrids,
)
from snnkd_nb.losses.kd import Feature
from snnkd_nb.losses.maps import cam, choose_classes, class_gradients, isi_sam
from snnkd_nb.losses.sastc import SASTC, Calibration
from snnkd_nb.losses.zoo import create_distiller, parse_methods
from snnkd_nb.models.zoo import create_model


def net(T=None, name="resnet20", width=0.125, **options):
    return create_model(name, T=T, width=width, image_size=8, **options)


def images():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)


def error_of(function, *args, **kw):
    with pytest.raises(UserError) as error:
        function(*args, **kw)
    assert "\n" not in str(error.value)
    return str(error.value)


# the option `layers`

TWO_PAIRS = {"student": ["stage1", "stage2"], "teacher": ["stage1", "stage3"]}
OLD_AND_NEW = [
    ("feature", {"pairs": [("stage1", "stage1"), ("stage2", "stage3")]}, {"layers": TWO_PAIRS}),
    ("eskd", {"pairs": [("stage1", "stage1")]}, {"layers": "stage1"}),
    ("samd", {"stage": "stage1"}, {"layers": "stage1"}),
    ("ckdsnn", {"stage": ["stage1", "stage2"]}, {"layers": {"student": "stage1", "teacher": "stage2"}}),
    ("kdsnn", {"stage": "stage2"}, {"layers": {"student": "stage2", "teacher": "stage2"}}),
    ("bkd", {"stage": ("stage1", "stage2")}, {"layers": {"student": "stage1", "teacher": ["stage2"]}}),
    ("e2kd", {"stage": "stage2"}, {"layers": "stage2"}),
    ("sastc", {"student_layers": ["stage1"], "teacher_layers": ["stage2"], "batch_size": 4},
     {"layers": {"student": "stage1", "teacher": "stage2"}, "batch_size": 4}),
    ("sastc", {"teacher_layers": ["stage2"], "batch_size": 4},
     {"layers": {"teacher": "stage2"}, "batch_size": 4}),
]  # fmt: skip


@pytest.mark.parametrize("method, old, new", OLD_AND_NEW)
def test_old_names_of_layers_give_the_same_numbers_and_a_warning(method, old, new):
    x, y = images()
    found = []
    for options in (old, new):
        torch.manual_seed(0)
        student, teacher = net(T=2), net(width=0.25)
        if options is old:
            with pytest.warns(DeprecationWarning, match="layers="):
                distiller = create_distiller(method, student, teacher, **options)
        else:
            distiller = create_distiller(method, student, teacher, **options)
        torch.manual_seed(1)
        found.append((distiller(x, y)[0], distiller.student_features, distiller.teacher_features))
    (old_terms, *old_names), (new_terms, *new_names) = found
    assert old_names == new_names
    assert list(old_terms) == list(new_terms)
    assert all(old_terms[name].equal(new_terms[name]) for name in old_terms)


@pytest.mark.parametrize(
    "method, old",
    [
        ("feature", {"pairs": [("stage1", "stage1")]}),
        ("samd", {"stage": "stage1"}),
        ("sastc", {"student_layers": ["stage1"]}),
    ],
)
def test_layers_and_an_old_name_together_are_an_error(method, old):
    text = error_of(create_distiller, method, net(T=2), net(), layers="stage1", **old)
    assert "both given" in text


@pytest.mark.parametrize(
    "layers", [5, [("stage1", "stage1")], {"studnet": "stage1"}, {"student": []}, {"teacher": [1]}]
)
def test_layers_of_another_form_are_an_error(layers):
    assert "layers" in error_of(read_layers, layers)


def test_layers_are_counted():
    assert "as many layers" in error_of(read_layer_pairs, {"student": ["a", "b"], "teacher": ["c"]})
    assert "as many layers" in error_of(read_layer_pairs, {"student": ["a"]})
    assert "one layer" in error_of(read_layer_pair, {"student": ["a", "b"]})


@pytest.mark.parametrize(
    "translate, old",
    [
        (layers_from_pairs, (5,)),
        (layers_from_pairs, (["stage1"],)),
        (layers_from_pairs, (("stage1", "stage1"),)),
        (layers_from_stage, (("a", "b", "c"),)),
        (layers_from_stage, (5,)),
        (layers_from_lists, ("stage1", None)),
        (layers_from_lists, (None, [])),
    ],
)
def test_old_options_of_another_form_are_an_error(translate, old):
    assert "give" in error_of(translate, None, *old)


# labels and features


def test_classes_of_student_teacher_and_labels():
    zeros = torch.zeros
    assert "3 classes and the student 10" in error_of(
        check_same_classes, zeros(2, 10), zeros(2, 3), zeros(2)
    )
    assert "num_classes=8" in error_of(check_same_classes, zeros(2, 3), None, torch.tensor([7, 0]))
    assert "a label is -1" in error_of(check_same_classes, zeros(2, 3), None, torch.tensor([-1, 0]))


def test_labels_on_another_device_are_not_read():
    logits = torch.zeros(2, 3, device="meta")
    labels = torch.zeros(2, device="meta")
    assert label_range(labels) is None
    assert label_range([1, 2]) is None
    check_same_classes(logits, None, labels)
    assert "num_classes=8" in error_of(check_same_classes, logits, None, labels, (0, 7))
    assert "a label is -1" in error_of(check_same_classes, logits, None, labels, (-1, 2))


def test_a_feature_that_is_no_tensor():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.LSTM(24, 10, batch_first=True)

        def forward(self, x):
            return self.rows(x.flatten(1, 2).transpose(1, 2))[0].mean(1)

    assert "a tuple" in error_of(feature_shapes, Recurrent(), ["rows"], (3, 8, 8))


# options of the methods

BAD_OPTIONS = [
    (Feature, {"weight": -1}, "weight = -1"),
    (Feature, {"pairs": 5}, "pairs = 5"),
    (Feature, {"pairs": ["stage1"]}, "pairs = "),
    (Feature, {"pairs": ("stage1", "stage1")}, "pairs = "),
    (Feature, {"pairs": [("stage1", 1)]}, "pairs = "),
    (Feature, {"layers": {"student": "stage1", "teacher": "head"}}, "puts out no map"),
    (SAMD, {"temp": 0}, "temp = 0"),
    (SAMD, {"temp": -1}, "temp = -1"),
    (SAMD, {"classes": "best"}, "choice of classes 'best'"),
    (SAMD, {"rescale": "all"}, "rescaling 'all'"),
    (CKDSNN, {"tau": 0}, "tau = 0"),
    (CKDSNN, {"beta": -1}, "beta = -1"),
    (CKDSNN, {"mix": "both"}, "unknown mix 'both'"),
    (CKDSNN, {"lam": 2, "variant": "code"}, "lam = 2"),
    (CKDSNN, {"lam": True}, "lam = True"),
    (CKDSNN, {"decay": -1}, "decay = -1"),
    (CKDSNN, {"squared": "no"}, "squared = 'no'"),
    (SASTC, {"beta": [0.1, -1]}, "beta = -1"),
    (SASTC, {"beta": []}, "beta = "),
    (SASTC, {"norm": "steps"}, "norm 'steps'"),
    (SASTC, {"pool": "min"}, "pool 'min'"),
    (SASTC, {"route": "student"}, "route 'student'"),
    (SASTC, {"reduction": "total"}, "reduction 'total'"),
    (ESKD, {"temp": 0}, "temp = 0"),
    (TET, {"lam": -1}, "lam = -1"),
]


@pytest.mark.parametrize("method, options, text", BAD_OPTIONS)
def test_wrong_options_are_one_line(method, options, text):
    assert text in error_of(method, net(T=2), net(), **options)


def test_networks_that_do_not_fit():
    student, teacher = net(T=2), net()
    vgg_student = net(T=2, name="vgg11_sastc")
    assert "map of 1×1" in error_of(SAMD, vgg_student, teacher)
    assert "no interval" in error_of(SAMD, net(T=1), teacher, student_map="isi")
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    assert "no named stages" in error_of(SASTC, student, plain)
    assert "puts out" in error_of(SASTC, student, plain, layers={"teacher": ["2"]})
    assert "spiking network" in error_of(SASTC, student, student)
    with pytest.raises(UserError, match="the paper uses 2"):
        nld_loss(torch.zeros(2, 3), torch.zeros(2, 3), temp=0)


def test_one_image_on_maps_of_one_pixel():
    by_step = Calibration([4], [6], 1, norm="step")
    students, teachers = [torch.rand(3, 1, 4, 2, 2)], [torch.rand(1, 6, 1, 1)]
    assert "two images or more" in error_of(by_step, students, teachers)
    assert by_step.eval()(students, teachers).isfinite()
    over_all_steps = Calibration([4], [6], 1)
    assert over_all_steps([torch.rand(3, 1, 4, 1, 1)], teachers).isfinite()


def test_maps_check_classes_and_decay():
    f, weight = torch.randn(2, 3, 4, 4), torch.randn(5, 3)
    assert "out of range" in error_of(cam, f, weight, torch.tensor([-1, 0]))
    assert "choice of classes 'wrong'" in error_of(choose_classes, "wrong", None, None)
    assert "above 0" in error_of(isi_sam, torch.rand(2, 2, 3, 4, 4), -1.0)
    teacher = net().eval()
    feature = teacher(images()[0], features=True)[1]["stage1"].detach()
    too_large = torch.full((4,), 10)
    assert "out of range" in error_of(
        class_gradients, teacher, "stage1", feature, too_large, (3, 8, 8)
    )


@pytest.mark.parametrize("alpha", [1.5, "rise", True, None])
def test_wrong_alpha(alpha):
    error_of(check_alpha, alpha)


@pytest.mark.parametrize("beta", [[1.0], -1, float("inf"), "even"])
def test_wrong_beta(beta):
    error_of(compute_betas, beta, 3)


def test_weights_of_hybrid_models():
    assert "begin_epoch" in error_of(alpha_at, "increase")
    assert alpha_at("decrease", 0, 1) == 1
    assert sum(compute_betas("uniform", 4)) == 1
    assert compute_betas("decay", 1) == [0.5]
    assert compute_betas("uniform", 0) == compute_betas("decay", 0) == []
    assert compute_betas(torch.tensor([0.25, 0.5]), 2, [1, 0]) == [0.5, 0.25]
    assert compute_betas("decay", 2, [1, 0]) == compute_betas("decay", 2)


@pytest.mark.parametrize(
    "options",
    [
        {"positions": [3]},
        {"positions": "head"},
        {"pairs": [("stage1", "stage9")]},
        {"pairs": ["stage1"]},
        {"pairs": [("stage11", "stage1")]},
        {"pairs": [("head", "stage1")]},
        {"adapter": "identity"},
    ],
)
def test_hybrid_models_that_cannot_be(options):
    error_of(create_hybrids, net(T=2), net(width=0.25), **options)


def test_hybrid_models_follow_their_teacher():
    student, teacher = net(T=2), net(width=0.25)
    error_of(create_hybrids, nn.Conv2d(3, 3, 3), teacher)
    method = ESKD(student, teacher, positions=["H", 1])
    assert "M0" in error_of(HybridNet, student, method.hybrids, "M0")
    hybrid = HybridNet(student, method.hybrids, "MH").eval()
    hybrid.double()
    assert next(teacher.parameters()).dtype == torch.float64
    assert not Distiller(student, teacher, [(1.0, method)]).train().teacher.training


@pytest.mark.parametrize("text", ["nan*kd", "*kd", "-1*kd", "x*kd"])
def test_wrong_weights_of_methods(text):
    assert "write a number" in error_of(parse_methods, text)


def test_old_names_of_the_losses_serve_for_one_release():
    from snnkd_nb.losses import base, ckdsnn, eskd, kd, maps, sastc
    from snnkd_nb.metrics import statistics

    for module, old, new in (
        (kd, "positive", base.check_positive),
        (kd, "projection", kd.create_projection),
        (ckdsnn, "one_of", base.check_choice),
        (maps, "glance", maps.probe_feature),
        (sastc, "WORTH", sastc.MIN_ELEMENTS),
        (eskd, "hybrids_for", eskd.create_hybrids),
        (statistics, "kendall", statistics.kendall_tau),
    ):
        with pytest.warns(DeprecationWarning):
            assert getattr(module, old) is new
    student, teacher = net(T=2), net()
    with pytest.warns(DeprecationWarning, match="run_networks"):
        assert Distiller(student, teacher).look(*images()).logits_t is not None
