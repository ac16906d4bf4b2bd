"""A click group whose every error is one line that ends with the knob to turn.

Exit codes: 0 done, 1 it cannot be done here, 2 a wrong flag or setting, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from ..rdma.errors import LocalError, MemKVError


class OneLineGroup(click.Group):
    """Prints ``PROGRAM: error: …`` instead of a usage text or a traceback."""

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        if not extra.pop("standalone_mode", True):
            return super().main(args, prog_name, standalone_mode=False, **extra)
        name = prog_name or self.name
        try:
            code = super().main(args, prog_name, standalone_mode=False, **extra)
        except click.UsageError as exc:
            if type(exc).__name__ == "NoArgsIsHelpError":  # click 8.2 and later
                exc.show()
                sys.exit(2)
            command = exc.ctx.command_path if exc.ctx else name
            _fail(name, f"{exc.format_message()} ({command} --help)", exc.exit_code)
        except click.ClickException as exc:
            _fail(name, exc.format_message(), exc.exit_code)
        except LocalError as exc:
            _fail(name, str(exc), 2)
        except MemKVError as exc:
            _fail(name, str(exc), 1)
        except (click.Abort, KeyboardInterrupt):
            sys.exit(130)
        except ImportError as exc:
            if "native" not in str(exc.name or ""):
                raise
            _fail(name, f"{exc} (the C core is not built: pip install . or setup.py build_ext --inplace)", 1)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(name: str | None, message: str, code: int) -> None:
    click.echo(f"{name}: error: {' '.join(message.split())}", err=True)
    sys.exit(code)
