"""Write `service/rpc/_generated/` from the .proto files here; with ``--check`` only compare."""

from __future__ import annotations

import filecmp
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

HERE = Path(__file__).parent
TARGET = HERE.parent / "service" / "rpc" / "_generated"
PACKAGE = "service.rpc._generated"


def generate(target: Path) -> None:
    """Generate modules and their type stubs into `target`, one folder level per package."""
    files = sorted(str(path.relative_to(HERE)) for path in HERE.rglob("*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    code = protoc.main(
        ["protoc", f"-I{HERE}", f"-I{well_known}", f"--python_out={target}", f"--pyi_out={target}", *files]
    )
    if code:
        raise SystemExit(f"protoc failed with {code}")
    for path in sorted(target.rglob("*_pb2.py*")):
        text = path.read_text()
        for module in ("kiln.tensorflow.serving", "kiln.tensorflow", "inference"):
            text = text.replace(f"from {module} import", f"from {PACKAGE}.{module} import")
        path.write_text(text)
    for folder in [target, *(path for path in target.rglob("*") if path.is_dir())]:
        (folder / "__init__.py").write_text('"""Generated from `protos/`; see `protos/generate.py`."""\n')


def differences(left: Path, right: Path) -> list[str]:
    """Files that are not the same in both folders, as paths below them."""
    names = {str(p.relative_to(side)) for side in (left, right) for p in side.rglob("*.py*") if p.suffix != ".pyc"}
    return sorted(
        name
        for name in names
        if not (
            (left / name).is_file()
            and (right / name).is_file()
            and filecmp.cmp(left / name, right / name, shallow=False)
        )
    )


def main(arguments: list[str]) -> int:
    if arguments != ["--check"]:
        TARGET.mkdir(parents=True, exist_ok=True)
        generate(TARGET)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        changed = differences(Path(folder), TARGET)
    if changed:
        print(f"not what protos/ generates: {', '.join(changed)}; run `make protos`", file=sys.stderr)
    return int(bool(changed))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
