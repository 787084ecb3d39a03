"""The saver's and the tables' operations: where TensorFlow's loader needs them, and where they are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.errors import ModelLoadError
from service.runtime.graph import MAIN, Graph, Reached
from service.runtime.graph_scan import check_graph

WRITES = "the operation SaveV2 writes files"
STRANGE_CHECKPOINT = "the operation RestoreV2 reads files other than the model's variables"
STRANGE_TABLE = "the operation InitializeTableFromTextFileV2 reads a file that is no asset of the model"


@pytest.fixture(scope="module")
def tf() -> Any:
    import tensorflow

    return tensorflow


@pytest.fixture(scope="module")
def written(tf: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The ``MetaGraphDef`` of a model with a variable and a table that is read from an asset."""
    from tensorflow.core.protobuf import saved_model_pb2

    root = tmp_path_factory.mktemp("reach")
    (root / "words.txt").write_text("a\nb\n")
    index = tf.lookup.TextFileIndex
    module = tf.Module()
    module.weight = tf.Variable(2.0, name="weight")
    module.table = tf.lookup.StaticHashTable(
        tf.lookup.TextFileInitializer(
            str(root / "words.txt"), tf.string, index.WHOLE_LINE, tf.int64, index.LINE_NUMBER
        ),
        -1,
    )
    look_up = tf.function(
        lambda x: {"y": tf.cast(module.table.lookup(x), tf.float32) * module.weight},
        input_signature=[tf.TensorSpec((None,), tf.string, "x")],
    )
    tf.saved_model.save(module, str(root / "model"), signatures=look_up)
    model = saved_model_pb2.SavedModel.FromString(Path(root / "model" / "saved_model.pb").read_bytes())
    return bytes(model.meta_graphs[0].SerializeToString())


@pytest.fixture
def meta(written: bytes) -> Any:
    """A copy of it, to be tampered with."""
    from tensorflow.core.protobuf import meta_graph_pb2

    return meta_graph_pb2.MetaGraphDef.FromString(written)


def node(meta: Any, name: str) -> Any:
    return next(each for each in meta.graph_def.node if each.name == name)


def function(meta: Any, part: str) -> Any:
    return next(f for f in meta.graph_def.library.function if part in f.signature.name)


def inner(of: Any, operation: str) -> Any:
    return next(each for each in of.node_def if each.op == operation)


def calls(meta: Any, part: str) -> Any:
    """The node that calls the function whose name has `part`."""
    name = function(meta, part).signature.name
    return next(each for each in meta.graph_def.node if "f" in each.attr and each.attr["f"].func.name == name)


def add(meta: Any, name: str, operation: str, *inputs: str, calling: str = "") -> Any:
    made = meta.graph_def.node.add(name=name, op=operation, input=inputs)
    if calling:
        made.attr["f"].func.name = calling
    return made


def serve(meta: Any, tensor: str) -> None:
    meta.signature_def["serving_default"].outputs["more"].name = tensor


def save_as_a_signature(meta: Any) -> None:
    serve(meta, meta.saver_def.save_tensor_name)


def save_as_a_part_of_a_signature(meta: Any) -> None:
    """A composite tensor has parts, which may be composite again."""
    parts = meta.signature_def["serving_default"].outputs["more"].composite_tensor
    parts.components.add().composite_tensor.components.add().name = meta.saver_def.save_tensor_name


def save_at_start(meta: Any) -> None:
    node(meta, "NoOp").input.append("^" + meta.saver_def.save_tensor_name.partition(":")[0])


def save_while_restoring(meta: Any) -> None:
    meta.saver_def.restore_op_name = meta.saver_def.save_tensor_name


def save_in_place_of_another(meta: Any) -> None:
    """Grappler may take any function with the same ``api_implements``."""
    for part in ("traced_save", "signature_wrapper"):
        function(meta, part).attr["api_implements"].s = b"same"


def save_as_a_gradient(meta: Any) -> None:
    meta.graph_def.library.gradient.add(
        function_name=function(meta, "signature_wrapper").signature.name,
        gradient_func=function(meta, "traced_save").signature.name,
    )


def save_by_an_argument(meta: Any) -> None:
    """A function may be named within the arguments of a function."""
    call = calls(meta, "signature_wrapper")
    call.attr["f"].func.attr["g"].list.func.add(name=function(meta, "traced_save").signature.name)


