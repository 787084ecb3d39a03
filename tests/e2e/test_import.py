"""``kiln import`` and `service.export` as processes: what they print works with the server that they name."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import Digits, Start
from tests.e2e.process import MODELS, ROOT, Server, environment

pytestmark = pytest.mark.timeout(500)
TRAIN = """
import sys
import keras
import numpy as np
import service

assert "tensorflow" in sys.modules  # by Keras, which was there first

class Twice(keras.layers.Layer):
    def call(self, x):
        return 2 * x

x = np.random.default_rng(0).standard_normal((16, 3), dtype=np.float32)
model = keras.Sequential([keras.Input((3,), name="x"), keras.layers.Dense(2)])
model.compile("sgd", "mse")
callback = service.ExportCallback(sys.argv[1] + "/line", labels=["up", "down"], save_best_only=True, monitor="loss")
model.fit(x, x[:, :2], epochs=2, verbose=0, callbacks=[callback])
assert callback.exported.difference < 1e-5
own = keras.Sequential([keras.Input((3,), name="x"), Twice()])
print(service.export(own, sys.argv[1] + "/own"))
"""


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def paste(report: str, server: Server) -> dict:
    """The answer to the last line of `report`, but for the port."""
    line = report.splitlines()[-1]
    assert line.startswith("curl -s localhost:8501/")
    done = subprocess.run(
        ["bash", "-c", line.replace(":8501", f":{server.rest_port}")], capture_output=True, check=True, timeout=60
    )
    answer: dict = json.loads(done.stdout)
    return answer


def test_what_is_imported_is_served(tmp_path: Path, cache: Path, start: Start, digits: Digits):
    """The file becomes a version with its labels, and the printed command is answered; so is what Python exported."""
    (tmp_path / "names").write_text("".join(f"digit {n}\n" for n in range(10)))
    models = tmp_path / "models"
    done = python(
        *("-m", "service", "import", MODELS / "digits/1/model.keras", "--models", models, "--name", "read"),
        *("--labels", tmp_path / "names", "--cache-dir", cache),
    )
    assert done.returncode == 0, done.stderr
    assert f"read version 1: {models}/read/1\n" in done.stdout
    assert "parity: the largest difference from Keras is " in done.stdout
    trained = python("-c", TRAIN, models)
    assert trained.returncode == 0, trained.stderr
    assert sorted(path.name for path in models.iterdir()) == ["line", "own", "read"]
    assert (models / "line/1/model.keras").is_file()

    server = start(models)
    assert np.shape(paste(done.stdout, server)["predictions"]) == (1, 10)
    own = paste(trained.stdout, server)["predictions"]
    asked = json.loads(shlex.split(trained.stdout.splitlines()[-1])[-1])["instances"]
    np.testing.assert_allclose(own, 2 * np.array(asked), 1e-5)
    status, answer = server.predict({"instances": digits.images[:4].tolist()}, "read")
    assert status == 200
    np.testing.assert_allclose(answer["predictions"], digits.probabilities[:4], 1e-4, 1e-5)
    image = {"name": "image", "shape": [1, 8, 8, 1], "datatype": "FP32", "data": digits.images[:1].reshape(-1).tolist()}
    classes = {"name": "output_0", "parameters": {"classification": 1}}
    asked_classes = {"inputs": [image], "outputs": [classes]}
    best = json.loads(server.request("POST", "/v2/models/read/infer", json.dumps(asked_classes).encode())[1])
    assert best["outputs"][0]["data"][0].endswith(f":digit {digits.probabilities[0].argmax()}")


def test_a_refusal_leaves_nothing(tmp_path: Path, cache: Path):
    """What is no model is exit code 1, one line that says why, and no version."""
    (tmp_path / "cat.keras").write_bytes(b"no model")
    done = python(
        "-m", "service", "import", tmp_path / "cat.keras", "--models", tmp_path / "models", "--cache-dir", cache
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("kiln import: the .keras file is damaged: ")
    assert not list((tmp_path / "models").iterdir())
