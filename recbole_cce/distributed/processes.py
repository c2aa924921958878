"""The processes of a run end together: one that fails or is frozen ends all others, on every machine, in one line.

Whoever starts the processes of a machine watches them from outside, so that nothing a process does, however long, is
taken for a freeze: it has ended, it has said what went wrong, or the operating system says that it is stopped. With
several machines the watchers tell each other, through the store that torch.distributed meets at (`ip` and `port`): the
watcher of the first machine hosts it, as torchrun's agent does, so that it outlives the process of rank 0.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
from torch.distributed import DistNetworkError, PrefixStore, TCPStore
from torch.multiprocessing import start_processes

from recbole_cce.errors import UserError, reason

START_METHOD = "spawn"  # CUDA does not survive a fork
BEAT = 1.0  # seconds from one look, or from one word to the other machines, to the next
FROZEN = 20.0  # seconds that a process may be stopped
SILENT = 30.0  # seconds without news of another machine
FOLLOWS = 1.0  # seconds in which the cause of an error may show that it only follows from
TO_END = 5.0  # seconds that processes have to end when they are asked to
MEETING = timedelta(minutes=30)  # for the first machine to be there

AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # torch's: processes find the store and do not host it
DONE = None  # a process's last word, or its error: one line, whether it is the user's mistake, its traceback


class RankFailed(RuntimeError):
    """A process of the run has failed, here or on another machine: names its rank and its error."""


@dataclass(frozen=True)
class Failure:
    """What ended a run: one line, and whether it is the user's mistake."""

    line: str
    of_user: bool = False

    def error(self) -> Exception:
        """The exception that says so."""
        return (UserError if self.of_user else RankFailed)(self.line)


def launch(function: Callable[..., None], args: tuple[Any, ...], nprocs: int, join: bool = True) -> None:
    """As torch.multiprocessing.spawn for RecBole's `run`, whose last argument says where the processes meet.

    Raises:
        RankFailed: a process failed, was killed or is frozen, on whatever machine; all others are ended.
        UserError: one of them found a mistake of the user's; or the port is in use.
    """
    group = args[-1]["config_dict"]
    machines = Machines(group["ip"], int(group["port"]), group["offset"], nprocs, group["world_size"])
    readers, writers = zip(*(multiprocessing.Pipe(duplex=False) for _ in range(nprocs)), strict=True)
    failure: Failure | None = None
    workers: list[BaseProcess] = []
    os.environ[AGENT_STORE] = "True"
    try:
        workers = start_processes(
            _work, (function, args, writers), nprocs, join=False, start_method=START_METHOD
        ).processes
        failure = _watch(workers, readers, machines)
    except BaseException as error:
        failure = Failure(f"{machines.names()}: {type(error).__name__}")
        if isinstance(error, (KeyboardInterrupt, SystemExit)):  # Ctrl-C, SIGTERM: they save what they have trained
            error.args = error.args or ("the processes said how to go on",)
            _end(workers, patience=None)
        raise
    finally:
        del os.environ[AGENT_STORE]
        machines.end(failure)
        _end(workers)
    if failure:
        raise failure.error()


def end_with_parent() -> None:
    """End this process with the one that started it, whatever it does: for a thread of its own."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(local_rank: int, function: Callable[..., None], args: tuple[Any, ...], writers: list[Connection]) -> None:
    """The process of one rank; its last word goes to the watcher."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        function(local_rank, *args)
    except Exception as error:
        of_user = isinstance(error, UserError)
        writers[local_rank].send((str(error), True, "") if of_user else (reason(error), False, traceback.format_exc()))
        threading.Event().wait()  # to be ended: other processes would fail at the end of this one
    writers[local_rank].send(DONE)


def _watch(workers: list[BaseProcess], readers: list[Connection], machines: Machines) -> Failure | None:
    """Wait until all processes of all machines are done, or one has failed."""
    words: dict[int, tuple[str, bool, str] | None] = {}  # last ones, of local ranks
    stopped: dict[int, float] = {}  # local rank -> since when
    reported: float | None = None  # when the first error was
    while True:
        ends = [worker.sentinel for worker in workers if worker.is_alive()]
        connection.wait([*ends, *(reader for rank, reader in enumerate(readers) if rank not in words)], BEAT)
        exits = [worker.exitcode for worker in workers]  # before the words, which come first
        for rank, reader in enumerate(readers):
            if rank not in words and reader.poll():
                words[rank] = reader.recv()
        for rank, code in enumerate(exits):
            if code is not None and not (code == 0 and rank in words and words[rank] is DONE):
                return Failure(f"{machines.names(rank, 1)} {_end_of(code)}")
            if not _is_stopped(workers[rank]):
                stopped.pop(rank, None)
            elif time.monotonic() - stopped.setdefault(rank, time.monotonic()) > FROZEN:
                return Failure(f"{machines.names(rank, 1)} is frozen: it has been stopped for {FROZEN:g} s")
        if failure := machines.known_failure():
            return failure
        errors = [(rank, word) for rank, word in words.items() if word is not DONE]
        if errors:
            reported = reported or time.monotonic()
            if time.monotonic() - reported > FOLLOWS:
                rank, (line, of_user, trace) = errors[0]
                print(trace, end="", file=sys.stderr)
                return Failure(f"{machines.names(rank, 1)} failed: {line}", of_user)
        elif all(code == 0 for code in exits) and machines.all_done():
            return None


