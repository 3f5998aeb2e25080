import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch
from processes import run_ranks, start_ranks, warm

from ssl_locat.errors import ConfigError
from ssl_locat.runs import distributed
from ssl_locat.runs.stop import StopFlag


def test_one_process_needs_no_group():
    tensor = torch.arange(3.0)
    assert distributed.setup("cpu") == torch.device("cpu")
    assert distributed.world_size() == 1 and distributed.is_main()
    assert torch.equal(distributed.all_reduce_mean_(tensor.clone()), tensor)
    assert torch.equal(distributed.all_gather_cat(tensor), tensor)
    assert distributed.broadcast_object({"a": [1]}) == {"a": [1]}
    distributed.barrier()


def _collectives():
    rank = distributed.rank()
    return {
        "sum": distributed.all_reduce_sum_(torch.tensor([1.0 + rank])).tolist(),
        "mean": distributed.all_reduce_mean_(torch.tensor([1.0 + rank])).tolist(),
        "gathered": distributed.all_gather_cat(torch.full((2, 1), rank)).flatten().tolist(),
        "object": distributed.broadcast_object({"text": "ä" * (1000 if rank == 0 else 3), "rank": rank}),
    }


def test_a_left_over_world_size_is_explained(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "SSL_LOCAT_RENDEZVOUS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="lacks RANK, MASTER_ADDR, MASTER_PORT: start the command with torchrun"):
        distributed.setup("cpu")


def test_collectives_of_two_processes():
    for found in run_ranks(_collectives, 2):
        assert found["sum"] == [3.0] and found["mean"] == [1.5]
        assert found["gathered"] == [0, 0, 1, 1]
        assert found["object"] == {"text": "ä" * 1000, "rank": 0}


SHAPES = [(8, 5), (6, 5, 3, 2)]


def _normalise(shape):
    """Output, gradients and running statistics of this rank's share of a batch."""
    generator = torch.Generator().manual_seed(0)
    x, cotangent = (torch.randn(shape, generator=generator) for _ in range(2))
    world, rank = distributed.world_size(), distributed.rank()
    mine = (3 * x + 1).chunk(world)[rank].clone().requires_grad_()
    norm = distributed.SyncBatchNorm(5)
    torch.nn.init.normal_(norm.weight, generator=generator)
    out = norm(mine)
    (out * cotangent.chunk(world)[rank]).sum().backward()
    gradients = distributed.all_reduce_sum_(torch.cat([norm.weight.grad, norm.bias.grad]))
    return [part.tolist() for part in (out.detach(), mine.grad, gradients, norm.running_mean, norm.running_var)]


def _normalise_all():
    return [_normalise(shape) for shape in SHAPES]


def test_batch_norm_of_two_ranks_equals_that_of_one():
    ranks = run_ranks(_normalise_all, 2)
    for number, shape in enumerate(SHAPES):
        whole, (first, second) = _normalise(shape), (found[number] for found in ranks)
        for index, expected in enumerate(whole):
            found = first[index] + second[index] if index < 2 else first[index]
            torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def _stop_at(signalled_rank: int):
    steps = 0
    with StopFlag() as stop:
        for step in range(100):
            if step == 5 and distributed.rank() == signalled_rank:
                os.kill(os.getpid(), signal.SIGUSR2)
            distributed.all_reduce_sum_(torch.ones(1))  # the step
            steps += 1
            if stop.agreed():
                return steps, stop.reason
    return steps, ""


def test_all_ranks_stop_at_the_same_step_for_a_signal_to_one():
    # the signal comes in step 5 (the sixth), its vote is cast at that border and read at the next: 7 steps done
    assert run_ranks(_stop_at, 2, 1) == [(7, "SIGUSR2"), (7, "SIGUSR2")]


def test_signal_stops_one_process_at_the_step_border():
    before = signal.getsignal(signal.SIGTERM)
    with StopFlag() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() and stop.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


def _interrupted_twice():
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(3)  # still here


def test_second_interrupt_ends_the_process_at_once():
    process = warm().Process(target=_interrupted_twice)
    process.start()
    process.join(60)
    assert process.exitcode == 130  # not 3


def _dies(lost: int):
    with StopFlag() as stop, distributed.lost_ranks_named():
        for step in range(1000):
            if step == 3 and distributed.rank() == lost:
                os._exit(1)
            stop.agreed()
            time.sleep(0.01)


@pytest.mark.parametrize("lost", [1, 0])
def test_a_lost_rank_is_named_with_its_host(lost):
    """Not gloo's addresses. Rank 0 serves the store in which the others answer: where it is gone, that is what they find."""
    processes, results = start_ranks(_dies, 2, lost)
    rank, state, trace = results.get(timeout=120)
    for process in processes:
        process.join(30)
    assert (rank, state) == (1 - lost, "failed")
    said = trace[trace.index("RankLost: ") :]
    host = socket.gethostname()
    assert said.startswith(
        f"RankLost: rank {1 - lost} on {host} ends, because it lost rank {lost} on {host}: it failed, was killed"
    )
    assert "gloo" not in said and "127.0.0.1" not in said


def _wishes():
    """A wish of one rank is known to all at the same call, once."""
    found = []
    with StopFlag() as stop:
        for step in range(6):
            stop.agreed(2 if step == 1 and distributed.rank() == 0 else 0)
            found.append(stop.wish)
    return found


def test_a_wish_to_save_is_agreed_on_by_all_ranks_at_the_same_step():
    assert run_ranks(_wishes, 2) == [[0, 0, 2, 0, 0, 0]] * 2


def _hangs():
    distributed.shutdown()
    distributed.setup("cpu", timeout=timedelta(seconds=5))
    with StopFlag() as stop:
        stop.agreed()
        if distributed.rank() == 1:
            time.sleep(60)  # alive, its connections open, and silent
        stop.agreed()
        stop.agreed()


def test_hanging_rank_ends_the_others_with_a_message():
    processes, results = start_ranks(_hangs, 2)
    try:
        rank, state, trace = results.get(timeout=200)
        assert (rank, state) == (0, "failed") and "Timed out waiting" in trace and "agreed" in trace
    finally:
        for process in processes:
            process.kill()


def test_fault_names_rank_and_host_first(tmp_path):
    try:
        raise ValueError("broken")
    except ValueError as error:
        text = distributed.fault(error, tmp_path)
    assert text.startswith("rank 0 on ") and "ValueError: broken" in text.splitlines()[0]
    assert "Traceback" in text and (tmp_path / "fault-rank0.json").exists()
