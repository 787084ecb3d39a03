"""The Locust suite: users of four kinds, who send the same seeded rows to one model; see README.md here.

``locust -f load_tests/locustfile.py --host http://127.0.0.1:8501 --kiln-model digits`` asks a server that runs;
``make load`` starts one. Which users there are follows from ``--kiln-weights``, how many from a shape,
``--kiln-shape step``, or from Locust's own ``--users``. Thresholds set the exit code: ``--kiln-max-error-ratio``,
``--kiln-max-p95-ms``, ``--kiln-max-p99-ms``. Each option may be given as an environment variable.
"""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlsplit

import grpc.experimental.gevent
import locust.log
from locust import FastHttpUser, LoadTestShape, User, constant, events, task
from locust.argument_parser import LocustArgumentParser

from load_tests.payloads import (
    HEADER_LENGTH,
    TFSERVING_METHOD,
    Floats,
    Target,
    find_target,
    tfserving_grpc,
    tfserving_json,
    v2_binary,
    v2_json,
)
from load_tests.shapes import SHAPES, Stage, now_in
from load_tests.thresholds import Thresholds, exceeded

grpc.experimental.gevent.init_gevent()
_ROWS = 64
"""Different requests of each kind, sent in turn."""
_KINDS = ("rest_json", "rest_binary", "tfserving_rest", "tfserving_grpc")
_JSON = {"Content-Type": "application/json"}


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_options(parser: LocustArgumentParser) -> None:
    """The suite's own options, beside Locust's."""

    def option(name: str, default: Any, text: str) -> None:
        variable = "LOAD_" + name.upper().replace("-", "_")
        parser.add_argument(f"--kiln-{name}", type=type(default), default=default, env_var=variable, help=text)

    option("model", "digits", "the model to ask; it has one input of 32-bit floats")
    option("grpc-port", 8500, "the server's gRPC port")
    option("seed", 1, "of the rows")
    option("weights", "1,1,1,1", f"how many users of each kind there are, in proportion: {', '.join(_KINDS)}")
    option("shape", "", f"users over time: {', '.join(SHAPES)}; none for Locust's --users")
    option("peak", 32, "the most users of a shape")
    option("shape-s", 60.0, "seconds that a shape takes")
    option("max-error-ratio", 0.0, "more failed requests than this share fail the run")
    option("max-p95-ms", 0.0, "a higher p95 fails the run; 0 for no threshold")
    option("max-p99-ms", 0.0, "a higher p99 fails the run; 0 for no threshold")


class _Asks:
    """What all kinds of users share: the model, the rows, and the number of the next one."""

    target: Target
    rows: tuple[Floats, ...] = ()
    number = 0

    @classmethod
    def next_number(cls) -> int:
        cls.number += 1
        return cls.number % len(cls.rows)


class _RestUser(_Asks, FastHttpUser):
    """Sends bodies that were made before the load began, without pause."""

    abstract = True
    wait_time = constant(0)
    bodies: tuple[bytes, ...] = ()
    headers: dict[str, str] = _JSON

    def post(self, path: str, name: str) -> None:
        with self.client.post(
            path,
            data=self.bodies[self.next_number()],  # type: ignore[arg-type]  # bytes are sent as they are
            headers=self.headers,
            name=name,
            catch_response=True,
        ) as answer:
            if answer.status_code != 200:
                answer.failure(f"{answer.status_code}: {(answer.text or '')[:200]}")


class RestJson(_RestUser):
    """The Open Inference Protocol, its numbers as JSON."""

    @task
    def infer(self) -> None:
        self.post(f"/v2/models/{self.target.model}/infer", "REST v2, JSON")


class RestBinary(_RestUser):
    """The Open Inference Protocol with binary tensors both ways."""

    @task
    def infer(self) -> None:
        self.post(f"/v2/models/{self.target.model}/infer", "REST v2, binary")


class TfServingRest(_RestUser):
    """TensorFlow Serving's rows."""

    @task
    def predict(self) -> None:
        self.post(f"/v1/models/{self.target.model}:predict", "REST TFS")


