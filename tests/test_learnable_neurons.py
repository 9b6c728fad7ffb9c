"Numbers of neurons that are tensors: read at every call, trained by the reference, or refused."

import itertools
import warnings

import pytest
import torch
from helpers import check_one_line
from torch import nn

from snnkd_nb.core import UserError
from snnkd_nb.data.images import load, subset
from snnkd_nb.kernels.lif import lif, lif_reference
from snnkd_nb.kernels.surrogate import ATan, Sigmoid, Triangle
from snnkd_nb.losses.zoo import create_distiller
from snnkd_nb.metrics.likeness import Composable
from snnkd_nb.models.spikformer import attention_activation
from snnkd_nb.models.zoo import create_model
from snnkd_nb.neurons.lif import LIF
from snnkd_nb.training.loop import fit

pytestmark = pytest.mark.filterwarnings("ignore:no fused neurons")
CURRENT = torch.rand(8, 200, generator=torch.Generator().manual_seed(0))


def spikes_by_hand(x_seq, decay, v_threshold, v_reset, strict=False):
    "The spikes of each neuron, by a loop over numbers in Python."
    T, n = x_seq.shape
    spikes = torch.zeros(T, n)
    for i in range(n):
        v = 0.0 if v_reset is None else v_reset
        rest = v
        for t in range(T):
            m = decay * v + float(x_seq[t, i]) + (1 - decay) * rest
            fires = m > v_threshold if strict else m >= v_threshold
            spikes[t, i] = fires
            if not fires:
                v = m
            elif v_reset is None:
                v = m - v_threshold
            else:
                v = v_reset
    return spikes


# values that change in place


