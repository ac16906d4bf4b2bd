"""Cuts the declarations that cffi needs out of our C headers, so that they are written once.

The headers are plain enough for that: what goes is preprocessor lines (but constants stay), inline functions,
assertions and comments. A header may mark what is for Python between ``/* cdef */`` and ``/* end cdef */``;
then the rest goes too.
"""

from __future__ import annotations

import re
from pathlib import Path

_MARKED = re.compile(r"^/\* cdef \*/\n(.*?)^/\* end cdef \*/\n", re.MULTILINE | re.DOTALL)
_INTEGER = re.compile(r"#define\s+(\w+)\s+(0x[0-9a-fA-F]+|[0-9]+)[uUlL]*\s*(?:/\*.*)?$")
_EXPRESSION = re.compile(r"#define\s+(MKV_\w+)\s+\(.*\)\s*(?:/\*.*)?$")  # the compiler works it out


def declarations(*headers: str | Path) -> str:
    """The cffi declarations of ``headers``, in order; a constant that comes twice is declared once."""
    out: list[str] = []
    seen: set[str] = set()
    for header in headers:
        text = Path(header).read_text(encoding="utf-8").replace("\\\n", " ")
        text = "".join(_MARKED.findall(text)) or text
        for line in text.splitlines():
            if (m := _INTEGER.match(line)) and m[1] not in seen:
                seen.add(m[1])
                out.append(f"#define {m[1]} {m[2]}")
            elif (m := _EXPRESSION.match(line)) and m[1] not in seen:
                seen.add(m[1])
                out.append(f"#define {m[1]} ...")
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        text = re.sub(r"^#.*$", "", text, flags=re.M)
        text = re.sub(r"^MKV_[A-Z_]+\(.*\);$", "", text, flags=re.M)
        text = re.sub(r"_Static_assert\(.*?\);", "", text, flags=re.S)
        text = re.sub(r"^static inline.*?\{(?:.*\}$|.*?^\})", "", text, flags=re.S | re.M)
        out.append(text)
    return "\n".join(out)
