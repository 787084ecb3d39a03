"""Files of Keras 2 → what Keras 3 opens: the same layers, as Keras 3 writes them.

Only what has the same meaning is rewritten: an argument is dropped where its value is the only
thing that Keras 3 does, and refused where it is another. Pure but for `modernise`, which copies.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.errors import ModelLoadError
from service.registry.scan import H5_FAULTS, ZIP_FAULTS, check_members, owner_of, parse

HARD_SIGMOID = "keras2>hard_sigmoid"
"""The name under which Keras is given Keras 2's function: max(0, min(1, 0.2 x + 0.5)).

Keras 3 calls another one so: relu6(x + 3) / 6.
"""
_ADVICE = "export it with Keras 2 (model.export, or tf_keras) as a SavedModel and import that"

_RECURRENT = ("RNN", "SimpleRNN", "LSTM", "GRU", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D")
_DEPTHWISE = ("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D")
_TRANSPOSED = ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")

DEFAULTS: dict[str, tuple[tuple[str, ...], Any]] = {
    "time_major": (_RECURRENT, False),
    "groups": ((*_DEPTHWISE, *_TRANSPOSED), 1),
    "softmax_robust_masking": (("MultiHeadAttention",), False),
    "causal": (("Attention", "AdditiveAttention"), False),
    "renorm": (("BatchNormalization",), False),
    "virtual_batch_size": (("BatchNormalization",), None),
}
"""Arguments that Keras 3 lacks: of which layers, and the value that is what Keras 3 does."""

UNUSED: dict[str, tuple[str, ...]] = {
    "kernel_initializer": _DEPTHWISE,
    "kernel_regularizer": _DEPTHWISE,
    "kernel_constraint": _DEPTHWISE,
    "query_shape": ("MultiHeadAttention",),
    "key_shape": ("MultiHeadAttention",),
    "value_shape": ("MultiHeadAttention",),
    "fused": ("BatchNormalization",),
}
"""Arguments that are written and say nothing about what the layer computes."""

_CALLS_OF_TENSORFLOW = (
    "TFOpLambda",
    "SlicingOpLambda",
    "ClassMethod",
    "InstanceMethod",
    "InstanceProperty",
    "TensorFlowOpLayer",
)
_GONE = ("ThresholdedReLU", "LocallyConnected1D", "LocallyConnected2D", "RandomHeight", "RandomWidth", "DenseFeatures")
_LOOKUPS = ("TextVectorization", "StringLookup", "IntegerLookup")
_NESTED = ("Functional", "Model", "Sequential")


def modernise(source: Path, work: Path) -> Path:
    """The file for Keras to open: `source`, or if Keras 2 wrote it a translated copy in the folder `work`.

    Raises:
        ModelLoadError: the file is damaged, or a layer of it means something that Keras 3 has not;
            the text names the layer and what to do.
    """
    if source.suffix == ".keras":
        return _modernise_zip(source, work / "modern.keras")
    return _modernise_h5(source, work / "modern.h5")


def translate(config: Any) -> Any:
    """A model's config as Keras 2 wrote it, parsed, as Keras 3 reads it; see `modernise` for what is raised."""
    nested = _nested_models(config)
    return _translate(config, lambda value: _plain_layer(_shift_nodes(value, nested)))


def check_vocabularies(config: Any) -> None:
    """Refuse an ``.h5`` file's layers that have lost their vocabulary.

    Raises:
        ModelLoadError: such files keep no vocabulary that was learned with ``adapt()``, in any version of Keras.
    """

    def check(value: dict[str, Any]) -> dict[str, Any]:
        inner = value.get("config")
        if value.get("class_name") in _LOOKUPS and isinstance(inner, dict) and inner.get("vocabulary", 0) is None:
            raise ModelLoadError(
                f"{_who(value)} has no vocabulary: .h5 files do not keep what adapt() has learned; "
                "save the model as .keras"
            )
        return value

    _translate(config, check)


def _modernise_zip(source: Path, target: Path) -> Path:
    try:
        with zipfile.ZipFile(source) as old:
            check_members(old.infolist())
            names = old.namelist()
            if "config.json" not in names or "metadata.json" not in names:
                return source
            metadata = parse(old.read("metadata.json"))
            if not _is_keras_2(metadata.get("keras_version") if isinstance(metadata, dict) else None):
                return source
            config = translate(parse(old.read("config.json")))
            with zipfile.ZipFile(target, "w") as new:
                for name in dict.fromkeys(names):
                    if name == "config.json":
                        new.writestr(name, json.dumps(config))
                    elif not name.endswith("/"):
                        with old.open(name) as data, new.open(name, "w", force_zip64=True) as copy:
                            shutil.copyfileobj(data, copy)
    except ZIP_FAULTS as error:
        raise ModelLoadError(f"the .keras file is damaged: {error}") from None
    return target


def _modernise_h5(source: Path, target: Path) -> Path:
    import h5py

    try:
        with h5py.File(source, "r") as file:
            text, keras_version = file.attrs.get("model_config"), file.attrs.get("keras_version")
        if text is None:
            return source  # the scan says what is wrong
        config = parse(text)
        check_vocabularies(config)
        if not _is_keras_2(keras_version):
            return source
        config = translate(config)
        shutil.copyfile(source, target)
        with h5py.File(target, "r+") as file:
            file.attrs["model_config"] = json.dumps(config)
    except H5_FAULTS as error:
        raise ModelLoadError(f"the .h5 file is damaged: {error}") from None
    return target


