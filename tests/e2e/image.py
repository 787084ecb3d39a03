"""The image of the Dockerfile, built by buildah over a Debian of debootstrap's, and started as an engine starts it."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.process import DIGITS, ROOT, Server

TOOLS = ("buildah", "debootstrap", "unshare", "nsenter")
BASE = "localhost/kiln-base"
IMAGE = "localhost/kiln"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_INDEX_OPTIONS = "index-url extra-index-url find-links trusted-host proxy cert client-cert timeout".split()
_ENTER = """
root=$1 user=$2 models=$3; shift 3
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=1777 tmpfs "$root/var/cache/kiln"
if [ -n "$models" ]; then mount --bind -o ro "$models" "$root/models"; fi
exec chroot --userspec="$user:0" --groups= "$root" "$@"
"""
"""What an engine does with a read-only root: only /proc, /dev, /tmp and the cache are mounted over it."""


class Buildah:
    """buildah with a store of its own in `folder`, which `close` removes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str | Path) -> str:
        """Run one command; what it writes to stdout. `AssertionError` with its last words if it fails."""
        store = ("--root", self.folder / "store", "--runroot", self.folder / "run")
        done = subprocess.run(
            ["buildah", *map(str, (*store, *arguments))],
            env={**os.environ, "STORAGE_DRIVER": os.environ.get("STORAGE_DRIVER", "overlay")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"buildah {arguments[0]}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout.strip()

    def close(self) -> None:
        for command in (("umount", "--all"), ("rm", "--all"), ("rmi", "--all", "--force")):
            self(*command)
        shutil.rmtree(self.folder, ignore_errors=True)


def make_base(buildah: Buildah, root: Path) -> int:
    """The image `BASE`, with what ``python:slim`` has of Debian and Python; returns its size in bytes."""
    packages = "python3,python3-venv,ca-certificates"
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", root],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    for folder in ("var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(root / folder)
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, root, "/")
    buildah("config", "--env", f"PATH={_PATH}", container)
    buildah("commit", "--quiet", container, BASE)
    buildah("rm", container)
    return size_bytes(root)


def build_image(buildah: Buildah, work: Path, **arguments: str) -> None:
    """The image `IMAGE` from the Dockerfile, with `arguments` as its build arguments, and digits to be baked."""
    context = work / "context"
    shutil.copytree(DIGITS, context / "models" / "digits" / DIGITS.name)  # the version whose answers the tests know
    for name in ("Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "constraints-cpu.txt"):
        shutil.copy(ROOT / name, context)
    shutil.copytree(ROOT / "service", context / "service", ignore=shutil.ignore_patterns("__pycache__"))
    (context / ".secret").write_text("a file that no image should have")
    options, places = pip_configuration()
    pip = work / "pip.conf"
    pip.write_text(options)
    mounts = [f"--volume={place}:{place}:ro" for place in places]
    given = [f"--build-arg={name}={value}" for name, value in {"BASE_IMAGE": BASE, **arguments}.items()]
    buildah(
        "bud", "--isolation", "chroot", "--pull-never", "--format", "docker", f"--secret=id=pip,src={pip}",
        *mounts, *given, "--tag", IMAGE, context,
    )  # fmt: skip


def pip_configuration() -> tuple[str, list[Path]]:
    """How pip finds packages here, as a pip.conf, and the files and folders of this machine that this needs."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    options: dict[str, str] = {}
    for line in listed:
        name, _, value = line.partition("=")
        option = name.rpartition(".")[2]
        if option in _INDEX_OPTIONS:
            options[option] = " ".join(ast.literal_eval(value).split())
    words = [word.removeprefix("file://") for value in options.values() for word in value.split()]
    places = [Path(word) for word in words if word.startswith("/") and Path(word).exists()]
    text = "".join(f"{name} = {value}\n" for name, value in options.items())
    return f"[global]\n{text}", [_mount_of(place) for place in places]


def _mount_of(place: Path) -> Path:
    """`place`, or the folder beside it where an index keeps the files that its pages link to."""
    return place.parent if place.name == "simple" else place


def size_bytes(folder: Path, skip: str = "") -> int:
    """Of all files below `folder`, each counted once, less those with the suffix `skip`."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    sizes = {(s.st_dev, s.st_ino): s.st_size for s in (path.stat() for path in files if path.suffix != (skip or None))}
    return sum(sizes.values())


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens at."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


class Container(Server):
    """A process of the image, the first one of its namespace, with its root read-only; in this machine's network."""

    def __init__(self, root: Path, config: Mapping[str, Any], log: Path, models: Path | None = None) -> None:
        """`root` has the image's files, and `config` is its configuration; `models` are mounted over its own."""
        self.log_path = log
        self.root = root
        self.config = config
        self._ports = None
        rest_port, grpc_port = free_ports(2)
        self.env = dict(each.split("=", 1) for each in config["Env"])
        self.env |= {"KILN_REST_PORT": str(rest_port), "KILN_GRPC_PORT": str(grpc_port)}
        command = [*config["Entrypoint"], *config["Cmd"]]
        enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", _ENTER, "sh"]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*enter, root, config["User"], models or "", *command], env=self.env, stdout=file, stderr=file
            )

    @property
    def inner(self) -> psutil.Process:
        """The image's own process, within ``unshare``."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def signal(self, number: int) -> None:  # type: ignore[override]
        self.inner.send_signal(number)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command beside it, as it runs itself."""
        target = ["--target", str(self.inner.pid), "--mount", "--pid", "--root"]
        user = ["--setuid", str(self.config["User"]), "--setgid", "0"]
        return subprocess.run(
            ["nsenter", *target, *user, "--", *command], env=self.env, capture_output=True, text=True, check=False
        )


@contextlib.contextmanager
def mounted(buildah: Buildah) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files of `IMAGE`, and its configuration in Docker's terms."""
    container = buildah("from", "--pull-never", IMAGE)
    try:
        about = json.loads(buildah("inspect", "--type", "image", IMAGE))
        yield Path(buildah("mount", container)), about["Docker"]["config"]
    finally:
        buildah("rm", container)
