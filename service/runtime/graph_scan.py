"""Look a SavedModel over before TensorFlow loads it: such a folder is a program.

A graph can read and write files, open connections and run Python. Every node of every graph and
function in ``saved_model.pb`` is held against the tables below, whether it can run or not; only the
saver's own operations, which every SavedModel has, are let pass where nothing else reaches them.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from service.errors import ModelLoadError
from service.runtime.graph import MAIN, Graph, Reached

_READS, _WRITES = "reads files", "writes files"
_NETWORK, _CODE = "talks to other processes", "runs Python code"
_HIDDEN, _DEVICES = "holds a program that no scan can look into", "takes over the machine's devices"

REFUSED: dict[str, str] = {
    operation: why
    for why, operations in {
        _READS: "ReadFile MatchingFiles MatchingFilesDataset ImmutableConst RecordInput Skipgram LoadAndRemapMatrix "
        "GenerateVocabRemapping CSVDataset CSVDatasetV2 SqlDataset LMDBDataset LMDBReader WholeFileReader "
        "WholeFileReaderV2 TextLineReader TextLineReaderV2 FixedLengthRecordReader FixedLengthRecordReaderV2 "
        "IdentityReader IdentityReaderV2 TextLineDataset FixedLengthRecordDataset FixedLengthRecordDatasetV2 "
        "LoadDataset ListSnapshotChunksDataset DTensorRestoreV2 FileSystemSetConfiguration InitializeTRTResource",
        _WRITES: "SaveDataset SaveDatasetV2 DatasetToTFRecord CacheDataset CacheDatasetV2 DumpTensor SummaryWriter "
        "CreateSummaryFileWriter CreateSummaryDbWriter ImportEvent FlushSummaryWriter CloseSummaryWriter "
        "StatsAggregatorSetSummaryWriter CalibrationStatisticsSaver StoreMinibatchStatisticsInFdo DistributedSave "
        "SerializeTRTResource Copy CopyHost",
        _NETWORK: "RemoteCall Send Recv RegisterDataset RegisterDatasetV2 DeleteRpcFutureResource _HostSend _HostRecv "
        "_Send _Recv XlaHostCompute WorkerHeartbeat",
        _CODE: "EagerPyFunc",
        _HIDDEN: "DatasetFromGraph DeserializeIterator XlaCallModule XlaCustomCall XlaCustomCallV2 "
        "MlirPassthroughOp _TPUCompileMlir _XlaHostComputeMlir TRTEngineOp _VarHandlesOp",
        _DEVICES: "ConfigureDistributedTPU ConfigureAndInitializeGlobalTPU _ConfigureDistributedTPU "
        "ShutdownDistributedTPU ShutdownTPUSystem _ShutdownDistributedTPU _DisconnectHostFromDistributedTPUSystem "
        "_InitializeHostForDistributedTPU _WaitForDistributedTPU _SetGlobalTPUArray DTensorSetGlobalTPUArray "
        "UpdateTaskIdAndGlobalCoreArray",
    }.items()
    for operation in operations.split()
}
"""Operations that are refused wherever they are, and what they do. ``Experimental…`` counts as without it."""

REFUSED_PREFIXES: dict[str, str] = {
    "PyFunc": _CODE,
    "TFRecord": _READS,
    "Reader": _READS,
    "SnapshotDataset": _WRITES,
    "SnapshotChunkDataset": _READS,
    "SnapshotNestedDataset": _READS,
    "Write": _WRITES,
    "Debug": "dumps tensors into files or to other processes",
    "Collective": _NETWORK,
    "DataService": _NETWORK,
    "Nccl": _NETWORK,
    "_Nccl": _NETWORK,
    "Rpc": _NETWORK,
    "XlaSend": _NETWORK,
    "XlaRecv": _NETWORK,
    "_XlaSend": _NETWORK,
    "_XlaRecv": _NETWORK,
}
"""The same for whole families."""

HARMLESS = frozenset({"DebugGradientIdentity", "DebugGradientRefIdentity"})
"""Members of such a family that only compute."""

SAVES = frozenset("Save SaveSlices SaveV2 MergeV2Checkpoints".split())
RESTORES = frozenset("Restore RestoreSlice RestoreV2".split())
TABLE_FILES = frozenset("InitializeTableFromTextFile InitializeTableFromTextFileV2".split())
"""Operations that every loader needs, and that are refused unless they serve it alone: see `_misused`."""

_MAX_GRAPH_BYTES = 2**31 - 1
"""protobuf's limit of a message."""
_OWN_FOLDERS = ("variables", "assets", "assets.extra", "debug")
_INIT_OP, _INIT_COLLECTIONS = "__saved_model_init_op", ("saved_model_main_op", "legacy_init_op")
_ASSETS_COLLECTION = "saved_model_assets"
_ADVICE = "serve it only if you trust it: name the operation in allow_operations of the model's config"


