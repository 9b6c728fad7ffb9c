"""Every method trains in two processes that share each batch: both end with the same finite weights."""

import os
import socket

import pytest
import torch

from snnkd_nb.core import sha256_of
from snnkd_nb.losses.zoo import list_distillers

METHODS = [name for name in list_distillers() if name != "none"]
SIZE = {"num_classes": 10, "in_channels": 1, "image_size": 16, "width": 0.25, "depth": 0.34}


def _train_every_method(rank: int, port: int, folder: str) -> None:
    "Train a student by each method in one of two processes, and save what became of it."
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        ACCELERATE_USE_CPU="true",
    )
    torch.set_num_threads(1)
    from snnkd_nb.data.images import load, subset
    from snnkd_nb.losses.zoo import create_distiller
    from snnkd_nb.models.zoo import create_model
    from snnkd_nb.training.loop import fit

    data = subset(load("digits", size=16), 96)
    results = {}
    for method in METHODS:
        torch.manual_seed(0)
        teacher = create_model("resnet20", **SIZE)
        student = create_model("resnet20", T=2, neuron="sew", **SIZE)
        start = [parameter.detach().clone() for parameter in student.parameters()]
        try:
            distiller = create_distiller(method, student, teacher)
            history = fit(
                student,
                data,
                distiller,
                epochs=1,
                batch_size=32,
                lr=0.01,
                device="cpu",
                weak_teacher="accept",
                on_event=lambda event: None,
            )
            weights = [parameter.detach() for parameter in student.parameters()]
            digest = sha256_of(b"".join(weight.numpy().tobytes() for weight in weights))
            is_finite = all(bool(weight.isfinite().all()) for weight in weights)
            has_moved = not all(map(torch.equal, start, weights))
            results[method] = (digest, is_finite and has_moved, history[-1]["loss"])
        except Exception as error:  # the other process must not wait for this one
            results[method] = ("failed", False, repr(error))
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train_every_method, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_both_processes_end_with_the_same_student(results, method):
    first, second = (of_rank[method] for of_rank in results)
    assert first[1] and second[1], (first, second)
    assert first[0] == second[0]