def _is_keras_2(version: Any) -> bool:
    text = version.decode(errors="replace") if isinstance(version, bytes) else str(version)
    return text.startswith("2.")


def _translate(value: Any, change: Callable[[dict[str, Any]], Any], depth: int = 0) -> Any:
    """`value` with every object changed, the inner ones first."""
    if depth > 200:
        raise ModelLoadError("the model's config is nested deeper than 200 levels")
    if isinstance(value, list):
        return [_translate(item, change, depth + 1) for item in value]
    if isinstance(value, dict):
        return change({key: _translate(item, change, depth + 1) for key, item in value.items()})
    return value


def _plain_layer(value: dict[str, Any]) -> Any:
    """One object as Keras 3 has it; what is no layer comes back as it is."""
    name, config = value.get("class_name"), value.get("config")
    if not isinstance(name, str) or not isinstance(config, dict):
        return value
    if name in ("Policy", "PolicyV1") and isinstance(config.get("name"), str):
        return config["name"]
    if name in _CALLS_OF_TENSORFLOW:
        what = config.get("function") or config.get("method_name") or config.get("attr_name") or "an operation"
        raise ModelLoadError(f"{_who(value)} is refused: it calls {_tf(what)}, which Keras 3 cannot; {_ADVICE}")
    if name in _GONE:
        raise ModelLoadError(f"{_who(value)} is refused: Keras 3 has no such layer; {_ADVICE}")
    changed = {**value, "config": _plain_arguments(value, name, config)}
    if name == "MultiHeadAttention":
        changed.pop("build_config", None)  # of one input; Keras 3 asks for two, and sees them when it is called
    if name in _NESTED and "module" in value:
        changed["module"] = "keras" if name == "Sequential" else "keras.src.models.functional"
        changed["class_name"] = "Sequential" if name == "Sequential" else "Functional"
    return changed


def _who(value: dict[str, Any]) -> str:
    return owner_of(value) or f"a layer ({value.get('class_name')})"


def _tf(what: object) -> str:
    return f"tf.{what}" if isinstance(what, str) and "." in what else str(what)


def _plain_arguments(value: dict[str, Any], name: str, config: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, given in config.items():
        layers, default = DEFAULTS.get(key, ((), None))
        if name in layers:
            if given != default:
                raise ModelLoadError(f"{_who(value)} is refused: Keras 3 has no {key}={given!r}; {_ADVICE}")
        elif name not in UNUSED.get(key, ()):
            kept[key] = _old_function(key, given)
    if "module" in value and name != "InputLayer":
        kept.pop("batch_input_shape", None)  # in this format the model's InputLayer has it as well
    if name == "BatchNormalization" and isinstance(axis := kept.get("axis"), list) and len(axis) == 1:
        kept["axis"] = axis[0]
    if name == "GRU" and "units" in config:
        kept.setdefault("reset_after", False)  # files from before it was an argument
    return kept


def _old_function(key: str, given: Any) -> Any:
    if not key.endswith("activation") or given != "hard_sigmoid":
        return given
    return {"module": "builtins", "class_name": "function", "config": HARD_SIGMOID, "registered_name": "function"}


def _nested_models(config: Any) -> set[str]:
    """Names of the models that are layers of another."""
    found: set[str] = set()

    def note(value: dict[str, Any]) -> dict[str, Any]:
        if value.get("class_name") in _NESTED and isinstance(name := value.get("name"), str):
            found.add(name)
        return value

    _translate(config, note)
    return found


def _shift_nodes(value: dict[str, Any], nested: set[str]) -> dict[str, Any]:
    """Count the calls of a nested model from 0: in Keras 2 the first one is its own making."""
    keys = ("inbound_nodes", "input_layers", "output_layers")
    changed = {key: _shifted(item, nested) if key in keys else item for key, item in value.items()}
    if isinstance(nodes := changed.get("inbound_nodes"), list):
        changed["inbound_nodes"] = [_plain_call(node) for node in nodes]
    return changed


def _plain_call(node: Any) -> Any:
    """A call in Keras 3's own form where tensors are given by name, which it does not see in the old one.

    The old form is a list of ``[layer, node, tensor, arguments]``, of which the first has all arguments.
    """
    if not isinstance(node, list) or not all(_is_tensor(each) for each in node):
        return node
    named = {name: given for each in node if len(each) > 3 for name, given in each[3].items()}
    if not any(_is_tensor(given) for given in named.values()):
        return node
    tensors = [_tensor(each) for each in node]
    kwargs = {name: _tensor(given) if _is_tensor(given) else given for name, given in named.items()}
    return {"args": tensors if len(tensors) == 1 else [tensors], "kwargs": kwargs}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, list) and [type(item) for item in value[:3]] == [str, int, int]


def _tensor(reference: list[Any]) -> dict[str, Any]:
    """Keras 3 looks at the reference alone: the tensor itself comes from the layer that gives it."""
    config = {"shape": [1], "dtype": "float32", "keras_history": reference[:3]}
    return {"class_name": "__keras_tensor__", "config": config}


def _shifted(value: Any, nested: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _shifted(item, nested) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    if len(value) >= 3 and isinstance(value[0], str) and isinstance(value[1], int) and value[1] > 0:
        name, node, *rest = value
        return [name, node - 1 if name in nested else node, *(_shifted(item, nested) for item in rest)]
    return [_shifted(item, nested) for item in value]