def save_under_its_own_name(meta: Any) -> None:
    name = function(meta, "traced_save").signature.name
    add(meta, "direct", name, *calls(meta, "traced_save").input)
    serve(meta, "direct:0")


SAVING: list[Callable[[Any], None]] = [
    save_as_a_signature,
    save_as_a_part_of_a_signature,
    save_at_start,
    save_while_restoring,
    save_in_place_of_another,
    save_as_a_gradient,
    save_by_an_argument,
    save_under_its_own_name,
]


def restore_as_a_signature(meta: Any) -> None:
    serve(meta, meta.saver_def.restore_op_name + ":0")


def restore_at_start(meta: Any) -> None:
    node(meta, "NoOp").input.append("^" + meta.saver_def.restore_op_name)


def restore_at_start_by_a_collection(meta: Any) -> None:
    meta.collection_def["legacy_init_op"].node_list.value.append(meta.saver_def.restore_op_name)


def restore_a_constant_path(meta: Any) -> None:
    calls(meta, "traced_restore").input[0] = "Const"


def restore_another_output(meta: Any) -> None:
    calls(meta, "traced_restore").input[0] = "saver_filename:1"


def restore_a_path_of_its_own(meta: Any) -> None:
    restore = function(meta, "traced_restore")
    inner(restore, "RestoreV2").input[0] = "RestoreV2/tensor_names:output:0"


def restore_from_two_callers(meta: Any) -> None:
    restore = calls(meta, "traced_restore")
    add(meta, "again", restore.op, "Const", *restore.input[1:], calling=restore.attr["f"].func.name)
    restore.input.append("^again")


def restore_in_a_branch(meta: Any) -> None:
    restore = calls(meta, "traced_restore")
    restore.op = "StatelessIf"
    restore.attr["then_branch"].func.name = restore.attr["f"].func.name
    del restore.attr["f"]


def restore_with_a_list_of_arguments(meta: Any) -> None:
    function(meta, "traced_restore").signature.input_arg[1].number_attr = "N"


def restore_a_name_that_is_nowhere(meta: Any) -> None:
    inner(function(meta, "traced_restore"), "RestoreV2").input[0] = "nowhere"


RESTORING: list[Callable[[Any], None]] = [
    restore_as_a_signature,
    restore_at_start,
    restore_at_start_by_a_collection,
    restore_a_constant_path,
    restore_another_output,
    restore_a_path_of_its_own,
    restore_from_two_callers,
    restore_in_a_branch,
    restore_with_a_list_of_arguments,
    restore_a_name_that_is_nowhere,
]


def table_as_a_signature(meta: Any) -> None:
    serve(meta, calls(meta, "initializer").name + ":0")


def table_of_a_constant(meta: Any) -> None:
    calls(meta, "initializer").input[0] = "Const_1"


def table_without_assets(meta: Any) -> None:
    meta.ClearField("asset_file_def")


def table_of_a_variable_that_is_written_again(meta: Any) -> None:
    add(meta, "overwrite", "AssignVariableOp", "Variable", "Const_1")
    node(meta, "NoOp").input.append("^overwrite")


def table_of_a_variable_that_is_restored(meta: Any) -> None:
    calls(meta, "traced_restore").input[1] = "Variable"


def table_of_a_variable_that_is_handed_on(meta: Any) -> None:
    add(meta, "handle", "Identity", "Variable")
    node(meta, "NoOp").input.append("^handle")


def table_of_a_variable_with_a_second_handle(meta: Any) -> None:
    other = add(meta, "other", "VarHandleOp")
    other.attr["shared_name"].s = b"Variable"
    node(meta, "NoOp").input.append("^other")


def table_of_a_handle_that_is_no_variable(meta: Any) -> None:
    node(meta, "ReadVariableOp").input[0] = "hash_table"


def table_of_a_handle_from_two_callers(meta: Any) -> None:
    """Within a function nobody knows whose variable it is."""
    initializer = function(meta, "initializer")
    read = initializer.node_def.add(name="read", op="ReadVariableOp", input=[initializer.signature.input_arg[0].name])
    inner(initializer, "InitializeTableFromTextFileV2").input[1] = f"{read.name}:value:0"
    call = calls(meta, "initializer")
    add(meta, "again", call.op, "Variable_1", *call.input[1:], calling=call.attr["f"].func.name)
    node(meta, "NoOp").input.append("^again")


