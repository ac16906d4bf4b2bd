"""Types of the compiled module: declarations come from the C headers beside this file (build.py)."""

from typing import Any

ffi: Any
lib: Any
