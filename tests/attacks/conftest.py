"""Processes of the attacks (churn.py), started, stopped, asked and ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds for a process to start or to answer: emulated machines are slow


class Child:
    """A process of churn.py."""

    def __init__(self, role: str, spec: dict[str, Any]) -> None:
        self.role = role
        self.stops = 0
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in reap
        self._rest = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.attacks.churn", role, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=ROOT,
        )

    def line(self, timeout: float = PATIENCE) -> dict[str, Any]:
        """The next line that it says. Fails the test, with what it left on stderr, if there is none."""
        assert self.process.stdout is not None
        fd, until = self.process.stdout.fileno(), time.monotonic() + timeout
        while b"\n" not in self._rest:
            ready, _, _ = select.select([fd], [], [], max(0.0, until - time.monotonic()))
            data = os.read(fd, 1 << 16) if ready else b""
            if not data:
                pytest.fail(f"the {self.role} {'has ended' if ready else 'says nothing'}: {self.errors()}")
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        out: dict[str, Any] = json.loads(line)
        return out

    def errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-3000:].decode(errors="replace")

    def tell(self, text: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(text.encode() + b"\n")
            self.process.stdin.flush()

    def ask(self, **command: Any) -> dict[str, Any]:
        self.tell(json.dumps(command))
        return self.line()

    def end(self) -> dict[str, Any]:
        """Ends a peer and returns its report."""
        self.tell("end")
        return self.line()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def pause(self, seconds: float) -> None:
        """Stops it for a while, as a debugger, a hypervisor or a busy machine does."""
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGCONT)
        self.stops += 1

    def reap(self) -> None:
        """Makes sure that it is gone."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._errors.close()


@pytest.fixture
def start() -> Iterator[Callable[[str, dict[str, Any]], Child]]:
    """Starts processes of churn.py, and ends them after the test: peers first, nodes last."""
    children: list[Child] = []

    def run(role: str, spec: dict[str, Any]) -> Child:
        children.append(Child(role, spec))
        return children[-1]

    yield run
    for child in children:
        if child.running:
            child.process.send_signal(signal.SIGCONT)
    for child in sorted(children, key=lambda c: c.role == "node"):
        child.reap()


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Prints numbers of a run, and puts them into the test report."""

    def show(**numbers: Any) -> None:
        for name, value in numbers.items():
            record_property(name, json.dumps(value, default=str))
        print(" ".join(f"{name}={value}" for name, value in numbers.items()))

    return show
