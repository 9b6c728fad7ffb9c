"""The training loop beyond its notebook: precision, several processes, methods on foreign networks."""

import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import quiet
from torch import nn

from snnkd_nb.core import UserError
from snnkd_nb.losses.base import Method
from snnkd_nb.losses.zoo import create_distiller, list_distillers, register_method
from snnkd_nb.models.zoo import create_model
from snnkd_nb.spec import ModelSpec, OptimSpec, RunSpec
from snnkd_nb.store import Store
from snnkd_nb.training.job import run_train
from snnkd_nb.training.loop import (
    Distiller,
    NonFiniteLoss,
    create_optimizer,
    evaluate,
    fit,
    train_step,
    update_weights,
)


class Plain(nn.Sequential):
    "A network without batch statistics, so that two halves of a batch are exactly a batch."

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def small(T=2, **kw):
    return create_model("vgg11_sastc", T=T, width=0.0625, in_channels=1, image_size=8, **kw)


def test_labels_are_checked_on_a_device_that_is_not_read(digits):
    "A GPU's labels are not looked at, step by step; their range is known from the data. (`meta` stands for it here.)"
    with torch.device("meta"):
        d, x, y = Distiller(Plain()), torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)
    assert set(d(x, y)[0]) == {"ce"}
    for d.labels, says in (((0, 12), "num_classes=13"), ((-100, 9), "a label is -100")):
        with pytest.raises(UserError, match=says):
            d(x, y)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
    d = Distiller(net)
    with pytest.raises(UserError, match="num_classes=10"):
        fit(net, digits, d, epochs=1, batch_size=2000, on_event=quiet, device="cpu")
    assert d.labels == (0, 9)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_with_fp32_weights(digits, precision):
    torch.manual_seed(0)
    net = Plain()
    history = fit(net, digits, epochs=2, precision=precision, on_event=quiet, device="cpu")
    assert history.acc_last > 80 and all(p.dtype == torch.float32 for p in net.parameters())


def test_a_spiking_student_trains_in_bf16(digits):
    torch.manual_seed(0)
    student = create_model("resnet20", T=2, depth=0.34, in_channels=1, image_size=8)
    history = fit(
        student, digits, epochs=2, batch_size=32, precision="bf16", on_event=quiet, device="cpu"
    )
    assert history.acc_last > 50