def check_saved_model(path: Path, allowed: Collection[str] = ()) -> None:
    """Check the SavedModel folder `path`, all but the operations named in `allowed`.

    Raises:
        ModelLoadError: it is damaged, leads out of its folder, or has an operation that is refused;
            the text names operation, node and function.
    """
    check_files(path)
    for meta in _parse(path / "saved_model.pb").meta_graphs:
        check_assets(meta, path)
        check_graph(meta, allowed)


def check_files(path: Path) -> None:
    """Refuse links out of the folder, and whatever is neither file nor folder."""
    root = path.resolve()
    todo = [root / name for name in _OWN_FOLDERS]
    seen: set[Path] = set()
    for entry in todo:  # which grows meanwhile
        name = entry.relative_to(root)
        try:
            target = entry.resolve()
            if not target.is_relative_to(root):
                raise ModelLoadError(f"{name} is a link out of the SavedModel's folder")
            mode = target.stat().st_mode
            if stat.S_ISDIR(mode) and target not in seen:
                seen.add(target)
                todo += sorted(entry.iterdir())
        except FileNotFoundError:
            continue
        except (OSError, RuntimeError) as error:  # a link to itself is either
            raise ModelLoadError(f"{name} cannot be read: {error}") from None
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ModelLoadError(f"{name} is neither a file nor a folder")


def check_assets(meta: Any, path: Path) -> None:
    """Refuse assets of a ``MetaGraphDef`` whose names lead out of the folder ``assets``."""
    for asset in _assets(meta):
        parts = PurePosixPath(asset.filename).parts
        if not parts or parts[0] == "/" or ".." in parts or "://" in asset.filename or "\0" in asset.filename:
            raise ModelLoadError(f"the asset {asset.filename!r} leads out of the SavedModel's folder {path.name!r}")


def check_graph(meta: Any, allowed: Collection[str] = ()) -> None:
    """Refuse a ``MetaGraphDef`` with operations that are refused; see `check_saved_model`."""
    try:
        found = list(_refusals(meta, allowed))
    except IndexError:
        raise ModelLoadError("saved_model.pb is damaged: an operation lacks an input") from None
    if not found:
        return
    others = sorted({operation for operation, _ in found[1:]} - {found[0][0]})
    more = f" (and so are {', '.join(others)})" if others else ""
    raise ModelLoadError(f"{found[0][1]} is refused{more}; {_ADVICE}")


def reason(operation: str) -> str:
    """What an operation does that is refused wherever it is; ``""`` for all others."""
    name = operation.removeprefix("Experimental")
    if name in HARMLESS:
        return ""
    why = REFUSED.get(name)
    return why or next((text for prefix, text in REFUSED_PREFIXES.items() if name.startswith(prefix)), "")


def _parse(file: Path) -> Any:
    from tensorflow.core.protobuf import saved_model_pb2

    size = file.stat().st_size if file.is_file() else 0
    if size > _MAX_GRAPH_BYTES:
        raise ModelLoadError(f"{file.name} has {size} bytes: at most {_MAX_GRAPH_BYTES} expected")
    try:
        model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    except (OSError, MemoryError) as error:
        raise ModelLoadError(f"{file.name} cannot be read: {error}") from None
    except Exception as error:  # noqa: BLE001 - protobuf's own, which is not imported here
        raise ModelLoadError(f"{file.name} is damaged: {' '.join(str(error).split())}") from None
    if not model.meta_graphs:
        raise ModelLoadError(f"{file.name} is damaged: it holds no graph")
    return model


def _assets(meta: Any) -> list[Any]:
    """Where TensorFlow's loader looks: in the field, else in the older collection."""
    from tensorflow.core.protobuf import meta_graph_pb2

    if meta.asset_file_def:
        return list(meta.asset_file_def)
    if _ASSETS_COLLECTION not in meta.collection_def:
        return []
    packed = meta.collection_def[_ASSETS_COLLECTION].any_list.value
    try:
        return [meta_graph_pb2.AssetFileDef.FromString(each.value) for each in packed]
    except Exception as error:  # noqa: BLE001 - protobuf's own
        raise ModelLoadError(f"the list of assets is damaged: {error}") from None


