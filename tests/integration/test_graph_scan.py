"""What a SavedModel's graph may do: real graphs before the scan, and what is refused of them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import ModelLoadError
from service.runtime import graph_scan
from service.runtime.graph_scan import check_graph, check_saved_model, reason
from service.runtime.savedmodel import SavedModel
from tests.integration.saved_models import save_cnn, save_default

ADVICE = "is refused; serve it only if you trust it: name the operation in allow_operations of the model's config"


@pytest.fixture(scope="module")
def tf() -> Any:
    import tensorflow

    return tensorflow


def graph_of(tf: Any, build: Callable[[Any], Any]) -> Any:
    """A ``MetaGraphDef`` whose one signature answers what `build` makes of a batch of floats, or of an operation."""
    from tensorflow.core.protobuf import meta_graph_pb2

    meta = meta_graph_pb2.MetaGraphDef()
    with tf.Graph().as_default() as graph:
        made = build(tf.compat.v1.placeholder(tf.float32, (None,), "x"))
        with tf.control_dependencies([made]):
            tf.constant(1.0, name="y")
    meta.graph_def.CopyFrom(graph.as_graph_def())
    meta.signature_def["serving_default"].outputs["y"].name = "y:0"
    return meta


def refusal(meta: Any, *allowed: str) -> str:
    with pytest.raises(ModelLoadError) as caught:
        check_graph(meta, allowed)
    return str(caught.value)


DANGERS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "ReadFile": (lambda tf, x: tf.io.read_file("/etc/passwd"), "reads files"),
    "MatchingFiles": (lambda tf, x: tf.io.matching_files("/*"), "reads files"),
    "WriteFile": (lambda tf, x: tf.io.write_file("/tmp/x", "x"), "writes files"),
    "EagerPyFunc": (lambda tf, x: tf.py_function(lambda v: v, [x], tf.float32), "runs Python code"),
    "PyFunc": (lambda tf, x: tf.numpy_function(lambda v: v, [x], tf.float32), "runs Python code"),
    "PyFuncStateless": (
        lambda tf, x: tf.numpy_function(lambda v: v, [x], tf.float32, stateful=False),
        "runs Python code",
    ),
    "ImmutableConst": (
        lambda tf, x: tf.raw_ops.ImmutableConst(dtype=tf.float32, shape=[1], memory_region_name="/etc/passwd"),
        "reads files",
    ),
    "TFRecordDatasetV2": (
        lambda tf, x: tf.raw_ops.TFRecordDatasetV2(
            filenames="/a", compression_type="", buffer_size=1, byte_offsets=tf.constant([], tf.int64)
        ),
        "reads files",
    ),
    "TextLineDataset": (
        lambda tf, x: tf.raw_ops.TextLineDataset(filenames="/a", compression_type="", buffer_size=1),
        "reads files",
    ),
    "SnapshotDatasetV2": (
        lambda tf, x: tf.raw_ops.SnapshotDatasetV2(
            input_dataset=tf.data.Dataset.range(1)._variant_tensor, path="/a", output_types=[tf.int64],
            output_shapes=[()], reader_func_other_args=[], shard_func_other_args=[],
            reader_func=tf.function(lambda x: x).get_concrete_function(tf.TensorSpec(())),
            shard_func=tf.function(lambda x: x).get_concrete_function(tf.TensorSpec(())),
        ),
        "writes files",
    ),
    "PrintV2": (lambda tf, x: tf.print(x, output_stream="file:///tmp/x"), "writes files"),
    "DecodeProtoV2": (
        lambda tf, x: tf.io.decode_proto([b""], "a.B", ["c"], [tf.int32], descriptor_source="/etc/passwd").sizes,
        "reads files",
    ),
    "FixedUnigramCandidateSampler": (
        lambda tf, x: tf.random.fixed_unigram_candidate_sampler(
            tf.constant([[1]], tf.int64), 1, 1, unique=True, range_max=2, vocab_file="/etc/passwd"
        ).true_expected_count,
        "reads files",
    ),
    "DebugIdentity": (
        lambda tf, x: tf.raw_ops.DebugIdentity(input=x, debug_urls=["file:///tmp"]),
        "dumps tensors into files or to other processes",
    ),
    "CollectiveReduce": (
        lambda tf, x: tf.raw_ops.CollectiveReduce(
            input=x, group_size=2, group_key=1, instance_key=1, merge_op="Add", final_op="Id", subdiv_offsets=[0]
        ),
        "talks to other processes",
    ),
    "DatasetFromGraph": (
        lambda tf, x: tf.raw_ops.DatasetFromGraph(graph_def=""),
        "holds a program that no scan can look into",
    ),
    "SaveV2": (
        lambda tf, x: tf.raw_ops.SaveV2(prefix="/a", tensor_names=["x"], shape_and_slices=[""], tensors=[x]),
        "writes files",
    ),
    "RestoreV2": (
        lambda tf, x: tf.raw_ops.RestoreV2(
            prefix="/a", tensor_names=["x"], shape_and_slices=[""], dtypes=[tf.float32]
        )[0],
        "reads files other than the model's variables",
    ),
    "InitializeTableFromTextFileV2": (
        lambda tf, x: tf.raw_ops.InitializeTableFromTextFileV2(
            table_handle=tf.raw_ops.HashTableV2(key_dtype=tf.string, value_dtype=tf.int64),
            filename="/etc/passwd", key_index=-2, value_index=-1,
        ),
        "reads a file that is no asset of the model",
    ),
}  # fmt: skip
"""How each operation is put into a graph, and what is said of it."""


@pytest.mark.parametrize("operation", DANGERS)
@pytest.mark.parametrize("place", ["graph", "function", "branch"])
def test_a_dangerous_operation_is_refused_wherever_it_is(tf: Any, operation: str, place: str) -> None:
    """Operation, node and function are named; a function called by a branch is looked into as well."""
    build, what = DANGERS[operation]

    def made(x: Any) -> Any:
        if place == "graph":
            return build(tf, x)
        inside = tf.function(lambda v: (build(tf, v), v)[1])
        return inside(x) if place == "function" else tf.cond(tf.size(x) > 0, lambda: inside(x), lambda: x)

    meta = graph_of(tf, made)
    text = refusal(meta)
    where = "" if place == "graph" else " in function '[^']+'"
    assert re.fullmatch(rf"node '[^']+'{where}: the operation {operation} {re.escape(what)}, and {ADVICE}", text)
    check_graph(meta, {operation})


def test_all_that_is_refused_is_told_at_once(tf: Any) -> None:
    """The first operation is told in full, the others by name, so that all can be judged together."""
    meta = graph_of(tf, lambda x: tf.io.write_file(tf.io.read_file("a"), tf.io.read_file("b")))
    assert "the operation ReadFile reads files, and is refused (and so are WriteFile); " in refusal(meta)
    assert "the operation WriteFile writes files, and is refused; " in refusal(meta, "ReadFile")


def test_a_node_that_cannot_run_is_refused_too(tf: Any) -> None:
    """What no signature leads to may be led to by another way that nobody thought of."""
    meta = graph_of(tf, lambda x: x)
    meta.graph_def.node.add(name="aside", op="ReadFile", input=["y"])
    assert refusal(meta).startswith("node 'aside': the operation ReadFile reads files")


@pytest.mark.parametrize("value", ["stderr", "stdout", "log(info)"])
def test_printing_to_the_console_is_harmless(tf: Any, value: str) -> None:
    """Only files are a reason to refuse PrintV2; so it is with what reads a file only if told to."""
    streams = {"stderr": "stderr", "stdout": "stdout", "log(info)": "log(info)"}
    meta = graph_of(tf, lambda x: tf.raw_ops.PrintV2(input="a", output_stream=streams[value]))
    check_graph(meta)
    next(node for node in meta.graph_def.node if node.op == "PrintV2").ClearField("attr")
    check_graph(meta)


@pytest.mark.parametrize("source", [b"local://", b"bytes://\x0a"])
def test_a_descriptor_of_its_own_is_harmless(tf: Any, source: bytes) -> None:
    """DecodeProto may look in the program or in the graph itself."""
    check_graph(
        graph_of(tf, lambda x: tf.io.decode_proto([b""], "a.B", ["c"], [tf.int32], descriptor_source=source).sizes)
    )


def test_a_value_that_the_caller_fills_in_is_refused(tf: Any) -> None:
    """An attribute of a function's node may be left to its caller; nobody knows then what it will be."""
    meta = graph_of(tf, tf.print)
    next(node for node in meta.graph_def.node if node.op == "PrintV2").attr["output_stream"].placeholder = "stream"
    assert "the operation PrintV2 writes files" in refusal(meta)


