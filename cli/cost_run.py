"""The command replay with costs: plays the trace if it is to, models, prints and plots."""

from __future__ import annotations

import json
from typing import Any

from . import cost_report, cost_sensitivity, cost_work
from .cost import Costs, model
from .cost_measured import load_held
from .cost_options import CostOptions, setup_of
from .cost_sensitivity import Varied
from .replay import Played, Settings, requests_of, run
from .report import Steps, machine, print_result


def run_costs(settings: Settings, options: CostOptions, *, as_json: bool) -> int:
    """Prints the replay, if there was one, and the costs; returns the replay's errors."""
    if options.plot:
        from . import plot

        plot.check(options.plot)  # before, not after minutes of work
    requests, name = requests_of(settings.file, settings.requests, settings.seed)
    work = cost_work.of(requests)
    setup = setup_of(options, work)
    held = load_held(options.hits, len(work)) if options.hits else None
    played = None if options.model_only else run(settings)
    if played:
        held = played.held
    with Steps() as steps:
        costs = model(work, setup, options.loads, steps, held)
        varied = cost_sensitivity.vary(work, setup, steps) if options.sensitivity else []
    _print(played, name, costs, varied, as_json)
    if options.plot:
        plot.draw(options.plot, costs)
    return sum(row.errors for row in played.rows) if played else 0


def _print(played: Played | None, name: str, costs: Costs, varied: list[Varied], as_json: bool) -> None:
    heading: dict[str, Any] = played.heading if played else machine() | {"trace": name}
    rows = played.rows if played else []
    if as_json:
        doc: dict[str, Any] = {"heading": heading, "rows": [row.as_json() for row in rows]}
        doc |= {"held": played.held} if played else {}
        print(json.dumps(doc | {"cost": cost_report.as_json(costs, varied)}))
        return
    if played:
        print_result(heading, rows, as_json=False, notes=played.notes)
    else:
        print(f"trace  {name}")
    cost_report.print_tables(costs, varied)
