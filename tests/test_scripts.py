"""script/: what can be checked without booting anything."""

import gzip
import lzma
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "script"


def bash(command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``command`` with the libraries of script/lib at hand."""
    prelude = "set -euo pipefail; for f in common kernel vm; do . lib/$f.sh; done\n"
    return subprocess.run(
        ["bash", "-c", prelude + command],
        cwd=SCRIPT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", ["setup", "softroce", "test", "demo"])
def test_help_says_what_the_script_is_for(name: str) -> None:
    done = subprocess.run([SCRIPT / name, "-h"], capture_output=True, text=True, timeout=60, check=True)
    assert f"script/{name}" in done.stdout
    assert "set -euo" not in done.stdout


def test_softroce_inside_softroce_runs_the_command_itself() -> None:
    done = subprocess.run(
        [SCRIPT / "softroce", "bash", "-c", 'echo "$1"; exit 7', "-", "a  b"],
        env=os.environ | {"MEMKV_SOFTROCE_RUNG": "host"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (7, "a  b\n")


def test_the_guest_gets_arguments_environment_and_directory_unharmed(tmp_path: Path) -> None:
    odd = "two  spaces, a\nnew line, 'quotes\", $HOME, `id`, \\ and é"
    place = tmp_path / "a 'place"
    place.mkdir()
    (tmp_path / "show").write_text('pwd; printf "%s|" "$ODD" "$@"\n')
    where = shlex.quote(str(place))
    made = bash(f'cd {where}; vm_command "" bash ../show "$ODD" "" last > ../command', ODD=odd)
    assert made.returncode == 0, made.stderr
    ran = subprocess.run(
        ["bash", tmp_path / "command"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == f"{place}\n{odd}|{odd}||last|"


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bytes])
def test_modules_are_unpacked_whatever_packed_them(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    body = b"\x7fELF" + bytes(5000)
    (tmp_path / "module").write_bytes(pack(body))
    done = bash(f"unpack {tmp_path}/module > {tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_bytes() == body


def test_an_unknown_rung_is_refused() -> None:
    env = {k: v for k, v in os.environ.items() if k != "MEMKV_SOFTROCE_RUNG"} | {"MEMKV_SOFTROCE": "ladder"}
    done = subprocess.run(
        [SCRIPT / "softroce", "true"], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    assert "host, modprobe, kvm and tcg" in done.stderr
