"""Execution plans against each other: eight models, batches of 1, 8 and 32 rows, all interleaved in one process.

``python -m load_tests.bench_plans`` plans each model as the server does, then measures every plan that can run
it beside TensorFlow's own signature, as `tf.saved_model.load` gives it, and prints a table. ``--json FILE`` and
``--plot FILE`` keep the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from load_tests import bench_models
from load_tests.bench import machine
from service.batching.queue import Lane
from service.registry.importer import import_model
from service.registry.repository import open_models
from service.runtime.base import PlanUnavailable
from service.runtime.candidates import Workshop, candidate_names
from service.runtime.devices import load_tensorflow
from service.runtime.drawing import Drawer
from service.runtime.measuring import measure
from service.runtime.model import LoadedModel, RuntimeOptions
from service.runtime.parity import disagreement
from service.runtime.planning import PlanningOptions
from service.runtime.records import SIGNATURE_PLAN
from service.runtime.savedmodel import SavedModel
from service.runtime.xla import keep_programs_in
from service.tensors import DEFAULT_SIGNATURE, Signature, Tensors, trailing_shapes

ROWS = (1, 8, 32)
_MAX_ROWS = 32
_RUNS = 40
_SECONDS_PER_PLAN = 0.8
TENSORFLOW = "TF signature"
CHOSEN = "chosen"


@dataclass(frozen=True)
class Cell:
    """One model at one number of rows: µs of each plan, and which one serves it."""

    model: str
    rows: int
    us: dict[str, float]
    chosen: str

    @property
    def speedup(self) -> float:
        """The chosen plan over TensorFlow's signature."""
        return self.us[TENSORFLOW] / self.us[CHOSEN]

    @property
    def over_session(self) -> float:
        """The chosen plan over the same signature in a session."""
        return self.us[SIGNATURE_PLAN] / self.us[CHOSEN]

    @property
    def off_best(self) -> float:
        """How much slower the choice is than the best plan in this run; 1 for none.

        Plans are compared without the few µs that it takes to find the one for a batch; what was chosen in pieces is
        known with them only.
        """
        choice = self.us.get(self.chosen, self.us[CHOSEN])
        return choice / min(us for name, us in self.us.items() if name not in (TENSORFLOW, CHOSEN))


def bench(name: str, path: Path, plan_dir: Path) -> list[Cell]:
    """Plan one model and measure it."""
    tf = load_tensorflow()
    options = RuntimeOptions(PlanningOptions(_MAX_ROWS, budget_s=120.0), plan_dir=plan_dir)
    model = LoadedModel(path, options)
    model.warm_up()
    model.plan(lambda text: print(f"  {name}: {text}", file=sys.stderr))
    saved = SavedModel(path)
    signature = model.signatures[DEFAULT_SIGNATURE]
    original = tf.saved_model.load(str(path)).signatures[DEFAULT_SIGNATURE]
    drawer = Drawer(signature)
    drawer.ranges = model.plans[DEFAULT_SIGNATURE].ranges
    workshop = Workshop(path, saved, None)
    plans = {n: p for n in (SIGNATURE_PLAN, *candidate_names("auto", "CPU:0")) if (p := _build(workshop, n, signature))}
    cells = []
    for rows in ROWS:
        inputs = drawer.batch(rows)
        expected = plans[SIGNATURE_PLAN].prepare(rows)(inputs)
        jobs: dict[str, Callable[[], Any]] = {TENSORFLOW: _eager(tf, original, inputs)}
        for plan_name, plan in plans.items():
            try:
                run = plan.prepare(rows)
                agrees = not disagreement(expected, run(inputs))
            except PlanUnavailable:
                continue
            if agrees:
                jobs[plan_name] = _bound(run, inputs)
        lane = Lane(signature, trailing_shapes(signature, inputs), conforms=True, fuses=True)
        jobs[CHOSEN] = _served(model, lane, inputs)
        jobs[CHOSEN]()  # as every plan has run once to be compared
        costs = measure(jobs, runs=_RUNS, seconds_per_plan=_SECONDS_PER_PLAN)
        us = {plan_name: cost.seconds * 1e6 for plan_name, cost in costs.items()}
        cells.append(Cell(name, rows, us, model.plans[DEFAULT_SIGNATURE].names[rows]))
        print(f"  {name} {rows}: {cells[-1].speedup:.2f}", file=sys.stderr)
    for plan in plans.values():
        plan.close()
    model.close()
    saved.close()
    return cells


