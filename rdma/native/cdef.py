"""Cuts the declarations that cffi needs out of our C headers, so that they are written once.

The headers are plain enough for that: what goes is preprocessor lines (but integer constants stay), static
inline functions, static assertions and comments.
"""

from __future__ import annotations

import re
from pathlib import Path

_INTEGER = re.compile(r"#define\s+(\w+)\s+(0x[0-9a-fA-F]+|[0-9]+)[uUlL]*\s*(?:/\*.*)?$")


def declarations(*headers: str | Path) -> str:
    """The cffi declarations of ``headers``, in order; duplicates of an integer constant are dropped."""
    out: list[str] = []
    seen: set[str] = set()
    for header in headers:
        text = Path(header).read_text(encoding="utf-8").replace("\\\n", " ")
        constants = [m for m in map(_INTEGER.match, text.splitlines()) if m]
        for m in constants:
            if m[1] not in seen:
                seen.add(m[1])
                out.append(f"#define {m[1]} {m[2]}")
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        text = re.sub(r"^#.*$", "", text, flags=re.M)
        text = re.sub(r"^MKV_[A-Z_]+\(.*\);$", "", text, flags=re.M)
        text = re.sub(r"_Static_assert\(.*?\);", "", text, flags=re.S)
        text = re.sub(r"^static inline.*?\{(?:.*\}$|.*?^\})", "", text, flags=re.S | re.M)
        out.append(text)
    return "\n".join(out)
