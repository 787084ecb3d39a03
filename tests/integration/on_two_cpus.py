"""The child of `test_devices`: TensorFlow with two logical CPU devices, which must be said before it starts.

Given the folder of a SavedModel ``y = matmul(x, w)``, it prints what it saw as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from service.batching.batcher import Batcher
from service.batching.queue import Lane, Limits
from service.batching.runner import ThreadRunner
from service.errors import ModelLoadError
from service.runtime import model as runtime_model
from service.runtime.base import PlanName
from service.runtime.devices import available_devices, load_tensorflow
from service.runtime.model import LoadedModel, RuntimeOptions
from service.runtime.planning import PlanningOptions
from service.runtime.table import Cell
from service.tensors import Tensors
from tests.fakes import FakeObserver
from tests.integration.planning_here import Here


def open_model(path: Path, device: str, plan: PlanName = "signature") -> LoadedModel:
    options = PlanningOptions(4, plan, budget_s=300.0)
    return LoadedModel(path, RuntimeOptions(options, device=device, plan_dir=path.parent / "plans"))


def placement(path: Path, device: str) -> dict[str, Any]:
    """Where the variables of a model are that is put on `device`, and where its operations ran."""
    tf = load_tensorflow()
    model = open_model(path, device)
    saved_model = model._replicas[0].load()
    session = saved_model._session
    feeds, fetches = saved_model._tensor_names["serving_default"]
    options = tf.compat.v1.RunOptions(trace_level=tf.compat.v1.RunOptions.FULL_TRACE)
    metadata = tf.compat.v1.RunMetadata()
    session.run(fetches, {feeds[0]: np.ones((1, 3), np.float32)}, options, metadata)
    ran = {
        stats.device.rpartition("device:")[2]
        for stats in metadata.step_stats.dev_stats
        if any("MatMul" in node.node_name for node in stats.node_stats)
    }
    operations = session.graph.get_operations()
    variables = {op.device.rpartition("device:")[2] for op in operations if op.type == "VarHandleOp"}
    model.close()
    return {"device": model.device, "parallel": model.parallel, "variables": sorted(variables), "ran": sorted(ran)}


def refusal(path: Path, device: str) -> str:
    try:
        open_model(path, device).close()
    except ModelLoadError as error:
        return str(error)
    return ""


class Meeting:
    """Plans that do not answer before both have been asked: proof that two run at once, each on its device."""

    def __init__(self, model: LoadedModel) -> None:
        self.ran: list[str] = []
        self._barrier = threading.Barrier(2)
        for replica in model._replicas:
            tables = dict(replica.tables)
            for name, table in tables.items():
                cells = {rows: self._joined(cell, replica.device) for rows, cell in table.cells.items()}
                tables[name] = replace(table, cells=cells, shared={})
            replica.swap(tables)

    def _joined(self, cell: Cell, device: str) -> Cell:
        def meet(inputs: Tensors) -> Tensors:
            self._barrier.wait(30)
            self.ran.append(device)
            return cell.run_piece(inputs)

        return replace(cell, run_piece=meet)


async def replicas(path: Path, plan: PlanName) -> dict[str, Any]:
    """Six full batches through the batcher onto a replica on each CPU."""
    model = open_model(path, "cpu:*", plan)
    model.warm_up()
    is_planned = model.plan()
    signature = model.signatures["serving_default"]
    rows = [np.full((4, 3), n, np.float32) for n in range(6)]
    alone = [model.run(Lane(signature, ((3,),), True, True), {"x": x})["y"] for x in rows]
    meeting = Meeting(model)
    runner = ThreadRunner("kiln-test", asyncio.get_running_loop(), model.parallel)
    batcher = Batcher(model, Limits(4, 64, 1 << 20), runner=runner, observer=FakeObserver())
    answers = await asyncio.gather(*(batcher.submit(signature, {"x": x}, None) for x in rows))
    is_drained = await batcher.stop(10.0)
    model.close()
    return {
        "device": model.device,
        "parallel": model.parallel,
        "ran": sorted(meeting.ran),
        "right": all(np.allclose(a["y"], y, 1e-4, 1e-5) for a, y in zip(answers, alone, strict=True)),
        "values": answers[2]["y"][0].tolist(),
        "planned": is_planned,
        "plans": sorted({cell.plan for cell in model.plans["serving_default"].chosen.values()}),
        "memory": sorted(model.memory),
        "drained": is_drained,
    }


def main(path: Path) -> None:
    tf = load_tensorflow()
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    setattr(runtime_model, "Planning", Here)  # noqa: B010 - the child would have one CPU
    plans: tuple[PlanName, ...] = ("signature", "frozen", "xla", "openvino")
    seen = {
        "available": available_devices(),
        "placed": {device: placement(path, device) for device in ("auto", "cpu", "cpu:0", "cpu:1")},
        "refused": {device: refusal(path, device) for device in ("cpu:2", "gpu", "gpu:*")},
        "replicas": {plan: asyncio.run(replicas(path, plan)) for plan in plans},
    }
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
