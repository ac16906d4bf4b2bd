"""The cost model's figure: time to first token, utilisation and cost, with and without memkv.

matplotlib draws it (``pip install memkv[plot]``). Colours are Okabe and Ito's, which people who see colours
differently can tell apart; lines differ in their dashes as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..rdma.errors import LocalError
from .cost import Costs, fleet_cost
from .cost_setup import CASE_TITLES, CASES

COLOURS = {"none": "#999999", "hbm": "#E69F00", "host": "#56B4E9", "memkv": "#0072B2"}
DASHES: dict[str, Any] = {
    "none": (0, (1, 1)),
    "hbm": (0, (4, 2)),
    "host": (0, (6, 2, 1, 2)),
    "memkv": "solid",
}
NODE_COLOUR = "#D55E00"
SUFFIXES = (".svg", ".png", ".pdf")
_STYLE: Any = {  # matplotlib types every key by its name, only where it is installed
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "memkv",  # the same input gives the same file
}


def check(path: Path) -> None:
    """LocalError if the file's name or the installation is not one to plot with."""
    if path.suffix not in SUFFIXES:
        raise LocalError(f"--plot {path}", f"--plot takes a name that ends with {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise LocalError(f"--plot {path}: there is no such folder", "--plot FILE")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise LocalError("--plot needs matplotlib", "pip install memkv[plot]") from None


def draw(path: Path, costs: Costs) -> None:
    """Writes the figure; its kind follows from the suffix."""
    check(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 7.2), layout="constrained")
        (ttft, waits), (busy, cost) = figure.subplots(2, 2)
        _ttft(ttft, costs)
        _against_load(waits, costs, "ttft")
        _against_load(busy, costs, "busy")
        _cost(cost, costs)
        handles, labels = ttft.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(CASES), handlelength=3.2)
        figure.supxlabel(_caption(costs), fontsize=8, color="#555555")
        dated: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
        try:
            figure.savefig(path, dpi=150, metadata=dated)
        except OSError as error:
            raise LocalError(f"--plot {path}: {error.strerror}", "--plot FILE") from None


def _caption(costs: Costs) -> str:
    s = costs.setup
    return (
        f"A model, not a measurement of GPUs: {s.shape.name} on {s.replicas} × {s.gpus} {s.gpu_name}, "
        f"{len(costs.work)} requests in {costs.work.seconds / 60:.0f} min; "
        f"memkv: {s.nodes} node(s), {s.node_memory / 1e12:.1f} TB memory, {s.node_flash / 1e12:.0f} TB flash"
    )


def _line(axes: Any, case: str, x: Any, y: Any, **more: Any) -> None:
    width = 2.2 if case == "memkv" else 1.6
    axes.plot(
        *(x, y), color=COLOURS[case], linestyle=DASHES[case], linewidth=width, label=CASE_TITLES[case], **more
    )


def _ttft(axes: Any, costs: Costs) -> None:
    for case in CASES:
        times = np.sort(costs.base[case].ttft)
        shares = np.arange(1, len(times) + 1) / len(times) * 100
        at = np.unique(np.linspace(0, len(times) - 1, 400).astype(int))  # enough for the eye
        _line(axes, case, times[at], shares[at], gid=f"ttft-{case}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    first = min(np.percentile(costs.base[case].ttft, 0.5) for case in CASES)
    axes.set(xlabel="time to first token (s)", ylabel="requests (%)", ylim=(0, 101))
    axes.set_xlim(left=first * 0.8)
    axes.set_title("First tokens at the trace's rate")


def _against_load(axes: Any, costs: Costs, what: str) -> None:
    for case in CASES:
        results = [r for r in costs.sweep if r.case == case]
        x = [len(r.ttft) / r.seconds for r in results]
        y = [100 * r.busy if what == "busy" else float(np.percentile(r.ttft, 90)) for r in results]
        _line(axes, case, x, y, marker="o", markersize=3, gid=f"{what}-{case}")
    axes.set_xlabel("requests a second")
    axes.set_xlim(left=0)
    if what == "busy":
        axes.set(ylabel="GPU time in use (%)", ylim=(0, 104))
        axes.set_title("Utilisation: the same answers with fewer busy GPUs")
        return
    axes.set_yscale("log")
    axes.set_ylim(top=costs.setup.slo * 20)  # beyond, a queue only says how long the trace is
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axes.set_ylabel("TTFT, 90th percentile (s)")
    axes.set_title("First tokens against load")
    axes.axhline(costs.setup.slo, color="#444444", linewidth=0.8)
    axes.annotate(
        f"objective: {costs.setup.slo:g} s",
        (0.02, costs.setup.slo),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
        color="#444444",
    )


def _cost(axes: Any, costs: Costs) -> None:
    setup = costs.setup
    highest = [fleet_cost(result, setup) for result in costs.highest.values() if result]
    for i, case in enumerate(CASES):
        result = costs.highest[case]
        if result is None:
            axes.text(i, 0, "never", ha="center", va="bottom", fontsize=8)
            continue
        total = fleet_cost(result, setup)
        gpus = total * setup.hourly("none") / setup.hourly(case)
        axes.bar(i, gpus, width=0.62, color=COLOURS[case], gid=f"cost-{case}")
        axes.bar(i, total - gpus, width=0.62, bottom=gpus, color=NODE_COLOUR)
        if total > gpus:
            axes.annotate("nodes", (i + 0.33, (total + gpus) / 2), fontsize=8, color=NODE_COLOUR, va="center")
        rate = len(result.ttft) / result.seconds
        axes.text(i, total, f"${total:.3f}\n{rate:.1f} req/s", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(CASES)), [CASE_TITLES[case].replace(" + ", " +\n") for case in CASES])
    axes.set_xlim(-0.6, len(CASES) - 0.3)
    axes.set_ylim(top=1.2 * max(highest, default=1.0))
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("$ for a million tokens")
    axes.set_title(f"Cost at the highest load with p90 within {setup.slo:g} s")
