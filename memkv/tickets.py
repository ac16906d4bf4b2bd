"""What a submitted batch is known by until it is reaped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .rdma.errors import MemKVError


@dataclass(slots=True, eq=False)
class Ticket:
    """``status`` is set when ``done``, unless the whole batch was refused: then ``error`` says why."""

    tag: object = None
    done: bool = False
    status: npt.NDArray[np.uint8] | None = None
    error: MemKVError | None = None


Then = Callable[[Ticket], None]  # called when a batch is done, on the peer's control thread
