"""Parameters, log and trace settings, and configuration: plain values in and out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service import logs
from service.errors import FailedPrecondition, InvalidArgument, Unimplemented
from service.extensions.model_configuration import model_configuration
from service.extensions.parameters import flag, priority, text, timeout_s, whole_number
from service.extensions.repository import check_load, check_unload
from service.extensions.settings import change_log_settings, change_trace_settings, log_settings, trace_settings
from service.predictor import ModelInfo
from service.registry.config import ModelConfig
from service.registry.policy import All, Latest, Specific
from service.runtime.records import Chosen, SignatureRecord
from service.tensors import DataType, Signature, TensorSpec
from tests.fakes import DOUBLE

# Parameters


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [({}, None), ({"timeout": 0}, None), ({"timeout": 1500}, 0.0015), ({"priority": 3, "other": []}, None)],
)
def test_a_timeout_is_in_microseconds(parameters: dict[str, object], expected: float | None):
    """0 is none; unknown parameters are ignored."""
    assert timeout_s(parameters) == expected


def test_a_priority_is_none_unless_stated():
    """0 is what states none."""
    assert [priority(given) for given in ({}, {"priority": 0}, {"priority": 3})] == [0, 0, 3]


@pytest.mark.parametrize(("name", "read"), [("timeout", timeout_s), ("priority", priority)])
@pytest.mark.parametrize("value", [-1, 1.5, "7", True, None, 2**63])
def test_hints_are_whole_numbers(name: str, read: Callable[[dict[str, object]], object], value: object):
    """The text names the parameter and what came."""
    with pytest.raises(InvalidArgument, match=rf"parameter {name}.*: a whole number of at least 0 expected, got"):
        read({name: value})


def test_values_have_their_types():
    """Each is returned, or its default, or refused by name."""
    assert whole_number(2, "n", 1) == 2
    assert flag({"f": True}, "f")
    assert not flag({}, "f")
    assert text({"t": "x"}, "t") == "x"
    assert text({}, "t") == ""
    with pytest.raises(InvalidArgument, match="parameter f: true or false expected, got 1"):
        flag({"f": 1}, "f")
    with pytest.raises(InvalidArgument, match="parameter t: a string expected, got None"):
        text({"t": None}, "t")


# Repository


@pytest.mark.parametrize("name", ["config", "file:1/model.keras"])
def test_a_load_changes_nothing_of_the_model(name: str):
    """Rather than load something else than was meant."""
    with pytest.raises(Unimplemented, match=f"parameter '{name}': models are loaded as they lie"):
        check_load({name: "{}"})
    check_load({"other": 1})


def test_an_unload_has_no_dependents():
    """The parameter is taken, if it is of its type."""
    check_unload({"unload_dependents": True})
    with pytest.raises(InvalidArgument, match="parameter unload_dependents: true or false"):
        check_unload({"unload_dependents": "yes"})


# Log


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    logger, root = logging.getLogger("kiln"), logging.getLogger()
    before = logger.level, root.handlers[:], root.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(before[0])
    root.handlers[:], root.level = before[1:]


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({"log_verbose_level": 1}, logging.DEBUG),
        ({"log_verbose_level": 4}, logging.DEBUG),
        ({}, logging.INFO),
        ({"log_info": None}, logging.INFO),
        ({"log_info": False}, logging.WARNING),
        ({"log_info": False, "log_warning": False}, logging.ERROR),
    ],
)
def test_switches_set_the_level(changes: dict[str, Any], level: int):
    """And what is told is what is so."""
    told = change_log_settings(changes)
    assert logging.getLogger("kiln").level == level
    assert told == log_settings()
    assert told["log_info"] is (level <= logging.INFO)
    assert told["log_warning"] is (level <= logging.WARNING)
    assert told["log_verbose_level"] == int(level == logging.DEBUG)


def test_all_switches_off_is_silence():
    """Not even errors; and on again."""
    off = dict.fromkeys(("log_info", "log_warning", "log_error"), False)
    assert change_log_settings(off).items() >= off.items()
    assert not logging.getLogger("kiln").isEnabledFor(logging.CRITICAL)
    on = dict.fromkeys(off, True)
    assert change_log_settings(on).items() >= on.items()
    assert logging.getLogger("kiln").level == logging.INFO


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_infos": True}, "unknown log setting 'log_infos': log_file, log_info, log_warning, log_error, "),
        ({"log_info": 1}, "log setting log_info: true or false expected, got 1"),
        ({"log_verbose_level": True}, "log setting log_verbose_level: a whole number of at least 0 expected, got True"),
        ({"log_verbose_level": -1}, "log setting log_verbose_level: a whole number of at least 0 expected, got -1"),
        ({"log_file": "x"}, "log setting log_file: '' until the server is started anew, got 'x'"),
        ({"log_format": "ISO8601"}, "log setting log_format: 'console' until the server is started anew"),
        ({"log_warning": False}, "log setting log_warning: true expected while log_info is on: it is the more severe"),
        ({"log_info": False, "log_verbose_level": 1}, "log_info: true expected while log_verbose_level is on"),
    ],
)
def test_log_settings_that_cannot_be(changes: dict[str, Any], message: str):
    """Each by name, and nothing is changed, not even by what came with it."""
    logs.configure("info", "console")
    with pytest.raises(InvalidArgument) as refused:
        change_log_settings({"log_error": True, **changes})
    assert message in str(refused.value)
    assert logging.getLogger("kiln").level == logging.INFO


@pytest.mark.parametrize("form", ["console", "json"])
def test_the_form_is_told(form: str):
    """As it was configured; setting it to what it is changes nothing."""
    logs.configure("info", form)
    assert change_log_settings({"log_format": form, "log_file": ""})["log_format"] == form


# Trace


@pytest.mark.parametrize("changes", [{}, {"trace_level": "OFF"}, {"trace_level": ["OFF"]}, {"trace_rate": None}])
def test_tracing_is_off(changes: dict[str, Any]):
    """And can be told to be so."""
    assert change_trace_settings(changes) == trace_settings() == {"trace_level": ["OFF"]}


@pytest.mark.parametrize(
    "changes", [{"trace_level": ["TIMESTAMPS"]}, {"trace_level": ["OFF", "TENSORS"]}, {"trace_rate": "1"}]
)
def test_tracing_cannot_be_turned_on(changes: dict[str, Any]):
    """Rather than to accept it and trace nothing."""
    with pytest.raises(Unimplemented, match=f"trace setting {next(iter(changes))}: requests are not traced"):
        change_trace_settings(changes)


def test_an_unknown_trace_setting_is_refused():
    """By name."""
    with pytest.raises(InvalidArgument, match="unknown trace setting 'level': trace_level, "):
        change_trace_settings({"level": "OFF"})


# Configuration


def info(signature: Signature = DOUBLE, **keys: Any) -> ModelInfo:
    defaults: dict[str, Any] = {"device": "CPU:0", "max_batch_rows": 6, "batch_wait_s": 0.002}
    return ModelInfo("m", 1, (1,), "keras", {signature.name: signature}, **{**defaults, **keys})


def test_a_model_that_is_batched():
    """Shapes without their rows, the buckets, and the wait in µs."""
    assert model_configuration(info()) == {
        "name": "m",
        "platform": "keras",
        "backend": "tensorflow",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 6,
        "input": [
            {
                "name": "x",
                "data_type": "TYPE_FP32",
                "dims": [3],
                "format": "FORMAT_NONE",
                "is_shape_tensor": False,
                "optional": False,
            }
        ],
        "output": [
            {"name": "y", "data_type": "TYPE_FP32", "dims": [3], "label_filename": "", "is_shape_tensor": False}
        ],
        "instance_group": [{"name": "m", "kind": "KIND_CPU", "count": 1, "gpus": []}],
        "model_transaction_policy": {"decoupled": False},
        "dynamic_batching": {
            "preferred_batch_size": [1, 2, 4, 6],
            "max_queue_delay_microseconds": 2000,
            "default_queue_policy": {"allow_timeout_override": True},
        },
        "plans": {},
    }


def test_the_buckets_are_those_that_plans_are_prepared_for():
    """Once plans are known their batch sizes are preferred; each signature's plans are told."""
    plans = {"serving_default": SignatureRecord({n: Chosen("xla", n, 0.001) for n in (1, 6)})}
    told = model_configuration(info(plans=plans))
    assert told["dynamic_batching"]["preferred_batch_size"] == [1, 6]
    assert told["plans"]["serving_default"]["chosen"]["6"] == {"plan": "xla", "us": 1000.0}


