"""Parameters of requests to load and unload models, pure.

Source: Triton's model repository extension.
"""

from __future__ import annotations

from service.errors import Unimplemented
from service.extensions.parameters import Parameters, flag


def check_load(parameters: Parameters) -> None:
    """Refuse what would change the model: it is loaded as the repository and the models' config have it.

    Raises:
        Unimplemented: a config or files are given.
    """
    for name in parameters:
        if name == "config" or name.startswith("file:"):
            raise Unimplemented(
                f"parameter {name!r}: models are loaded as they lie in the repository; "
                "their config is that of --models-config"
            )


def check_unload(parameters: Parameters) -> None:
    """Take ``unload_dependents``: no model depends on another here; `InvalidArgument` if it is no boolean."""
    flag(parameters, "unload_dependents")
