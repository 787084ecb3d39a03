"""SavedModels that answer with a number: ``python -m load_tests.tagged_models FOLDER NUMBER…``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def save(folder: Path, number: int) -> None:
    """Write ``FOLDER/NUMBER``: each output is `number`, as variables hold it."""
    import tensorflow as tf

    class Tagged(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.number = tf.Variable(float(number))

        @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")])  # type: ignore[untyped-decorator]
        def answer(self, x: Any) -> dict[str, Any]:
            return {"y": x * 0.0 + self.number}

    model = Tagged()
    tf.saved_model.save(model, str(folder / str(number)), signatures=model.answer)


if __name__ == "__main__":
    for each in sys.argv[2:]:
        save(Path(sys.argv[1]), int(each))