def test_a_model_that_is_not_batched():
    """No largest batch, whole shapes, and strings under Triton's name for them."""
    signature = Signature(
        "f",
        (TensorSpec("s", DataType.BYTES, (2, None)),),
        (TensorSpec("t", DataType.BF16, (2,), labels=("a", "b")),),
    )
    told = model_configuration(info(signature))
    assert told["max_batch_size"] == 0
    assert "dynamic_batching" not in told
    assert (told["input"][0]["data_type"], told["input"][0]["dims"]) == ("TYPE_STRING", [2, -1])
    assert (told["output"][0]["data_type"], told["output"][0]["label_filename"]) == ("TYPE_BF16", "labels.txt")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Latest(2), {"latest": {"num_versions": 2}}),
        (All(), {"all": {}}),
        (Specific(frozenset({3, 1})), {"specific": {"versions": [1, 3]}}),
    ],
)
def test_the_policy_is_told(policy: Any, expected: dict[str, Any]):
    """In each of its forms."""
    assert model_configuration(info(config=ModelConfig(versions=policy)))["version_policy"] == expected


@pytest.mark.parametrize(
    ("device", "kind", "count", "gpus"),
    [
        ("CPU:0, CPU:1", "KIND_CPU", 2, []),
        ("GPU:0, GPU:2", "KIND_GPU", 1, [0, 2]),
        ("TPU:0", "KIND_AUTO", 1, []),
    ],
)
def test_instances_are_replicas(device: str, kind: str, count: int, gpus: list[int]):
    """One on each device; Triton counts them per GPU."""
    (group,) = model_configuration(info(device=device))["instance_group"]
    assert group == {"name": "m", "kind": kind, "count": count, "gpus": gpus}


def test_a_model_without_a_default_signature_has_no_configuration():
    """The text names those that there are."""
    signatures = {name: Signature(name, DOUBLE.inputs, DOUBLE.outputs) for name in ("a", "b")}
    with pytest.raises(FailedPrecondition, match="this model has a, b"):
        model_configuration(ModelInfo("m", 1, (1,), "keras", signatures))