TABLES: list[Callable[[Any], None]] = [
    table_as_a_signature,
    table_of_a_constant,
    table_without_assets,
    table_of_a_variable_that_is_written_again,
    table_of_a_variable_that_is_restored,
    table_of_a_variable_that_is_handed_on,
    table_of_a_variable_with_a_second_handle,
    table_of_a_handle_that_is_no_variable,
    table_of_a_handle_from_two_callers,
]


def test_the_model_passes_as_it_was_written(meta: Any) -> None:
    """Its saver writes and reads variables, and its table is read from an asset: nothing is refused."""
    check_graph(meta)


@pytest.mark.parametrize(
    ("tamper", "text"),
    [(each, WRITES) for each in SAVING]
    + [(each, STRANGE_CHECKPOINT) for each in RESTORING]
    + [(each, STRANGE_TABLE) for each in TABLES],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_an_operation_of_the_loader_is_refused_elsewhere(meta: Any, tamper: Callable[[Any], None], text: str) -> None:
    """Whatever else leads to it, or hands it another file, it is refused by name."""
    tamper(meta)
    with pytest.raises(ModelLoadError) as caught:
        check_graph(meta)
    assert text in str(caught.value)


def handle_in_a_function(meta: Any) -> None:
    """The initializer reads the asset's path itself from the variable's handle."""
    initializer = function(meta, "initializer")
    path = initializer.signature.input_arg[0]
    initializer.node_def.add(name="read", op="ReadVariableOp", input=[path.name])
    copy = initializer.node_def.add(name="copy", op="Identity", input=["read:value:0"])
    inner(initializer, "InitializeTableFromTextFileV2").input[1] = f"{copy.name}:output:0"
    calls(meta, "initializer").input[0] = "Variable"


def written_in_a_function(meta: Any) -> None:
    """The variable is given the asset's path by a function."""
    assign = node(meta, "Variable/Assign")
    writer = meta.graph_def.library.function.add()
    writer.signature.name = "writer"
    for name in ("handle", "value"):
        writer.signature.input_arg.add(name=name)
    writer.node_def.add(name="assign", op="AssignVariableOp", input=["handle", "value"])
    assign.op = "StatefulPartitionedCall"
    assign.attr["f"].func.name = "writer"


def saved_aside(meta: Any) -> None:
    """A saver that nothing leads to, as TensorFlow 1 leaves them behind."""
    add(meta, "save_1/RestoreV2", "RestoreV2", "Const_1", "Const_1", "Const_1")
    add(meta, "save_1/SaveV2", "SaveV2", "Const_1", "Const_1", "Const_1")


@pytest.mark.parametrize("change", [handle_in_a_function, written_in_a_function, saved_aside])
def test_other_ways_to_the_same_end_pass(meta: Any, change: Callable[[Any], None]) -> None:
    """A path is followed through functions, copies and variables; what cannot run may stay."""
    change(meta)
    check_graph(meta)


def test_endless_loops_end(meta: Any) -> None:
    """Functions that call themselves are walked once, and what they pass on is not believed."""
    restore = function(meta, "traced_restore")
    name = restore.signature.name
    again = restore.node_def.add(name="again", op="StatefulPartitionedCall")
    again.input.extend(arg.name for arg in restore.signature.input_arg)
    again.attr["f"].func.name = name
    check_graph(meta)  # it hands on what it was given
    read = restore.node_def.add(name="read", op="ReadVariableOp", input=[restore.signature.input_arg[1].name])
    inner(restore, "RestoreV2").input[0] = f"{read.name}:value:0"
    with pytest.raises(ModelLoadError, match="RestoreV2 reads files other"):
        check_graph(meta)


def test_a_function_that_calls_only_itself_has_no_variable(tf: Any) -> None:
    """Reached by its tag alone, it has no caller that could say which variable it is given."""
    from tensorflow.core.framework import graph_pb2

    graph_def = graph_pb2.GraphDef()
    loop = graph_def.library.function.add()
    loop.signature.name = "loop"
    loop.signature.input_arg.add(name="handle")
    loop.node_def.add(name="read", op="ReadVariableOp", input=["handle"])
    loop.node_def.add(name="again", op="PartitionedCall", input=["handle"]).attr["f"].func.name = "loop"
    graph = Graph(graph_def)
    live = Reached(functions={"loop"})
    assert not graph.comes_from("loop", "read:value:0", ["x:0"], live)
    assert not graph.comes_from(MAIN, "nowhere:0", ["x:0"], live)
    assert graph.comes_from(MAIN, "x", ["x:0"], live)
