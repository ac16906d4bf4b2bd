"""memkv-node as a process: started, waited for by its ready line, stopped, and nothing of it left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 30.0


def environment(**extra: str) -> dict[str, str]:
    """Of the process; without a secret of the machine that runs the tests."""
    env = {k: v for k, v in os.environ.items() if k not in ("MEMKV_SECRET", "NOTIFY_SOCKET")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
    return env | extra


def memkv_node(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs it to its end."""
    return subprocess.run(
        [sys.executable, "-m", "memkv.cli.node", *args],
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=60,
    )


@dataclass
class Running:
    """A node that has said that it is ready."""

    process: subprocess.Popen[str]
    address: str
    metrics: str

    def stop(self, number: int = signal.SIGTERM, timeout: float = 20.0) -> tuple[int, str]:
        """(exit code, everything on standard error)."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, err

    def group_is_empty(self) -> bool:
        """Whether nobody of the node's process group lives any more."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False


@contextlib.contextmanager
def running(*args: str, program: str | None = None, **env: str) -> Iterator[Running]:
    """A node on any free ports, over tcp unless ``args`` say otherwise; killed if the test did not stop it.

    :param program: Python to run instead of ``memkv.cli.node``; it has the arguments in ``sys.argv``.
    """
    start = ["-c", program] if program else ["-m", "memkv.cli.node"]
    command = [sys.executable, *start, "serve", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
    command += ["--fabric", "tcp", "--memory", "16M", "--ready-fd", "1", *args]
    process = subprocess.Popen(
        command,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline().split()
        if not line:
            raise AssertionError(process.communicate(timeout=START_SECONDS)[1])
        assert line[0] == "ready"
        yield Running(process, line[1], line[2])
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