def _is_stopped(worker: BaseProcess) -> bool:
    """Whether a process is stopped by a signal; one in a debugger is not."""
    try:
        return psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _end_of(code: int) -> str:
    """How a process ended that did not say that it was done."""
    if code < 0:
        return f"was ended by signal {-code} ({signal.strsignal(-code)})"
    return f"ended with status {code}" if code else "ended before it was done"


def _end(workers: list[BaseProcess], patience: float | None = TO_END) -> None:
    """End processes, those that do not answer in time by force."""
    for worker in workers:
        worker.terminate()
    begun = time.monotonic()
    for worker in workers:
        worker.join(None if patience is None else max(0.0, begun + patience - time.monotonic()))
    for worker in workers:
        worker.kill()  # a stopped one, or one that waits for another inside a library
        worker.join()


class Machines:
    """What the watchers of several machines tell each other: that they are there, that theirs are done, what failed.

    Args:
        ip: of the first machine.
        port: there.
        offset: rank of the first process of this machine.
        nprocs: processes of this machine.
        world_size: of all machines.

    Raises:
        UserError: this is the first machine, and the port is in use.
    """

    def __init__(self, ip: str, port: int, offset: int, nprocs: int, world_size: int) -> None:
        self.ip, self.port, self.offset, self.nprocs, self.world_size = ip, port, offset, nprocs, world_size
        self.failure: Failure | None = None  # the first that is known here
        self.host: TCPStore | None = None
        if offset == 0:
            try:
                self.host = TCPStore(ip, port, is_master=True, wait_for_workers=False)
            except DistNetworkError as error:
                raise UserError(f"--port: {port} cannot be used ({reason(error)}); it takes a free port") from None
        self.ended = threading.Event()  # the processes of this machine
        self.gone = threading.Event()  # its watcher
        self.others_ended = world_size == nprocs
        self.heard = math.inf  # when the store last answered; the first machine may be there later
        self.talk = threading.Thread(target=self._talk, daemon=True)
        if not self.others_ended:
            self.talk.start()

    def names(self, first: int = 0, count: int | None = None) -> str:
        """Processes of this machine, by their local ranks; without arguments, all."""
        return self._named(self.offset + first, count or self.nprocs, socket.gethostname())

    def known_failure(self) -> Failure | None:
        """What another machine has said, or that it says nothing any more."""
        if self.talk.is_alive() and time.monotonic() - self.heard > SILENT:
            return Failure(f"{self._named(0, 1, self.ip)}: its machine has not answered for {SILENT:g} s")
        return self.failure

    def all_done(self) -> bool:
        """Whether this machine, whose processes are done, may go: the first one, which hosts the store, goes last."""
        self.ended.set()
        return self.others_ended if self.host else not self.talk.is_alive()

    def end(self, failure: Failure | None) -> None:
        """Let the others know how it ended; the first machine waits a little for them to hear it."""
        self.failure = self.failure or failure
        self.ended.set()
        if self.talk.is_alive():
            self.talk.join(TO_END)
        self.gone.set()

    def _named(self, rank: int, count: int, host: str) -> str:
        ranks = f"rank {rank}" if count == 1 else f"ranks {rank} to {rank + count - 1}"
        return f"{ranks} of {self.world_size} ({host})"

    def _talk(self) -> None:
        """A word to the others and a look at theirs at every beat, until nobody needs either."""
        try:
            host = TCPStore(self.ip, self.port, is_master=False, timeout=MEETING)
            host.set_timeout(timedelta(seconds=SILENT))
            store = PrefixStore("watchers", host)
            heard: dict[int, tuple[bytes, float]] = {}  # rank of a machine's first process -> its last word, and when
            for beat in itertools.count():
                ended = self.ended.is_set()
                if self.failure:
                    store.compare_set("failure", "", json.dumps([self.failure.line, self.failure.of_user]))
                if store.check(["failure"]):
                    self.failure = Failure(*json.loads(store.get("failure")))
                word = [self.nprocs, socket.gethostname(), ended, beat]
                store.set(f"machine {self.offset}", json.dumps(word))
                self._look(store, heard)
                self.heard = time.monotonic()
                if self.gone.is_set() or (ended and (self.others_ended or not self.host)):
                    return
                (self.gone if ended else self.ended).wait(BEAT)
        except RuntimeError as error:  # torch's, of a store that is not there
            lost = f"{self._named(0, 1, self.ip)}: its machine does not answer ({reason(error)})"
            self.failure = self.failure or Failure(lost)

    def _look(self, store: PrefixStore, heard: dict[int, tuple[bytes, float]]) -> None:
        """Who has ended, and who has not been heard of; a machine that did not come yet is waited for."""
        rank, others_ended = 0, True
        while rank < self.world_size:
            if not store.check([f"machine {rank}"]):
                others_ended = False
                break
            word, now = store.get(f"machine {rank}"), time.monotonic()
            count, host, ended, _ = json.loads(word)
            if rank not in heard or heard[rank][0] != word:
                heard[rank] = word, now
            if rank != self.offset and not ended:
                others_ended = False
                if now - heard[rank][1] > SILENT:
                    silent = f"{self._named(rank, count, host)}: nothing was heard of for {SILENT:g} s"
                    self.failure = self.failure or Failure(silent)
            rank += count
        self.others_ended = others_ended
