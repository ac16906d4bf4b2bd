"""memkv-node serve and status: settings, start, readiness, signals, and errors in one line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from memkv.cli import options
from memkv.cli.node import main, serve
from memkv.rdma import devices
from memkv.store.config import NodeConfig

from .nodes import Running, environment, memkv_node, running


def invoke(*args: str) -> Result:
    """The command in this process."""
    return CliRunner(env={"MEMKV_SECRET": ""}).invoke(main, args, prog_name="memkv-node")


def config_of(*args: str) -> dict[str, object]:
    """What ``serve`` with these arguments would serve with."""
    done = invoke("serve", "--print-config", *args)
    assert done.exit_code == 0, done.output
    return tomllib.loads(done.stdout)


# --- settings ---


def test_every_setting_has_a_flag_and_says_what_it_is() -> None:
    flags = {p.name: p for p in serve.params}

    for name in options.settings():
        assert "--" + name.replace("_", "-") in [*flags[name].opts, *flags[name].secondary_opts]
        assert name in options.HELP, f"cli/options.py: HELP does not say what {name} is"
    assert "secret" not in flags  # everybody can read the arguments of a process


def test_defaults_are_those_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMKV_SECRET", raising=False)

    config, _ = options.load(None, {})

    assert options.as_toml(config).replace(f'clock = "{config.clock}"', 'clock = "plain"') == options.as_toml(
        NodeConfig()
    )


def test_printed_settings_are_a_file_that_gives_the_same(tmp_path: Path) -> None:
    args = ["--listen", "[::1]:9", "--devices", "a,b", "--device", "c", "--memory", "3G", "--huge", "false"]
    args += [
        "--insecure",
        "--metrics",
        "127.0.0.1",
        "--grace-ms",
        "100",
        "--block-bytes",
        "65537",
        "--name",
        'a"b\\c',
    ]
    printed = invoke("serve", "--print-config", *args).stdout
    file = tmp_path / "node.toml"
    file.write_text(printed, encoding="utf-8")

    assert invoke("serve", "--print-config", "--config", str(file)).stdout == printed
    parsed = tomllib.loads(printed)
    assert parsed["devices"] == ["a", "b", "c"]
    assert parsed["metrics"] == "127.0.0.1:7421"
    assert parsed["memory"] == "3G"
    assert parsed["insecure"] is True


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('memory = "64M"\ngrace_ms = 100\ninsecure = true\nclock = "plain"\n', encoding="utf-8")

    got = config_of("--config", str(file), "--memory", "128M", "--no-insecure")

    assert (got["memory"], got["grace_ms"], got["insecure"], got["clock"]) == ("128M", 100, False, "plain")


@pytest.mark.parametrize(
    ("found", "args", "clock"),
    [
        ("QEMU", [], "strict"),
        (None, [], "plain"),
        ("QEMU", ["--clock", "plain"], "plain"),
        (None, ["--clock", "strict"], "strict"),
        ("QEMU", ["--clock", "auto"], "strict"),
    ],
)
def test_clock_is_strict_under_a_hypervisor(
    found: str | None, args: list[str], clock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "hypervisor", lambda: found)

    assert config_of(*args)["clock"] == clock


def test_secret_is_never_printed(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("correct horse\n")

    for done in (
        invoke("serve", "--print-config", "--secret-file", str(file)),
        CliRunner(env={"MEMKV_SECRET": "correct horse"}).invoke(main, ["serve", "--print-config"]),
    ):
        assert "horse" not in done.output
        assert "a secret is set" in done.output


# --- errors ---

BAD = [
    (["--fabric", "ib"], 2, "--fabric"),
    (["--grace-ms", "soon"], 2, "--grace-ms"),
    (["--grace-ms", "1"], 2, "--grace-ms"),
    (["--memory", "lots"], 2, "memory"),
    (["--memory", "1"], 2, "--memory"),
    (["--slab-size", "5"], 2, "--slab-bytes"),
    (["--align", "64"], 2, "--align"),
    (["--huge", "maybe"], 2, "huge"),
    (["--listen", "nonsense:x"], 2, "listen"),
    (["--metrics", "127.0.0.1:99999"], 2, "metrics"),
    (["--log-level", "loud"], 2, "--log-level"),
    (["--clock", "sundial"], 2, "--clock"),
    (["--device", "a,b,c,d,e"], 2, "--devices"),
    (["--no-such-flag"], 2, "--no-such-flag"),
    (["--config", "/nonexistent.toml"], 2, "--config"),
    (["--secret-file", "/nonexistent"], 2, "--secret-file"),
    (["--listen", "0.0.0.0:0"], 2, "--secret-file FILE or MEMKV_SECRET"),
    (["--listen", "0.0.0.0:0", "--print-config", "--memory", "x"], 2, "memory"),
    (["--ready-fd", "77"], 2, "--ready-fd"),
]


@pytest.mark.parametrize(("args", "code", "knob"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_wrong_setting_is_one_line_with_the_knob(args: list[str], code: int, knob: str) -> None:
    done = invoke("serve", *args)

    assert done.exit_code == code
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("memkv-node: error: ")
    assert knob in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("memory = ", "node.toml"),
        ("memroy = 1", "memroy"),
        ("grace_ms = '1'", "grace_ms"),
        ("fabric = 'x'", "fabric"),
    ],
)
def test_wrong_file_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text(text + "\n")

    done = invoke("serve", "--config", str(file))

    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_address_that_is_taken_ends_with_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = memkv_node(
            "serve", "--memory", "4M", "--listen", f"127.0.0.1:{other.getsockname()[1]}", "--fabric", "tcp"
        )

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("memkv-node: error: ")
    assert "listen" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(bool(devices.names()), reason="this machine has an RDMA device")
def test_verbs_that_was_demanded_ends_with_1_where_there_is_no_device() -> None:
    done = memkv_node("serve", "--fabric", "verbs", "--memory", "4M", "--listen", "127.0.0.1:0")

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "modprobe rdma_rxe" in done.stderr


# --- a node that runs ---


@pytest.fixture(scope="module")
def node() -> Iterator[Running]:
    with running() as it:
        yield it


def get(url: str) -> tuple[int, bytes]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.status, answer.read()


def test_ready_line_says_where(node: Running) -> None:
    host, port = node.address.rsplit(":", 1)
    socket.create_connection((host, int(port)), timeout=5).close()

    code, body = get(f"{node.metrics}/health")

    assert code == 200
    assert json.loads(body)["ok"] is True


def test_status_is_a_table(node: Running) -> None:
    done = memkv_node("status", "--metrics-url", node.metrics)

    assert done.returncode == 0, done.stderr
    for words in (node.address, "16 MiB", "tcp", "incarnation", "no namespaces"):
        assert words in done.stdout


def test_status_as_json_is_what_the_node_said(node: Running) -> None:
    done = memkv_node("status", "--json", "--address", node.metrics.removeprefix("http://"))

    assert done.returncode == 0
    assert json.loads(done.stdout)["address"] == node.address


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--address", "127.0.0.1:1"], 1, "--metrics"),
        (["--metrics-url", "node-1"], 2, "--metrics-url http://HOST:PORT"),
        (["--metrics-url", "http://x", "--address", "y"], 2, "one of them"),
        (["--address", "[::1"], 2, "--address"),
    ],
)
def test_status_without_a_node_is_one_line(args: list[str], code: int, words: str) -> None:
    done = invoke("status", *args)

    assert done.exit_code == code
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_status_of_the_wrong_port_says_so(node: Running) -> None:
    done = invoke("status", "--address", node.address)

    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert "not its --listen" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_it_cleanly_and_leaves_nothing(number: int) -> None:
    with running() as node:
        code, err = node.stop(number, timeout=10)

        assert code == 0
        assert node.group_is_empty()
    assert "has stopped" in err
    assert "Traceback" not in err


def test_banner_says_what_was_taken_and_why() -> None:
    with running() as node:
        _, err = node.stop()

    lines = dict(
        line.split(": ", 1)[1].split(None, 1) for line in err.splitlines() if line.startswith("memkv-node:")
    )
    assert lines["address"] == node.address
    assert lines["fabric"] == "tcp: tcp was asked for"
    assert lines["memory"].startswith("16 MiB")
    assert lines["metrics"] == f"{node.metrics}/metrics"
    assert "incarnation" in lines["node"]
    assert lines["access"].startswith("no secret")
    assert lines["clock"].startswith(("plain: ", "strict: "))
    assert "(" in lines["pages"]


HANGING = """
import asyncio, sys
from memkv.store import node
async def stop(self):
    await asyncio.sleep(3600)
