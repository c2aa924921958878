"""Processes that end together: a failed, killed or frozen one, a lost machine, and what is none of these.

Two machines are two watchers here, each with processes of its own. All are forked: what they run needs no GPU, and to
import everything anew would take longer than the tests.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
from torch import distributed

from recbole_cce import cli
from recbole_cce.distributed import processes
from recbole_cce.distributed.processes import Machines, RankFailed
from recbole_cce.errors import UserError
from recbole_cce.plugin import entry_points

HOST = socket.gethostname()
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(processes, "START_METHOD", "fork")
    for name, seconds in {"BEAT": 0.05, "FROZEN": 0.4, "SILENT": 1.0, "FOLLOWS": 0.3, "TO_END": 0.5}.items():
        monkeypatch.setattr(processes, name, seconds)


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def work(local_rank, job, kwargs):
    """The job of a rank; jobs leave the number of their process behind."""
    rank = local_rank + kwargs["config_dict"]["offset"]
    Path(f"pid.{rank}").write_text(str(os.getpid()))
    job(rank, kwargs["config_dict"])


def watch(number, machines, nprocs, port):
    """What the watcher of a machine ends with; the file says so to other processes."""
    group = {"ip": "localhost", "port": port, "offset": number * nprocs, "world_size": machines * nprocs}
    ended = "done"
    try:
        processes.launch(work, (launch.job, {"config_dict": group}), nprocs)
    except (RankFailed, UserError) as error:
        ended = f"{type(error).__name__}: {error}"
    Path(f"ended.{number}").write_text(ended)


def launch(job, machines=1, nprocs=2):
    """What the watchers of all machines end with."""
    launch.job, port = job, str(free_port())
    others = [FORK.Process(target=watch, args=(number, machines, nprocs, port)) for number in range(1, machines)]
    for other in others:
        other.start()
    watch(0, machines, nprocs, port)
    for other in others:
        other.join()
    assert not any(psutil.pid_exists(int(file.read_text())) for file in Path().glob("pid.*"))
    return [Path(f"ended.{number}").read_text() for number in range(machines)]


def wait(rank, group):
    time.sleep(60)


def stop(rank, group):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    wait(rank, group)


def die(rank, group):
    """What the others notice of it is not the reason."""
    if rank == 1:
        Path("dying").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while not Path("dying").exists():
        time.sleep(0.01)
    raise ConnectionError("connection closed by peer")


def leave(rank, group):
    if rank == 1:
        raise KeyboardInterrupt  # torch's wrapper ends such a process with status 0
    wait(rank, group)


def fail(rank, group):
    if rank == 1:
        raise ValueError("training loss is nan\nin epoch 3")
    wait(rank, group)


def mistake(rank, group):
    raise UserError("topk: [31] is not valid; it takes at most 30, the number of items")


@pytest.mark.parametrize(
    ("job", "machines", "message"),
    [
        (stop, 1, "rank 1 of 2 (HOST) is frozen: it has been stopped for 0.4 s"),
        (stop, 2, "rank 1 of 2 (HOST) is frozen: it has been stopped for 0.4 s"),
        (die, 1, "rank 1 of 2 (HOST) was ended by signal 9 (Killed)"),
        (leave, 1, "rank 1 of 2 (HOST) ended before it was done"),
        (fail, 1, "rank 1 of 2 (HOST) failed: ValueError: training loss is nan in epoch 3"),
        (fail, 2, "rank 1 of 2 (HOST) failed: ValueError: training loss is nan in epoch 3"),
    ],
)
def test_one_process_ends_all(capfd, job, machines, message):
    begun = time.monotonic()
    ended = launch(job, machines, 2 // machines)
    assert time.monotonic() - begun < 60
    printed = capfd.readouterr().err
    assert printed.count("Traceback") == (job is fail) and "connection closed" not in printed
    assert ended == ["RankFailed: " + message.replace("HOST", HOST)] * machines


def test_a_mistake_of_the_users_stays_one():
    (ended,) = launch(mistake)
    assert re.fullmatch(rf"UserError: rank [01] of 2 \({HOST}\) failed: topk: \[31\] is not valid; .*", ended)


def add_up(rank, group):
    """A sum over all ranks, through torch.distributed at the watcher's store; one rank computes for longer."""
    if rank == 1:
        end = time.monotonic() + 3 * processes.SILENT
        while time.monotonic() < end:
            sum(range(10**6))
    distributed.init_process_group(
        "gloo",
        rank=rank,
        world_size=group["world_size"],
        init_method=f"tcp://{group['ip']}:{group['port']}",
        timeout=timedelta(seconds=60),
    )
    total = torch.tensor([float(rank)])
    distributed.all_reduce(total)
    distributed.destroy_process_group()
    Path(f"total.{rank}").write_text(str(total.item()))
    time.sleep(0.3 * rank)  # the first machine is done before the other


def test_long_work_is_no_freeze():
    assert launch(add_up, machines=2, nprocs=1) == ["done", "done"]
    assert [Path(f"total.{rank}").read_text() for rank in (0, 1)] == ["1.0", "1.0"]


def machine_that_stops(port, offset):
    machines = Machines("localhost", port, offset, 1, 2)
    while not machines.failure:
        time.sleep(0.05)
        if machines.heard < math.inf and Path("met").exists():
            os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    ("lost", "message"),
    [(1, f"rank 1 of 2 ({HOST}): nothing was heard of for 1 s"), (0, "rank 0 of 2 (localhost): its machine has not")],
)
def test_a_lost_machine(lost, message):
    """Stopped altogether: with its watcher, and the store if it is the first one."""
    port = free_port()
    other = FORK.Process(target=machine_that_stops, args=(port, lost))
    other.start()
    machines = Machines("localhost", port, 1 - lost, 1, 2)
    try:
        while psutil.Process(other.pid).status() != psutil.STATUS_STOPPED:
            assert machines.known_failure() is None
            if machines.heard < math.inf:
                Path("met").touch()
            time.sleep(0.05)
        begun = time.monotonic()
        while not (failure := machines.known_failure()):
            assert time.monotonic() - begun < 10
            time.sleep(0.05)
        assert failure.line.startswith(message)
    finally:
        other.kill()
        other.join()
        machines.end(None)


def test_the_first_machine_may_come_late():
    port = free_port()
    second = Machines("localhost", port, 1, 1, 2)
    time.sleep(1.5 * processes.SILENT)
    assert second.known_failure() is None
    first = Machines("localhost", port, 0, 1, 2)
    while math.inf in (first.heard, second.heard):
        time.sleep(0.05)
    assert not first.all_done()
    while not second.all_done() or not first.all_done():
        time.sleep(0.05)
    assert first.known_failure() is second.known_failure() is None


def test_a_port_in_use():
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"--port: {port} cannot be used .*; it takes a free port"):
            Machines("localhost", port, 0, 2, 2)


def test_the_command_prints_one_line(monkeypatch, capsys):
    def run(**kwargs):
        raise RankFailed("rank 1 of 2 (here) is frozen: it has been stopped for 20 s")

    monkeypatch.setattr(entry_points, "run", run)
    monkeypatch.setattr("sys.argv", ["run_recbole_cce.py"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    line = "run_recbole_cce.py: error: rank 1 of 2 (here) is frozen: it has been stopped for 20 s\n"
    assert capsys.readouterr().err == line
