"`fit` leaves the modes that the user has set, and uses the whole of the argument `device`."

import copy

import pytest
import torch
from torch import nn

from snnkd_nb.core import UserError
from snnkd_nb.data.images import load, subset
from snnkd_nb.losses.base import Distiller
from snnkd_nb.losses.zoo import create_distiller
from snnkd_nb.models.zoo import create_model
from snnkd_nb.training import loop
from snnkd_nb.training.loop import find_kept_in_eval, fit, parse_device


@pytest.fixture(scope="module")
def data():
    return subset(load("digits"), 60)


def network(**options):
    torch.manual_seed(0)
    return create_model(
        "resnet20", 10, in_channels=1, image_size=8, width=0.25, depth=0.34, **options
    )


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def freeze(norm):
    norm.eval()
    norm.requires_grad_(False)


def states(modules):
    return [{name: value.clone() for name, value in m.state_dict().items()} for m in modules]


def equal(before, after):
    return [all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(before, after, strict=True)]


def train(student, data, **options):
    return fit(student, data, epochs=2, lr=0.05, batch_size=20, on_event=len, **options)


# modes


@pytest.mark.parametrize("T", [None, 2])
def test_frozen_batch_norms_stay_frozen(data, T):
    student = network(T=T)
    for norm in norms(student):
        freeze(norm)
    before = states(norms(student))
    train(student, data)
    assert all(equal(before, states(norms(student))))
    assert not any(norm.training for norm in norms(student))
    assert student.training


def test_a_loaded_student_with_frozen_batch_norms_keeps_them(data):
    student = network().eval()  # as a function that loads a network returns it
    freeze(norms(student)[0])
    before = states(norms(student))
    train(student, data)
    assert equal(before, states(norms(student))) == [True] + [False] * (len(before) - 1)


def test_statistics_of_a_norm_in_eval_mode_do_not_move(data):
    student = network()
    norms(student)[1].eval()
    before = states(norms(student))
    train(student, data)
    moved = [
        not torch.equal(b["running_mean"], norm.running_mean)
        for b, norm in zip(before, norms(student), strict=True)
    ]
    assert moved == [True, False] + [True] * (len(before) - 2)


def test_dropout_in_eval_mode_stays_off(data):
    seen = []

    class Watched(nn.Dropout):
        def forward(self, x):
            if torch.is_grad_enabled():
                seen.append(self.training)
            return super().forward(x)

    for mode in (True, False):
        student = nn.Sequential(nn.Flatten(), Watched(0.5), nn.Linear(64, 10))
        student[1].train(mode)
        seen.clear()
        train(student, data)
        assert set(seen) == {mode}


def test_a_student_in_eval_mode_is_trained(data):
    student = network().eval()
    before = states(norms(student))
    train(student, data)
    assert not any(equal(before, states(norms(student))))


def test_parts_of_a_method_stay_in_eval_mode(data):
    teacher = network()
    student = network(T=2)
    distiller = create_distiller("feature", student, copy.deepcopy(teacher))
    for module in distiller.methods[0].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    kept = find_kept_in_eval(distiller.methods[0])
    assert kept
    before = [module.running_mean.clone() for module in kept]
    train(student, data, distiller=distiller, weak_teacher="accept")
    assert all(torch.equal(b, module.running_mean) for b, module in zip(before, kept, strict=True))
    assert not any(module.training for module in kept)


# devices


@pytest.mark.parametrize(
    "device", ["cuda:x", "cuda:", "cuda:-1", "gpu", "", 0, 7, "cpu:1", "cpu:x"]
)
def test_wrong_devices_are_refused(data, monkeypatch, device):
    monkeypatch.setattr(loop, "count_devices", lambda kind: 2 if kind == "cuda" else 1)
    student = network()
    with pytest.raises(UserError) as error:
        train(student, data, device=device)
    text = str(error.value)
    assert "\n" not in text and "device" in text and str(device) in text


@pytest.mark.parametrize("device", ["cuda:7", torch.device("cuda", 7)])
def test_a_device_beyond_the_last_is_refused(data, monkeypatch, device):
    monkeypatch.setattr(loop, "count_devices", lambda kind: 2)
    with pytest.raises(UserError, match="cuda:7.*cuda:0 to cuda:1"):
        train(network(), data, device=device)


def test_a_kind_that_is_not_there_is_refused(data, monkeypatch):
    monkeypatch.setattr(loop, "count_devices", lambda kind: 0)
    with pytest.raises(UserError, match="finds no cuda"):
        train(network(), data, device="cuda:0")


def test_the_number_of_the_device_is_used(data, monkeypatch):
    monkeypatch.setattr(loop, "count_devices", lambda kind: 2)
    assert parse_device("cuda:1") == torch.device("cuda", 1)
    assert parse_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert parse_device("cpu:0") == parse_device("cpu") == torch.device("cpu")

    class Moved(Exception):
        pass

    def note_device(self, device):
        raise Moved(str(device))

    monkeypatch.setattr(Distiller, "to", note_device)
    with pytest.raises(Moved, match="cuda:1"):
        train(network(), data, device="cuda:1")


def test_a_process_of_several_has_its_own_device(monkeypatch):
    import accelerate

    class OneOfTwo:
        device = torch.device("cuda", 1)
        num_processes = 2

    monkeypatch.setattr(accelerate, "Accelerator", lambda cpu: OneOfTwo)
    for device in (None, torch.device("cuda"), torch.device("cuda", 1)):
        assert loop._create_accelerator(device)[1] == torch.device("cuda", 1)
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        with pytest.raises(UserError, match="one of 2 processes"):
            loop._create_accelerator(device)


def test_cpu_after_cpu(data):
    "The accelerator of a process is shared; the second call must get its device, too."
    for device in ("cpu", None, "cpu:0"):
        student = network()
        train(student, data, device=device)
        assert next(student.parameters()).device.type == "cpu" or device is None