def _build(workshop: Workshop, name: str, signature: Signature) -> Any:
    try:
        return workshop.build(name, signature)
    except PlanUnavailable:
        return None


def _eager(tf: Any, function: Any, inputs: Tensors) -> Callable[[], Any]:
    return lambda: {n: t.numpy() for n, t in function(**{n: tf.constant(a) for n, a in inputs.items()}).items()}


def _bound(run: Callable[[Tensors], Tensors], inputs: Tensors) -> Callable[[], Any]:
    return lambda: run(inputs)


def _served(model: LoadedModel, lane: Lane, inputs: Tensors) -> Callable[[], Any]:
    return lambda: model.run(lane, inputs)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def table(cells: Sequence[Cell]) -> str:
    """The table of README.md: µs, the signature's first."""
    names = [n for n in dict.fromkeys(n for c in cells for n in c.us) if n not in (TENSORFLOW, CHOSEN)]
    heads = ["model", "rows", TENSORFLOW, *names, "chosen", "speed-up", "over session", "off best"]
    lines = ["| " + " | ".join(heads) + " |", "|---|--:|" + "--:|" * (1 + len(names)) + "---|--:|--:|--:|"]
    for cell in cells:
        us = [f"{cell.us[n]:,.0f}" if n in cell.us else "–" for n in (TENSORFLOW, *names)]
        ratios = [f"{cell.speedup:.2f}", f"{cell.over_session:.2f}", f"{cell.off_best:.2f}"]
        lines.append("| " + " | ".join([cell.model, str(cell.rows), *us, cell.chosen, *ratios]) + " |")
    return "\n".join(lines)


def summary(cells: Sequence[Cell]) -> str:
    lines = []
    for rows in ROWS:
        of = [c for c in cells if c.rows == rows]
        lines.append(
            f"{rows} rows: geometric mean {geometric_mean([c.speedup for c in of]):.2f} × the TensorFlow signature, "
            f"{geometric_mean([c.over_session for c in of]):.2f} × the same in a session; "
            f"slowest cell {min(c.speedup for c in of):.2f} and {min(c.over_session for c in of):.2f}; "
            f"at most {max(c.off_best for c in of):.2f} × the best plan"
        )
    return "\n".join(lines)


def plot(cells: Sequence[Cell], file: Path) -> None:
    """Bars of the speed-up over TensorFlow's signature, for each model and number of rows."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "kiln"
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(cell.model for cell in cells))
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    width = 0.8 / len(ROWS)
    for number, rows in enumerate(ROWS):
        of = {cell.model: cell for cell in cells if cell.rows == rows}
        places = [place + (number - 1) * width for place in range(len(models))]
        bars = axes.bar(places, [of[m].speedup for m in models], width, label=f"{rows} rows")
        axes.bar_label(bars, [f"{of[m].speedup:.1f}" for m in models], fontsize=7)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(models)), models)
    axes.set_yscale("log")
    axes.set_ylabel("× TensorFlow's signature")
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Measure the models that are named, or all."""
    parser = argparse.ArgumentParser(description="Execution plans against each other.")
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    builders = [b for b in bench_models.PLANNED if not args.models or b.__name__ in args.models]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        keep_programs_in(folder / "plans" / "xla")
        bench_models.write(folder / "models", builders, digits=False)
        cells: list[Cell] = []
        for source in open_models(folder / "models").sources:
            path = import_model(source, cache_dir=folder / "cache", timeout_s=600)
            cells += bench(source.model, path, folder / "plans")
    order = [b.__name__ for b in builders]
    cells.sort(key=lambda cell: (order.index(cell.model), cell.rows))
    print(machine())
    print()
    print(table(cells))
    print()
    print(summary(cells))
    if args.json:
        args.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1))
    if args.plot:
        plot(cells, args.plot)


if __name__ == "__main__":
    main()