SUSPICIOUS = re.compile(
    r"file|path|url|dir(ectory)?$|address|vocab_file|region|mlir|module$|debug|ckpt|prefix$|pattern$|^target$",
    re.IGNORECASE,
)
SUSPICIOUS_NAMES = re.compile(
    "File|Save|Restore|Read(er|File)|Record|Summary|Snapshot|Py|Rpc|Collective|Nccl|Remote|Recv|Send|Debug|Dump|Sql|LMDB"
    "|Checkpoint|Distributed|CustomCall|Mlir|FromGraph|ServiceDataset|Vocab|Print"
)
ONLY_COMPUTE = frozenset(
    "AudioSummary AudioSummaryV2 BoostedTreesExampleDebugOutputs BoostedTreesMakeStatsSummary CTCBeamSearchDecoder "
    "DebugGradientIdentity DebugGradientRefIdentity ExperimentalSetStatsAggregatorDataset "
    "ExperimentalStatsAggregatorSummary HistogramSummary ImageSummary MergeSummary ParseSequenceExample "
    "ParseSequenceExampleV2 ParseSingleSequenceExample Print RecvTPUEmbeddingActivations RegexFullMatch RegexReplace "
    "ScalarSummary SendTPUEmbeddingGradients SetStatsAggregatorDataset ShardedFilename ShardedFilespec Snapshot "
    "StaticRegexFullMatch StaticRegexReplace StatsAggregatorSummary TensorSliceDataset TensorSummary TensorSummaryV2 "
    "VarHandleOp _XlaAotOnlyVarHandleOp _XlaCompileMlirPlaceholderProgramKey".split()
)
"""Looked at one by one: what is called like a file, a network or a program is none."""