def _refusals(meta: Any, allowed: Collection[str]) -> Iterator[tuple[str, str]]:
    """Operation and text of each node that is refused."""
    graph = Graph(meta.graph_def)
    runs = _Runs(meta, graph)
    for place, node in graph.places():
        if node.op in allowed:
            continue
        why = reason(node.op) or _by_attribute(node) or runs.misused(place, node)
        if why:
            where = f" in function {place!r}" if place != MAIN else ""
            yield node.op, f"node {node.name!r}{where}: the operation {node.op} {why}, and"


class _Runs:
    """What the server would run of a ``MetaGraphDef``, and what it feeds then."""

    def __init__(self, meta: Any, graph: Graph) -> None:
        signatures = {name: s.outputs.values() for name, s in meta.signature_def.items()}
        init = [info.name for info in signatures.get(_INIT_OP, ())]
        for name in _INIT_COLLECTIONS:
            if name in meta.collection_def:
                init += meta.collection_def[name].node_list.value
        served = [t for name, infos in signatures.items() if not name.startswith("__") for t in map(_tensors, infos)]
        self._graph = graph
        self._served = graph.reached(tensor for tensors in served for tensor in tensors)
        self._init = graph.reached(init)
        self._restore = graph.reached([meta.saver_def.restore_op_name])
        self._live = self._served | self._init | self._restore
        self._checkpoint = {meta.saver_def.filename_tensor_name}
        self._assets = {asset.tensor_info.name for asset in _assets(meta)}

    def misused(self, place: str, node: Any) -> str:
        """Why an operation that every loader needs is refused here; ``""`` if it is not, or is no such one.

        The saver's writing operations must not run at all; its reading ones only while the variables
        are restored, from the checkpoint that TensorFlow names then; and a table may be read from an
        asset only, by the init op, for which TensorFlow feeds the assets' paths.
        """
        if node.op in SAVES and self._live.has(place, node.name):
            return _WRITES
        if node.op in RESTORES and self._strays(place, node, 0, self._checkpoint, self._served | self._init):
            return "reads files other than the model's variables"
        if node.op in TABLE_FILES and self._strays(place, node, 1, self._assets, self._served | self._restore):
            return "reads a file that is no asset of the model"
        return ""

    def _strays(self, place: str, node: Any, name_input: int, known: Collection[str], elsewhere: Reached) -> bool:
        if elsewhere.has(place, node.name):
            return True
        if not self._live.has(place, node.name):
            return False
        return not self._graph.comes_from(place, node.input[name_input], known, self._live)


def _tensors(info: Any) -> Iterator[str]:
    """The tensors of a ``TensorInfo``: one, or the parts of a sparse or composite one."""
    yield from (info.name, info.coo_sparse.values_tensor_name, info.coo_sparse.indices_tensor_name)
    yield info.coo_sparse.dense_shape_tensor_name
    for part in info.composite_tensor.components:
        yield from _tensors(part)


def _by_attribute(node: Any) -> str:
    """Why an operation is refused for what it is set to."""
    if node.op not in _ATTRIBUTES:
        return ""
    attribute, is_harmless, why = _ATTRIBUTES[node.op]
    if attribute not in node.attr:
        return ""  # its default, which is harmless
    value = node.attr[attribute]
    return "" if value.WhichOneof("value") == "s" and is_harmless(value.s) else why


_CONSOLE = (b"", b"stderr", b"stdout", b"log(info)", b"log(warning)", b"log(error)")

_ATTRIBUTES: dict[str, tuple[str, Callable[[bytes], bool], str]] = {
    "PrintV2": ("output_stream", _CONSOLE.__contains__, _WRITES),
    "DecodeProtoV2": ("descriptor_source", lambda s: s == b"local://" or s.startswith(b"bytes://"), _READS),
    "EncodeProto": ("descriptor_source", lambda s: s == b"local://" or s.startswith(b"bytes://"), _READS),
    "FixedUnigramCandidateSampler": ("vocab_file", lambda s: not s, _READS),
}
"""Operations that are refused for the value of an attribute: which, what it may be, and what they do otherwise."""
