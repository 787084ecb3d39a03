"""Statistics as Triton's statistics extension tells them, pure."""

from __future__ import annotations

from typing import Any

from service.batching.statistics import Duration, VersionStatistics


def statistics_of(versions: list[VersionStatistics]) -> dict[str, Any]:
    """``ModelStatisticsResponse`` in the form that JSON has."""
    return {"model_stats": [_version(version) for version in versions]}


def _version(version: VersionStatistics) -> dict[str, Any]:
    statistics = version.statistics
    return {
        "name": version.model,
        "version": str(version.version),
        "last_inference": int(statistics.last_inference_s * 1e3),
        "inference_count": statistics.inference_count,
        "execution_count": statistics.execution_count,
        "inference_stats": {
            "success": _duration(statistics.success),
            "fail": _duration(statistics.fail),
            "queue": _duration(statistics.queue),
            "compute_input": _duration(statistics.compute_input),
            "compute_infer": _duration(statistics.compute_infer),
            "compute_output": _duration(statistics.compute_output),
            "cache_hit": _duration(Duration()),  # answers are not cached
            "cache_miss": _duration(Duration()),
        },
        "batch_stats": [
            {
                "batch_size": size.rows,
                "compute_input": _duration(size.compute_input),
                "compute_infer": _duration(size.compute_infer),
                "compute_output": _duration(size.compute_output),
            }
            for size in statistics.batches
        ],
        "memory_usage": [_memory(device, held) for device, held in sorted(version.memory_bytes.items())],
    }


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}


def _memory(device: str, held_bytes: int) -> dict[str, str | int]:
    kind, _, number = device.partition(":")
    return {"type": kind, "id": int(number or 0), "byte_size": held_bytes}