def test_the_table_knows_every_operation_of_this_tensorflow() -> None:
    """An operation of a newer TensorFlow that may have to do with files, networks or code is noticed here."""
    from tensorflow.core.framework import op_def_pb2
    from tensorflow.python.client import pywrap_tf_session

    operations = op_def_pb2.OpList.FromString(pywrap_tf_session.TF_GetBuffer(pywrap_tf_session.TF_GetAllOpList())).op
    assert len(operations) > 1500
    suspicious = {
        operation.name
        for operation in operations
        if SUSPICIOUS_NAMES.search(operation.name)
        or any(SUSPICIOUS.search(each.name) for each in (*operation.input_arg, *operation.attr))
    }
    let_pass = {name for name in suspicious if not reason(name)}
    for_loaders = graph_scan.SAVES | graph_scan.RESTORES | graph_scan.TABLE_FILES
    assert let_pass - for_loaders - graph_scan._ATTRIBUTES.keys() <= ONLY_COMPUTE


def test_models_as_they_are_written_pass(tf: Any, tmp_path: Path) -> None:
    """Savers of TensorFlow 2 and 1, tables, assets and Keras's layers are no reason to refuse anything."""
    (tmp_path / "words.txt").write_text("a\nb\n")
    index = tf.lookup.TextFileIndex
    module = tf.Module()
    module.table = tf.lookup.StaticHashTable(
        tf.lookup.TextFileInitializer(
            str(tmp_path / "words.txt"), tf.string, index.WHOLE_LINE, tf.int64, index.LINE_NUMBER
        ),
        -1,
    )
    module.weight = tf.Variable(2.0)
    look_up = tf.function(
        lambda x: {"y": tf.cast(module.table.lookup(x), tf.float32) * module.weight},
        input_signature=[tf.TensorSpec((None,), tf.string, "x")],
    )
    tf.saved_model.save(module, str(tmp_path / "assets"), signatures=look_up)
    save_cnn(tmp_path / "cnn")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.placeholder(tf.float32, (None, 2), "x")
        weight = tf.compat.v1.get_variable("weight", (2, 1), use_resource=False)
        file = tf.constant(str(tmp_path / "words.txt"))
        tf.compat.v1.add_to_collection(tf.compat.v1.GraphKeys.ASSET_FILEPATHS, file)
        table = tf.lookup.StaticHashTable(
            tf.lookup.TextFileInitializer(file, tf.string, index.WHOLE_LINE, tf.int64, index.LINE_NUMBER), -1
        )
        y = tf.matmul(x, weight) + tf.cast(table.lookup(tf.constant(["b"])), tf.float32)
        session.run([tf.compat.v1.global_variables_initializer(), tf.compat.v1.tables_initializer()])
        tf.compat.v1.saved_model.simple_save(session, str(tmp_path / "one"), {"x": x}, {"y": y})
    for name in ("assets", "cnn", "one"):
        check_saved_model(tmp_path / name)
        (tmp_path / "words.txt").unlink(missing_ok=True)  # TensorFlow has copied it into the model
        SavedModel(tmp_path / name).close()
    model = SavedModel(tmp_path / "assets")
    plan = model.plan(model.signatures["serving_default"])
    assert plan.run({"x": np.array([b"b", b"a", b"?"], object)})["y"].tolist() == [2, 0, -2]
    model.close()