class TfServingGrpc(_Asks, User):
    """TensorFlow Serving's Predict over gRPC; gevent switches users while a call waits."""

    wait_time = constant(0)
    messages: tuple[bytes, ...] = ()
    address = ""
    started = 0

    @classmethod
    def next_user(cls) -> int:
        """A number for each user: channels with the same options would share a connection."""
        cls.started += 1
        return cls.started

    def on_start(self) -> None:
        self.channel = grpc.insecure_channel(self.address, options=[("kiln.user", self.next_user())])
        self.call = self.channel.unary_unary(TFSERVING_METHOD)

    def on_stop(self) -> None:
        self.channel.close()

    @task
    def predict(self) -> None:
        start = time.perf_counter()
        failure: Exception | None = None
        answer = b""
        try:
            answer = self.call(self.messages[self.next_number()], timeout=30)
        except grpc.RpcError as error:
            failure = Exception(f"{error.code().name}: {error.details()}")
        self.environment.events.request.fire(
            request_type="GRPC",
            name="gRPC TFS",
            response_time=(time.perf_counter() - start) * 1e3,
            response_length=len(answer),
            exception=failure,
            context={},
        )


_USERS: tuple[Any, ...] = (RestJson, RestBinary, TfServingRest, TfServingGrpc)


@events.init.add_listener  # type: ignore[untyped-decorator]
def prepare(environment: Any, **_: Any) -> None:
    """Ask the server for the model's input, make all requests, weigh the users, choose the shape."""
    options = environment.parsed_options
    if options is None or environment.host is None:
        return
    target = find_target(environment.host, options.kiln_model)
    rows = tuple(target.rows(_ROWS, options.kiln_seed))
    _Asks.target, _Asks.rows = target, rows
    RestJson.bodies = tuple(v2_json(target.input_name, row) for row in rows)
    binary = [v2_binary(target.input_name, row) for row in rows]
    RestBinary.bodies = tuple(body for body, _ in binary)
    RestBinary.headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(binary[0][1])}
    TfServingRest.bodies = tuple(tfserving_json(row) for row in rows)
    TfServingGrpc.messages = tuple(tfserving_grpc(target.model, target.input_name, row) for row in rows)
    TfServingGrpc.address = f"{urlsplit(environment.host).hostname}:{options.kiln_grpc_port}"
    weights = [int(weight) for weight in options.kiln_weights.split(",")]
    if len(weights) != len(_USERS) or min(weights) < 0 or not sum(weights):
        raise SystemExit(f"--kiln-weights: {len(_USERS)} whole numbers expected, got {options.kiln_weights!r}")
    for user, weight in zip(_USERS, weights, strict=True):
        user.weight = weight
    environment.user_classes = [user for user, weight in zip(_USERS, weights, strict=True) if weight]
    if options.kiln_shape:
        if options.kiln_shape not in SHAPES:
            raise SystemExit(f"--kiln-shape: one of {', '.join(SHAPES)} expected, got {options.kiln_shape!r}")
        stages = SHAPES[options.kiln_shape](options.kiln_peak, options.kiln_shape_s)
        environment.shape_class = _Staged(stages)


class _Staged(LoadTestShape):
    """Goes through stages."""

    abstract = True

    def __init__(self, stages: list[Stage]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stages = stages

    def tick(self) -> tuple[int, float] | None:
        return now_in(self._stages, self.get_run_time())  # type: ignore[no-untyped-call]


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def judge(environment: Any, **_: Any) -> None:
    """Set the exit code by the thresholds, and say which were exceeded."""
    options = environment.parsed_options
    limits = Thresholds(options.kiln_max_error_ratio, options.kiln_max_p95_ms, options.kiln_max_p99_ms)
    total = environment.stats.total
    problems = exceeded(
        limits,
        requests=total.num_requests,
        failures=total.num_failures,
        p95_ms=total.get_response_time_percentile(0.95) or 0.0,
        p99_ms=total.get_response_time_percentile(0.99) or 0.0,
    )
    if locust.log.unhandled_greenlet_exception:
        problems.append("a user ended with an exception")
    for problem in problems:
        print(f"threshold: {problem}")
    environment.process_exit_code = 1 if problems else 0