@pytest.mark.parametrize(
    "name, first, second",
    [
        ("v_threshold", 1.0, 0.3),
        ("decay", 0.25, 0.875),
        ("v_reset", 0.0, -0.75),
    ],
)
@pytest.mark.parametrize("as_parameter", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_changed_tensor_is_read_again(name, first, second, as_parameter, backend):
    value = torch.tensor(first)
    if as_parameter:
        value = nn.Parameter(value)
    neuron = LIF(4, **{name: value}, backend=backend)
    numbers = {"decay": 0.5, "v_threshold": 1.0, "v_reset": 0.0}
    with torch.no_grad():
        for number in (first, second, first):
            value.fill_(number)
            expected = spikes_by_hand(CURRENT.reshape(4, -1), **numbers | {name: number})
            assert torch.equal(neuron(CURRENT).reshape(4, -1), expected)


def test_a_changed_threshold_behind_batch_norm():
    value = torch.tensor(1.0)
    neuron, norm = LIF(4, v_threshold=value), nn.BatchNorm2d(8).eval()
    x = torch.rand(8, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        before = neuron.after(norm, x).mean()
        value.fill_(0.3)
        after = neuron.after(norm, x).mean()
        assert after > before
        assert after == LIF(4, v_threshold=0.3).after(norm, x).mean()


def small_network(**options):
    return create_model(
        "resnet20", 10, in_channels=1, image_size=8, width=0.25, depth=0.34, **options
    )


def test_a_changed_threshold_on_rates():
    value = torch.tensor(1.0)
    student = small_network(T=4, neuron="rate", neuron_args={"v_threshold": value})
    student.gradient = "rate"
    x = torch.rand(4, 1, 8, 8)
    before = student(x)
    value.fill_(0.25)
    after = student(x)
    for module in student.modules():
        if isinstance(module, LIF):
            module.register_buffer("v_threshold", torch.tensor(0.25))
    assert not torch.allclose(before, after)
    assert torch.allclose(after, student(x))


def test_the_number_is_part_of_the_state():
    neuron = LIF(4, v_threshold=torch.tensor(0.3), decay=nn.Parameter(torch.tensor(0.25)))
    assert set(neuron.state_dict()) == {"v_threshold", "decay"}
    assert not LIF(4).state_dict()
    other = LIF(4, v_threshold=torch.tensor(1.0), decay=nn.Parameter(torch.tensor(0.5)))
    other.load_state_dict(neuron.state_dict())
    assert torch.equal(other(CURRENT), neuron(CURRENT))


# gradients


@pytest.mark.parametrize("surrogate", [Sigmoid(4.0), Triangle(1.0), ATan(2.0)])
@pytest.mark.parametrize("hard, decay_input", list(itertools.product([True, False], repeat=2)))
def test_gradients_are_those_of_finite_differences(surrogate, hard, decay_input):
    "With smooth spikes the surrogate's derivative is the true one."
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(4, 3, generator=generator, dtype=torch.float64) * 1.3
    numbers = [torch.tensor(v, dtype=torch.float64) for v in (0.6, 0.9, -0.2)]
    inputs = [x, *numbers] if hard else [x, *numbers[:2]]
    for value in inputs:
        value.requires_grad_()

    def smooth(x, decay, v_threshold, v_reset=None):
        return lif_reference(
            x,
            decay=decay,
            v_threshold=v_threshold,
            v_reset=v_reset,
            decay_input=decay_input,
            surrogate=surrogate,
            smooth=True,
        )

    assert torch.autograd.gradcheck(smooth, inputs, eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("name, value", [("v_threshold", 0.8), ("decay", 0.7), ("v_reset", 0.0)])
@pytest.mark.parametrize("detach_reset", [True, False])
def test_the_layer_has_the_gradient_of_a_loop_with_autograd(name, value, detach_reset):
    "The straight-through form of the spike, written out independently of `Spike`."
    own = {"decay": 0.5, "v_threshold": 1.0, "v_reset": 0.0}
    ours, theirs = (nn.Parameter(torch.tensor(value)) for _ in range(2))
    y = LIF(4, **own | {name: ours}, detach_reset=detach_reset, surrogate=Sigmoid(4.0))(CURRENT)
    numbers = own | {name: theirs}
    rest = numbers["v_reset"]
    v = torch.zeros(2, 200) + rest
    steps = []
    for x in CURRENT.reshape(4, 2, 200):
        m = numbers["decay"] * v + x + (1 - numbers["decay"]) * rest
        over = m - numbers["v_threshold"]
        smooth = (4 * over).sigmoid()
        s = (over >= 0).float() + smooth - smooth.detach()
        reset = s.detach() if detach_reset else s
        v = (1 - reset) * m + reset * rest
        steps.append(s)
    expected = torch.cat(steps)
    assert torch.equal(y, expected.round())
    weights = torch.rand(8, 200, generator=torch.Generator().manual_seed(2))
    (weights * y).sum().backward()
    (weights * expected).sum().backward()
    assert abs(theirs.grad) > 0.1
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4)


def test_a_threshold_per_channel():
    value = nn.Parameter(torch.tensor([0.3, 1.0, 3.0]).reshape(3, 1, 1))
    x = torch.rand(8, 3, 4, 4)
    y = LIF(4, v_threshold=value)(x)
    for channel, number in enumerate((0.3, 1.0, 3.0)):
        assert torch.equal(y[:, channel], LIF(4, v_threshold=number)(x[:, channel]))
    y.sum().backward()
    assert value.grad.shape == (3, 1, 1) and (value.grad[:2] < 0).all()


def test_without_gradient_the_kernel_gives_the_same_spikes():
    neuron = LIF(4, v_threshold=nn.Parameter(torch.tensor(0.6)))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # no reference, so no warning
        fast = neuron(CURRENT)
    assert torch.equal(fast, neuron(CURRENT))


def learnable_student():
    numbers = {
        "v_threshold": nn.Parameter(torch.tensor(0.8)),
        "decay": nn.Parameter(torch.tensor(0.5)),
    }
    return small_network(T=2, neuron_args=numbers), numbers


def test_fit_trains_threshold_and_leak():
    torch.manual_seed(0)
    student, numbers = learnable_student()
    data = subset(load("digits"), 100)
    fit(student, data, create_distiller("none", student), epochs=1, lr=0.3)
    assert abs(numbers["v_threshold"].item() - 0.8) > 1e-4
    assert abs(numbers["decay"].item() - 0.5) > 1e-4


# what is refused


def test_a_kernel_that_is_asked_for_refuses_a_learnable_number():
    with pytest.raises(UserError) as error:
        LIF(4, v_threshold=nn.Parameter(torch.tensor(1.0)), backend="fused")(CURRENT)
    check_one_line(error, "learnable v_threshold", "backend='auto'")
    with pytest.raises(UserError) as error:
        lif(CURRENT, T=4, decay=torch.full((200,), 0.5), backend="fused")
    check_one_line(error, "decay of shape (200,)")


def test_training_on_rates_refuses_a_learnable_number():
    student, _ = learnable_student()
    data = load("digits")
    with pytest.raises(UserError) as error:
        fit(
            student,
            data,
            create_distiller("none", student),
            epochs=1,
            gradient="rate",
        )
    check_one_line(error, "learnable", "gradient='bptt'")


def test_a_learnable_slope_is_refused():
    slope = Sigmoid(nn.Parameter(torch.tensor(4.0)))
    for call in (LIF(4, surrogate=slope), lambda x: lif(x, T=4, surrogate=slope)):
        with pytest.raises(UserError) as error:
            call(CURRENT)
        check_one_line(error, "slope of Sigmoid", "detach()")


@pytest.mark.parametrize(
    "options, part",
    [
        ({"tau": torch.tensor(2.0)}, "give decay"),
        ({"decay": 1 - 1 / nn.Parameter(torch.tensor(2.0))}, "nn.Parameter"),
        ({"v_threshold": torch.tensor(1.0, requires_grad=True)}, "nn.Parameter"),
    ],
)
def test_tensors_that_would_not_be_trained_are_refused(options, part):
    with pytest.raises(UserError) as error:
        LIF(4, **options)
    check_one_line(error, next(iter(options)), part)


def test_values_out_of_range_are_refused():
    with pytest.raises(UserError, match="decay"):
        LIF(4, decay=torch.tensor(1.5))(CURRENT)
    with pytest.raises(UserError, match="v_threshold"):
        LIF(4, v_threshold=torch.tensor([1.0, float("nan")]))(torch.rand(8, 2))


def test_attention_refuses_a_tensor_of_which_it_takes_half():
    with pytest.raises(UserError, match="fires at half"):
        attention_activation(4, "spikformer", {"v_threshold": nn.Parameter(torch.tensor(1.0))})


def test_the_neuron_for_per_image_gradients_starts_at_a_tensor():
    neuron = LIF(4, v_reset=torch.tensor(-0.5))
    expected = neuron(CURRENT)
    neuron.__class__ = Composable
    assert torch.equal(neuron(CURRENT), expected)