def test_a_refused_model_is_not_loaded(tf: Any, tmp_path: Path) -> None:
    """TensorFlow never sees it; allowed in the config, it is served."""
    secret = tmp_path / "secret"
    secret.write_text("hidden")
    path = save_default(tmp_path / "model", lambda x: {"y": tf.io.read_file(str(secret)) + x}, x=(tf.string, (None,)))
    with pytest.raises(ModelLoadError, match="the operation ReadFile reads files"):
        SavedModel(path)
    model = SavedModel(path, allow_operations={"ReadFile"})
    answer = model.plan(model.signatures["serving_default"]).run({"x": np.array([b"!"], object)})
    assert answer["y"].tolist() == [b"hidden!"]
    model.close()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xff" * 100, "saved_model.pb is damaged: "),
        (b"", "saved_model.pb is damaged: it holds no graph"),
        (None, "saved_model.pb cannot be read: "),
    ],
)
def test_a_file_that_is_no_graph_is_refused(tmp_path: Path, content: bytes | None, text: str) -> None:
    """A graph that is missing, empty or damaged is told in one line."""
    if content is not None:
        (tmp_path / "saved_model.pb").write_bytes(content)
    with pytest.raises(ModelLoadError) as caught:
        check_saved_model(tmp_path)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    """What protobuf cannot hold is not read into memory first."""
    with (tmp_path / "saved_model.pb").open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(ModelLoadError) as caught:
        check_saved_model(tmp_path)
    assert str(caught.value) == "saved_model.pb has 2147483648 bytes: at most 2147483647 expected"


@pytest.mark.parametrize("form", ["field", "collection"])
@pytest.mark.parametrize("name", ["../words.txt", "/etc/passwd", "a/../../b", "s3://bucket/a", "", "a\0b"])
def test_an_asset_out_of_its_folder_is_refused(tf: Any, tmp_path: Path, form: str, name: str) -> None:
    """TensorFlow joins an asset's name to the folder as it is, and finds it in either of two places."""
    from tensorflow.core.protobuf import meta_graph_pb2

    meta = graph_of(tf, lambda x: x)
    asset = meta_graph_pb2.AssetFileDef(filename=name)
    if form == "field":
        meta.asset_file_def.append(asset)
    else:
        meta.collection_def["saved_model_assets"].any_list.value.add().Pack(asset)
    with pytest.raises(ModelLoadError) as caught:
        graph_scan.check_assets(meta, tmp_path / "model")
    assert str(caught.value) == f"the asset {name!r} leads out of the SavedModel's folder 'model'"
    asset.filename = "words/a..b.txt"
    del meta.asset_file_def[:]
    meta.asset_file_def.append(asset)
    graph_scan.check_assets(meta, tmp_path)


def test_damage_deeper_down_is_told(tf: Any) -> None:
    """A list of assets that is none, and an operation without its inputs, are refused as damage."""
    meta = graph_of(tf, DANGERS["RestoreV2"][0].__get__(tf))
    meta.collection_def["saved_model_assets"].any_list.value.add(value=b"\xff")
    with pytest.raises(ModelLoadError, match=r"^the list of assets is damaged: "):
        check_graph(meta)
    meta.ClearField("collection_def")
    meta.ClearField("signature_def")
    meta.saver_def.restore_op_name = "y"
    for node in meta.graph_def.node:
        if node.op == "RestoreV2":
            del node.input[:]
    assert refusal(meta) == "saved_model.pb is damaged: an operation lacks an input"


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    """A variable's file that is a link would show any file's bytes as weights; TensorFlow is not asked."""
    path = tmp_path / "model"
    save_cnn(path)
    data = path / "variables" / "variables.data-00000-of-00001"
    shutil.move(data, tmp_path / "data")
    data.symlink_to(tmp_path / "data")
    with pytest.raises(ModelLoadError) as caught:
        SavedModel(path)
    assert str(caught.value) == f"{data.relative_to(path)} is a link out of the SavedModel's folder"
