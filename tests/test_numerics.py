"""The search for operations with wrong gradients finds planted faults, and none in what the package computes."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from snnkd_nb.kernels.precision import cpu_class
from snnkd_nb.models.zoo import list_models
from snnkd_nb.runner import doctor
from snnkd_nb.runner.doctor import (
    Case,
    Fault,
    GradientReport,
    NetworkCase,
    check_gradients,
    check_networks,
    describe_ending,
    format_numbers,
    group_faults,
    largest_error,
    network_cases,
    plain,
    tiny_cases,
)

HERE = {"PYTHONPATH": str(Path(__file__).parent)}
SAFE = Case("conv2d", 8, 8, 3, 1, 4, 2, "fp32", "contiguous", 1)


def of_width(c_in, **changes):
    return Case(**{**SAFE.__dict__, "c_in": c_in, **changes})


class WrongWeight(torch.autograd.Function):
    """The identity, whose gradient has one wrong number."""

    @staticmethod
    def forward(ctx, weight):
        return weight.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient.view(-1)[0] += 0.01 * gradient.abs().max()
        return gradient


def planted(case, *tensors):
    """Fail in another way for each number of input channels."""
    if case.c_in == 1:
        return plain(case, tensors[0], WrongWeight.apply(tensors[1]), tensors[2])
    if case.c_in == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    if case.c_in == 3:
        time.sleep(60)
    if case.c_in == 4:
        return plain(case, *tensors) * float("inf")
    if case.c_in == 5:
        raise RuntimeError("planted")
    return plain(case, *tensors)


def test_every_planted_fault_is_found_at_its_case():
    cases = [of_width(c_in, size=size) for size in (4, 7) for c_in in (7, 1, 2, 8, 3, 4, 5, 9)]
    found = check_gradients(
        60, "test_numerics:planted", cases, ["default"], case_seconds=4, environment=HERE
    )
    assert set(found.tried["default"]) == set(cases)
    whats = {}
    for fault in found.faults:
        whats.setdefault(fault.case.c_in, set()).add((fault.case.size, fault.what))
    assert set(whats) == {1, 2, 3, 4, 5}
    expected = {
        1: "weight gradient wrong",
        2: "dies (SIGSEGV)",
        3: "hangs",
        5: "RuntimeError: planted",
    }
    for c_in, what in expected.items():
        assert whats[c_in] == {(4, what), (7, what)}
    assert (4, "result not finite") in whats[4]
    assert not found.ok


@pytest.mark.skipif(cpu_class() != "avx2", reason="the shapes at fault are those of AVX2")
def test_the_fault_of_the_processor_library_is_found():
    shapes = [(3, 8, 32), (4, 8, 8), (5, 16, 16), (3, 9, 16)]
    cases = [
        Case("conv2d", c_in, c_out, 1, 2, size, 8, "fp32", "channels_last", 1)
        for c_in, c_out, size in shapes
    ]
    found = check_gradients(40, "plain", cases, ["default"], pointwise_repeats=60)
    assert found.faults
    assert set(found.tried["default"]) == set(cases)


def test_guarded_operations_are_right():
    found = check_gradients(60, "guarded", tiny_cases())
    assert found.ok, [str(fault) for fault in found.faults]
    for cases in found.tried.values():
        assert set(cases) == set(tiny_cases())


def test_networks_have_right_gradients():
    shallow = [name for name in list_models() if not re.fullmatch(r"pyramidnet\d{3}", name)]
    found = check_networks(network_cases(shallow, widths=(0.03,), sizes=(16,), threads=(1,)), 40)
    assert found.ok, [str(fault) for fault in found.faults]
    assert found.count >= 5


def test_a_network_fails_where_nothing_is_tolerated_and_a_dear_one_is_left_out():
    cases = [NetworkCase("resnet20", 0.03, 8, 1), NetworkCase("resnet18", 1.0, 64, 1)]
    found = check_networks(cases, 30, tolerance=-1.0)
    assert [fault.case for fault in found.faults] == cases[:1]
    assert found.left_out == {"default": 1}
    assert not GradientReport((), {"default": ()}).ok  # nothing was checked


def test_faults_are_grouped_with_their_conditions():
    narrow = [of_width(c_in, threads=threads) for c_in in (2, 5) for threads in (1, 2)]
    faults = [Fault("default", case, "dies (SIGSEGV)", float("inf")) for case in narrow[:3]]
    (row,) = group_faults(GradientReport(tuple(faults), {"default": tuple(narrow)}))
    assert (row["faulty"], row["run"], row["c_in"], row["threads"]) == (3, 4, [2, 5], [1, 2])
    assert row["operation"] == "conv2d 3×3/1"


def test_small_parts():
    assert format_numbers([1, 2]) == "1, 2"
    assert format_numbers(list(range(1, 10))) == "1, 2, 3, …, 9"
    assert describe_ending(signal.SIGALRM) == "hangs"
    assert describe_ending(3 << 8) == "ends with exit status 3"
    assert largest_error(torch.tensor([2.0, 2.0]), torch.tensor([2.0, -4.0]).double()) == 1.5
    assert doctor.implementation_of("plain") is plain
    with pytest.raises(ValueError, match="AVX3"):
        check_gradients(1, settings=["AVX3"])
