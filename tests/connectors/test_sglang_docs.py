"""docs/engines/sglang.md says what there is."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from memkv.connectors.settings import Settings

DOC = (Path(__file__).parents[2] / "docs/engines/sglang.md").read_text()


def test_the_table_of_settings_is_that_of_the_code() -> None:
    section = DOC.partition("## Settings")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|", section, re.MULTILINE)
    told = {name: default.strip(" `") for name, default in rows}
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    assert list(told) == list(fields)
    for name, text in told.items():
        default = fields[name].default
        if default in (dataclasses.MISSING, None, "", ()):
            assert text == "", name
        else:
            assert text == str(default).lower(), name
