"""The processes around a benchmark: nodes of its own, and workers that it talks to over pipes.

Whatever is started here ends with the benchmark, also if that is interrupted or killed: a context manager
closes it, and the kernel sends a signal when the parent dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from ..rdma.errors import DeadlineError, LocalError, MemKVError
from ..store.config import parse_address

START_SECONDS = 120.0
STOP_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Wish:
    """How the benchmark reaches or starts nodes. ``nodes``: existing ones, else it starts its own."""

    nodes: tuple[str, ...] = ()
    fabric: str = "auto"
    devices: tuple[str, ...] = ()
    ib_port: int | None = None
    gid_index: int | None = None
    secret_file: str | None = None
    clock: str = "auto"


def end_with_parent() -> None:
    """Runs in a new process: it gets SIGTERM when the one that made it dies."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class NodeProcess:
    """``memkv-node serve`` in a process of its own, on a free port of the loopback address.

    :param memory: bytes of the arena. :param block_bytes: of the longest block, for the slabs to fit.
    :param more: further flags.
    :raises MemKVError: it did not come up; the message has the node's own.
    """

    def __init__(self, wish: Wish, memory: int, block_bytes: int, more: Sequence[str] = ()) -> None:
        slab = slab_bytes(memory, block_bytes)
        command = [sys.executable, "-m", "memkv.cli.node", "serve", "--listen", "127.0.0.1:0"]
        command += ["--fabric", wish.fabric, "--clock", wish.clock, "--log-level", "warning"]
        command += ["--memory", str(-(-memory // slab) * slab), "--slab-bytes", str(slab)]
        for device in wish.devices:
            command += ["--device", device]
        for flag, value in (
            ("--ib-port", wish.ib_port),
            ("--gid-index", wish.gid_index),
            ("--secret-file", wish.secret_file),
        ):
            command += [flag, str(value)] if value is not None else []
        command += more
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        reader, writer = os.pipe()
        began = time.monotonic()
        try:
            self._process = subprocess.Popen(
                [*command, "--ready-fd", str(writer)],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(writer,),
                process_group=0,  # Ctrl-C is ours to handle
                preexec_fn=end_with_parent,
            )
        finally:
            os.close(writer)
        try:
            self.address = self._wait(reader)
            self.start_seconds = time.monotonic() - began  # to where it serves
        except BaseException:
            self.close()
            raise
        finally:
            os.close(reader)

    @property
    def pid(self) -> int:
        return self._process.pid

    def _wait(self, ready: int) -> str:
        line, until = b"", time.monotonic() + START_SECONDS
        while not line.endswith(b"\n"):
            if not select.select([ready], [], [], max(0.0, until - time.monotonic()))[0]:
                raise DeadlineError("the benchmark's node was not ready in time")
            more = os.read(ready, 4096)
            if not more:
                self._process.wait(STOP_SECONDS)
                self._log.seek(0)
                last = self._log.read().strip().splitlines() or [
                    f"it ended with status {self._process.returncode}"
                ]
                raise MemKVError(f"the benchmark's node did not start: {last[-1]}")
            line += more
        return line.decode().split()[1]

    def stop(self) -> float:
        """Stops it in order; the seconds that took. :raises MemKVError: it was no clean stop."""
        began = time.monotonic()
        self._process.terminate()
        try:
            status = self._process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            raise DeadlineError("the benchmark's node does not stop") from None
        if status:
            raise MemKVError(f"the benchmark's node stopped with status {status}")
        return time.monotonic() - began

    def kill(self) -> float:
        """SIGKILL; the seconds until it was gone."""
        began = time.monotonic()
        self._process.kill()
        self._process.wait()
        return time.monotonic() - began

    def close(self) -> None:
        """Stops it: SIGTERM, and SIGKILL if that is not enough."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()


class Child:
    """A process of ours that we talk to over a pipe; it ends when the pipe does.

    :param target: ``target(pipe, *args)``, a function of a module; a MemKVError that it raises comes back
        from ``ask``.
    """

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self._process = context.Process(target=_child_main, args=(target, other, *args), daemon=True)
        self._process.start()
        other.close()

    def ask(self, message: Any = None, timeout: float = START_SECONDS) -> Any:
        """Sends a message, unless it is None, and returns the answer.

        :raises MemKVError: the process failed, has ended, or does not answer.
        """
        try:
            if message is not None:
                self.pipe.send(message)
            if not self.pipe.poll(timeout):
                raise DeadlineError("a process of the benchmark does not answer")
            answer = self.pipe.recv()
        except DeadlineError:
            raise
        except (EOFError, OSError):
            raise MemKVError("a process of the benchmark has ended") from None
        if isinstance(answer, MemKVError):
            raise answer
        return answer

    def close(self) -> None:
        self.pipe.close()
        self._process.join(STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _child_main(target: Callable[..., None], pipe: Connection, *args: Any) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            target(pipe, *args)
        except MemKVError as error:
            pipe.send(MemKVError(str(error)))


class Nodes:
    """The nodes of a benchmark: those named, or ``count`` of its own. A context manager.

    :param more: further flags of each of its own, by number.
    """

    def __init__(
        self,
        wish: Wish,
        *,
        memory: int,
        block_bytes: int,
        count: int = 1,
        more: Callable[[int], Sequence[str]] = lambda number: (),
    ) -> None:
        if wish.secret_file and not Path(wish.secret_file).is_file():
            raise LocalError(f"there is no file {wish.secret_file}", "--secret-file")
        for name in wish.nodes:
            parse_address(name, "--nodes")
        self.own: list[NodeProcess] = []
        try:
            if not wish.nodes:
                self.own.extend(NodeProcess(wish, memory, block_bytes, more(i)) for i in range(count))
        except BaseException:
            self.close()
            raise
        self.addresses: Sequence[str] = wish.nodes or tuple(node.address for node in self.own)

    def close(self) -> None:
        for node in self.own:
            node.close()

    def __enter__(self) -> Nodes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def extent_bytes(block_bytes: int) -> int:
    """What a block takes of a node's arena: a header page and the payload, both aligned."""
    return 4096 + -(-block_bytes // 4096) * 4096


def slab_bytes(memory: int, block_bytes: int) -> int:
    """A slab that wastes little: room for many blocks, and not too much of the memory."""
    least = -(-2 * extent_bytes(block_bytes) // (2 << 20)) * (2 << 20)
    return max(least, min(64 << 20, memory // 12 // (2 << 20) * (2 << 20)))


def arena_bytes(blocks: int, block_bytes: int) -> int:
    """An arena in which so many blocks stay, however fast they are put.

    A node evicts ahead of need, by the recent rate, up to half of its memory: twice the blocks are always
    enough. Where that would be much of this machine's memory, a part of it is.
    """
    wanted = blocks * extent_bytes(block_bytes)
    spare = min(wanted, max(512 << 20, _available_bytes() // 4))
    return wanted + spare + 4 * slab_bytes(wanted, block_bytes)


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used so far."""

    cpu_s: float
    switches: int  # voluntary and not, of all its threads

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.cpu_s + other.cpu_s, self.switches + other.switches)

    def __sub__(self, other: Usage) -> Usage:
        return Usage(self.cpu_s - other.cpu_s, self.switches - other.switches)


def usage(pid: int) -> Usage:
    """Of the process ``pid``, from /proc."""
    root = Path(f"/proc/{pid}")
    words = (root / "stat").read_text().rpartition(")")[2].split()
    ticks = int(words[11]) + int(words[12])  # utime, stime
    switches = 0
    for task in (root / "task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            for line in (task / "status").read_text().splitlines():
                if "ctxt_switches" in line:
                    switches += int(line.split()[1])
    return Usage(ticks / os.sysconf("SC_CLK_TCK"), switches)