node.Node.stop = stop
from memkv.cli.node import main
main(sys.argv[1:], prog_name="memkv-node")
"""


def test_second_signal_ends_it_at_once() -> None:
    with running("--stop-timeout", "60", program=HANGING) as node:
        node.process.send_signal(signal.SIGTERM)
        assert node.process.stderr is not None
        while "once more" not in node.process.stderr.readline():
            pass

        code, _ = node.stop(signal.SIGTERM, timeout=5)

        assert code == -signal.SIGTERM
        assert node.group_is_empty()


def test_stop_that_hangs_ends_all_the_same() -> None:
    with running("--stop-timeout", "1", program=HANGING) as node:
        code, err = node.stop(timeout=10)

    assert code == 1
    assert "not everything could be given back" in err


def test_log_as_json_is_one_object_a_line() -> None:
    with running("--log-format", "json") as node:
        code, err = node.stop()

    assert code == 0
    records = [json.loads(line) for line in err.splitlines()]
    ready = next(r for r in records if r["message"] == "ready")
    assert ready["address"] == node.address
    assert {"time", "level", "logger"} <= set(ready)


def test_systemd_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.settimeout(10)
        with running(NOTIFY_SOCKET=str(tmp_path / "notify")) as node:
            ready = supervisor.recv(4096).decode()
            node.stop()
            stopping = supervisor.recv(4096).decode()

    assert ready.startswith("READY=1\nSTATUS=serving on ")
    assert stopping == "STOPPING=1"


def test_ready_fd_of_its_own_is_closed_after_the_line() -> None:
    read, write = os.pipe()
    command = [sys.executable, "-m", "memkv.cli.node", "serve", "--listen", "127.0.0.1:0", "--memory", "4M"]
    command += ["--fabric", "tcp", "--ready-fd", str(write)]
    with subprocess.Popen(command, env=environment(), pass_fds=[write], stderr=subprocess.DEVNULL) as process:
        os.close(write)
        with os.fdopen(read) as pipe:
            line = pipe.read()  # until the node closes it
        process.terminate()

        assert process.wait(timeout=10) == 0
    assert line.startswith("ready 127.0.0.1:")
    assert line.endswith(" -\n")  # no metrics


def test_with_a_secret_it_serves_other_machines(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("correct horse")
    with running("--listen", "0.0.0.0:0", "--secret-file", str(tmp_path / "secret")) as node:
        code, err = node.stop()

    assert code == 0
    assert "shared secret" in err