def test_two_processes_train_as_one(digits, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        import sys, torch
        sys.path.insert(0, sys.argv[2])
        from test_training import Plain, quiet
        from snnkd_nb.data.images import load
        from snnkd_nb.training.loop import fit
        torch.manual_seed(0)
        net = Plain()
        history = fit(net, load("digits"), epochs=1, batch_size=64, on_event=quiet, device="cpu")
        if int(__import__("os").environ.get("RANK", 0)) == 0:
            torch.save({"net": net.state_dict(), "loss": history[-1]["loss"], "train_acc": history[-1]["train_acc"]}, sys.argv[1])
    """)
    )
    here = str(__import__("pathlib").Path(__file__).parent)
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    subprocess.run([sys.executable, script, one, here], check=True, timeout=120)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        script,
        two,
        here,
    ]
    r = subprocess.run(launch, capture_output=True, text=True, timeout=180)
    assert r.returncode == 0, r.stderr[-2000:]
    a, b = torch.load(one, weights_only=True), torch.load(two, weights_only=True)
    for k in a["net"]:
        torch.testing.assert_close(a["net"][k], b["net"][k], atol=1e-5, rtol=1e-4)
    assert abs(a["loss"] - b["loss"]) < 1e-4 and abs(a["train_acc"] - b["train_acc"]) < 1e-3


@pytest.mark.parametrize("method", [m for m in list_distillers() if m != "none"])
def test_every_method_teaches_a_student_and_spares_the_teacher(digits, method):
    torch.manual_seed(0)
    student, teacher = (
        create_model("resnet20", T=T, width=0.125, depth=0.34, in_channels=1, image_size=8)
        for T in (2, None)
    )
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    distiller = create_distiller(method, student, teacher)
    fit(
        student,
        digits,
        distiller,
        epochs=1,
        lr=0.01,
        on_event=quiet,
        device="cpu",
        weak_teacher="accept",
    )
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items()), (
        "statistics of the teacher moved"
    )
    assert all(p.grad is None for p in teacher.parameters()) and (
        distiller.teacher is None or not teacher.training
    )
    assert (distiller.teacher is None) == (method == "tet"), (
        "a teacher that no method needs is not run"
    )
    assert not any("teacher" in k for k in distiller.state_dict())


def test_compiled_networks_learn_the_same(digits):
    losses = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(0)
        torch._dynamo.reset()
        student, teacher = (
            create_model("resnet20", T=T, width=0.125, depth=0.34, in_channels=1, image_size=8)
            for T in (2, None)
        )
        history = fit(
            student,
            digits,
            create_distiller("kd+feature", student, teacher),
            epochs=1,
            lr=0.01,
            on_event=quiet,
            device="cpu",
            compile=backend,
            weak_teacher="accept",
        )
        losses.append(history[-1]["loss"])
    assert abs(losses[0] - losses[1]) < 1e-3 * losses[0]
    assert student._compiled_call_impl is None and teacher._compiled_call_impl is None
    by_path = create_distiller(
        "kd+feature", student, teacher, pairs=[("stage2.0.conv1", "stage2.0.conv1")]
    )
    torch._dynamo.reset()
    assert (
        fit(
            student,
            digits,
            by_path,
            epochs=1,
            lr=0.01,
            on_event=quiet,
            weak_teacher="accept",
            device="cpu",
            compile="aot_eager",
        )[-1]["feature"]
        > 0
    )
    with pytest.raises(UserError, match="aot_eager"):
        fit(student, digits, epochs=1, compile="aot_eagre", on_event=quiet)


def test_any_module_can_teach_by_module_path(digits):
    teacher = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 10)
    )
    student = small()
    distiller = create_distiller("kd+feature", student, teacher, pairs=[("stage1", "1")])
    terms, _ = distiller(*next(iter(digits.loader("train", 8))))
    assert set(terms) == {"ce", "kd", "feature"} and all(torch.isfinite(v) for v in terms.values())
    with pytest.raises(UserError, match="did you mean"):
        create_distiller("feature", student, teacher, pairs=[("stage11", "1")])


def test_a_method_of_ones_own(digits):
    class Sparse(Method):
        needs_teacher = False

        def __init__(self, student, teacher, variant="paper", at="stage1"):
            super().__init__(student, teacher, variant)
            self.student_features = (at,)

        def terms(self, batch):
            return {"sparse": batch.feats_s[self.student_features[0]].mean()}

    register_method("sparse", Sparse)
    student = small()
    terms, _ = create_distiller("0.5*sparse", student, at="stage2")(
        *next(iter(digits.loader("train", 4)))
    )
    assert set(terms) == {"ce", "sparse"}
    with pytest.raises(UserError, match="exists already"):
        register_method("sparse", Sparse)


def test_the_sum_of_the_terms_is_the_loss_in_the_history(digits):
    torch.manual_seed(0)
    student, teacher = (
        small(),
        create_model("vgg11_sastc", width=0.125, in_channels=1, image_size=8),
    )
    row = fit(
        student,
        digits,
        create_distiller("kd", student, teacher),
        epochs=1,
        on_event=quiet,
        weak_teacher="accept",
        device="cpu",
    )[-1]
    assert abs(row["loss"] - row["ce"] - row["kd"]) < 1e-6 * row["loss"] + 1e-6


def test_a_non_finite_loss_names_step_term_and_layer(digits):
    torch.manual_seed(0)
    net = Plain()
    net[3].weight.data[0, 0] = float("inf")
    with pytest.raises(
        NonFiniteLoss, match=r"'ce' is nan at epoch 1, step 1; first seen in layer student\.3"
    ):
        fit(net, digits, epochs=1, on_event=quiet, device="cpu")


def test_a_checkpoint_knows_method_and_options(digits, tmp_path):
    def stopped(event):
        if event["event"] == "epoch" and event["epoch"] == 1:
            raise KeyboardInterrupt

    def made(method="kd", width=0.1, **options):
        torch.manual_seed(0)
        return create_distiller(
            method,
            *(
                create_model("resnet20", T=T, width=w, depth=0.34, in_channels=1, image_size=8)
                for T, w in ((2, width), (None, 0.1))
            ),
            **options,
        )

    def epochs(d, path, on_event):
        seen = []
        fit(
            d.student,
            digits,
            d,
            epochs=2,
            on_event=lambda e: (
                seen.append(e["epoch"]) if e["event"] == "epoch" else None,
                on_event(e),
            ),
            device="cpu",
            checkpoint=path,
            weak_teacher="accept",
        )
        return seen

    for method, same, others in (
        ("kd", {"temp": 2.0}, ({"temp": 3.0}, {"temp": 2.0, "width": 0.2})),
        ("eskd", {"positions": [1]}, ({"positions": [0]},)),
    ):
        path, d = tmp_path / f"{method}.ckpt", made(method, **same)
        with pytest.raises(KeyboardInterrupt):
            epochs(d, path, stopped)
        kept = path.read_bytes()
        assert epochs(d, path, quiet) == [2]
        for other in others:
            path.write_bytes(kept)
            with pytest.warns(UserWarning, match="belongs to another training"):
                assert epochs(made(method, **other), path, quiet) == [1, 2]


def test_nothing_is_saved_from_a_run_that_blew_up(digits, tmp_path):
    with pytest.raises(NonFiniteLoss):
        fit(
            Plain(),
            digits,
            epochs=1,
            lr=1e38,
            on_event=quiet,
            device="cpu",
            checkpoint=tmp_path / "x.ckpt",
        )
    assert not list(tmp_path.iterdir())


def test_evaluation_does_not_depend_on_the_batch_size(digits):
    net = small().eval()
    assert len({evaluate(net, digits, batch_size=b) for b in (7, 64, 1000)}) == 1


def test_projections_train_with_the_student_and_stay_behind(digits):
    student, teacher = (
        small(),
        create_model("vgg11_sastc", width=0.125, in_channels=1, image_size=8),
    )
    distiller = create_distiller("feature", student, teacher)
    before = [p.clone() for p in distiller.methods.parameters()]
    fit(student, digits, distiller, epochs=1, on_event=quiet, device="cpu", weak_teacher="accept")
    assert any(not torch.equal(a, b) for a, b in zip(before, distiller.methods.parameters()))
    assert not any(k.startswith("methods") for k in student.state_dict())


def test_fit_names_wrong_arguments(digits):
    net = Plain()
    with pytest.raises(UserError, match="did you mean 'epochs'"):
        fit(net, digits, epoch=3)
    with pytest.raises(UserError, match="did you mean 'cuda'"):
        fit(net, digits, device="cud", epochs=1)
    with pytest.raises(UserError, match=r"load\('digits'\)"):
        fit(net, "digits", epochs=1)
    with pytest.raises(UserError, match="another student"):
        fit(net, digits, Distiller(Plain()), epochs=1)


def test_fit_names_what_rates_exclude(digits):
    options = {"epochs": 1, "gradient": "rate"}
    with pytest.raises(UserError, match="exclude each other"):
        fit(small(), digits, compile="eager", **options)
    with pytest.raises(UserError, match="no firing rates"):
        fit(small(T=None), digits, **options)
    net = small()
    with pytest.raises(UserError, match="ce = 'each' with gradient = 'rate'"):
        fit(net, digits, Distiller(net, ce="each"), **options)


def test_fit_notes_the_range_of_the_labels(digits):
    net = Plain()
    distiller = Distiller(net)
    fit(net, digits, distiller, epochs=1, on_event=quiet, device="cpu")
    assert distiller.labels == (0, 9)


def test_a_training_step_ignores_old_gradients(digits):
    "Gradients that a caller left in the network do not enter the step."
    x, y = next(iter(digits.loader("train", 32)))
    weights = []
    for has_old_gradients in (False, True):
        torch.manual_seed(0)
        distiller = Distiller(Plain())
        if has_old_gradients:
            distiller(x, y)[0]["ce"].backward()
        train_step(distiller, create_optimizer(distiller, OptimSpec()), x, y)
        assert all(p.grad is None for p in distiller.parameters())
        weights.append(distiller.student[1].weight.detach())
    assert torch.equal(*weights)


def test_clipping_needs_a_module():
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(UserError, match="clipped=module"):
        update_weights(weight.sum(), optimizer, clip=1.0)
    update_weights(weight.sum(), optimizer)
    assert torch.allclose(weight, torch.full((3,), 0.9))


def test_a_wrong_run_is_refused_before_its_teacher_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path))
    store = Store(tmp_path / "runs")
    model = ModelSpec("resnet20", width=0.2, args={"depth": 0.34})
    run = RunSpec(model=model, optim=OptimSpec(epochs=1), method="kd", teacher=RunSpec(model=model))
    with pytest.raises(UserError, match="did you mean 'kd'"):
        run_train(run.replace(method="kdd"), store)
    with pytest.raises(UserError, match="lam"):
        run_train(run.replace(method="samd", method_args={"lam": 0.2}), store)
    with pytest.raises(UserError, match="give reference"):
        run_train(run.replace(method="none", teacher=None, probes={"stm": {}}), store)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        run_train(run, store)
    assert not store.ids()
