"""OpenAPI examples of Triton's extensions, for the model `digits`."""

from __future__ import annotations

_TAKEN = {"count": 100, "ns": 20000000}
_COMPUTED = {"compute_input": _TAKEN, "compute_infer": _TAKEN, "compute_output": _TAKEN}
_NEVER = {"count": 0, "ns": 0}
STATISTICS = {
    "model_stats": [
        {
            "name": "digits",
            "version": "1",
            "last_inference": 1769860800000,
            "inference_count": 400,
            "execution_count": 100,
            "inference_stats": {
                "success": _TAKEN,
                "fail": _NEVER,
                "queue": _TAKEN,
                **_COMPUTED,
                "cache_hit": _NEVER,
                "cache_miss": _NEVER,
            },
            "batch_stats": [{"batch_size": 4, **_COMPUTED}],
            "memory_usage": [{"type": "CPU", "id": 0, "byte_size": 52428800}],
        }
    ]
}
CONFIGURATION = {
    "name": "digits",
    "platform": "keras",
    "backend": "tensorflow",
    "version_policy": {"latest": {"num_versions": 1}},
    "max_batch_size": 64,
    "input": [
        {
            "name": "image",
            "data_type": "TYPE_FP32",
            "dims": [8, 8, 1],
            "format": "FORMAT_NONE",
            "is_shape_tensor": False,
            "optional": False,
        }
    ],
    "output": [
        {
            "name": "output_0",
            "data_type": "TYPE_FP32",
            "dims": [10],
            "label_filename": "",
            "is_shape_tensor": False,
        }
    ],
    "instance_group": [{"name": "digits", "kind": "KIND_CPU", "count": 1, "gpus": []}],
    "model_transaction_policy": {"decoupled": False},
    "dynamic_batching": {
        "preferred_batch_size": [1, 2, 4, 8, 16, 32, 64],
        "max_queue_delay_microseconds": 0,
        "default_queue_policy": {"allow_timeout_override": True},
    },
}
TRACE = {"trace_level": ["OFF"]}
LOGGING = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "console",
}
