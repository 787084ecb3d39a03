"""Many callers at once: each gets its own answer, also from a server that is told to stop."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from tests.e2e.callers import TIMEOUT_S, Caller, Outcome, callers
from tests.e2e.conftest import Digits, Start
from tests.e2e.process import DIGITS, STOP_S, Server

CALLERS = 64
ROUNDS = 25


@contextmanager
def calling(server: Server, digits: Digits, count: int, is_over: Callable[[Outcome], bool]) -> Iterator[list[Outcome]]:
    """`count` callers of all dialects, all begun at once, each asking for a digit of its own until `is_over`.

    Their outcomes are complete when the context has ended, which it does once all have.
    """
    own = digits.distinct(count)
    outcomes = [Outcome() for _ in range(count)]
    barrier = threading.Barrier(count)

    def work(number: int, caller: Caller) -> None:
        outcome = outcomes[number]
        barrier.wait(30)
        try:
            while outcome.ask(caller, own.images[number], own.probabilities[number]) and not is_over(outcome):
                pass
        finally:
            caller.close()

    with ThreadPoolExecutor(count) as pool:
        clients = enumerate(callers(server.rest_port, server.grpc_port, count))
        jobs: list[Future[None]] = [pool.submit(work, number, caller) for number, caller in clients]
        yield outcomes
        for job in jobs:
            job.result(TIMEOUT_S + 10)


def assert_all_right(outcomes: list[Outcome]) -> None:
    """No caller got a digit that is not its own."""
    assert [text for outcome in outcomes for text in outcome.wrong] == []


def test_each_of_many_callers_gets_its_own_answer(server: Server, digits: Digits):
    """64 callers of four dialects, many rounds each: every answer is that of the caller's own digit."""
    with calling(server, digits, CALLERS, lambda outcome: outcome.answered == ROUNDS) as outcomes:
        pass
    assert_all_right(outcomes)
    assert [outcome.refused or outcome.cut for outcome in outcomes if outcome.answered != ROUNDS] == []


def test_callers_of_all_dialects_share_one_batch(start: Start, digits: Digits):
    """Eight callers of four dialects that fill one batch are answered from one run, each with its own row."""
    server = start(DIGITS, "--max-batch-rows", "8", "--batch-wait-ms", "10000")
    with calling(server, digits, 8, lambda outcome: outcome.answered == 1) as outcomes:
        pass
    assert_all_right(outcomes)
    assert [outcome.answered for outcome in outcomes] == [1] * 8
    assert (server.metric("kiln_batch_rows_count"), server.metric("kiln_batch_rows_sum")) == (1, 8)


def test_sigterm_under_load(start: Start, digits: Digits):
    """Under load SIGTERM cuts and falsifies nothing: callers are answered until they are refused."""
    server = start(DIGITS)
    with calling(server, digits, CALLERS, lambda outcome: False) as outcomes:
        server.wait(lambda: all(outcome.answered >= 3 for outcome in outcomes), "three rounds")
        told = time.monotonic()
        server.signal()
        code = server.exit_code()
        took_s = time.monotonic() - told
    assert code == 0, server.log
    assert took_s < 25
    assert_all_right(outcomes)
    assert [outcome.cut for outcome in outcomes if outcome.cut and (outcome.cut_began < told or outcome.is_torn)] == []
    assert all(outcome.refused or outcome.cut for outcome in outcomes)
    assert any("stopping" in (outcome.refused or "") for outcome in outcomes)
    assert "not finished" not in server.log


def test_what_was_accepted_is_answered_after_sigterm(start: Start, digits: Digits):
    """Requests that wait when SIGTERM comes are answered rightly, while new ones are refused, then exit code 0."""
    server = start(DIGITS, "--batch-wait-ms", "5000")
    with calling(server, digits, 8, lambda outcome: outcome.answered == 1) as outcomes:
        server.wait(lambda: server.metric("kiln_requests_in_flight") == 8, "eight requests held")
        server.signal()
        server.wait(lambda: server.get("/v2/health/ready")[0] == 503, "readiness off", 3.0)
        assert server.get("/v2/health/live") == (200, {"live": True, "ready": False})
        status, answer = server.predict({"instances": digits.images[:1].tolist()})
        late = Outcome()
        (grpc_caller,) = callers(server.rest_port, server.grpc_port, 4)[3:]
        late.ask(grpc_caller, digits.images[0], digits.probabilities[0])
        grpc_caller.close()
    assert (status, answer) == (503, {"error": "the server is stopping and takes no new requests"})
    assert late.refused == "UNAVAILABLE: the server is stopping and takes no new requests"
    assert_all_right(outcomes)
    assert [outcome.answered for outcome in outcomes] == [1] * 8
    assert server.exit_code() == 0, server.log


def test_the_drain_time_is_kept(start: Start, digits: Digits):
    """A request that cannot be finished within the drain time is refused, not cut, and the server exits with 0."""
    server = start(DIGITS, "--batch-wait-ms", "10000", "--drain-s", "0.5")
    with calling(server, digits, 4, lambda outcome: outcome.answered == 1) as outcomes:
        server.wait(lambda: server.metric("kiln_requests_in_flight") == 4, "four requests held")
        server.signal()
        assert server.exit_code(5.0) == 0, server.log
    reasons = {(outcome.refused or "").removeprefix("UNAVAILABLE: ") for outcome in outcomes}
    assert reasons == {"the server stopped before this request was finished"}


def test_a_second_sigterm_stops_at_once(start: Start, digits: Digits):
    """While a request keeps the server draining, a second SIGTERM ends it at once."""
    server = start(DIGITS, "--batch-wait-ms", "10000")
    with calling(server, digits, 1, lambda outcome: outcome.answered == 1) as outcomes:
        server.wait(lambda: server.metric("kiln_requests_in_flight") == 1, "a request held")
        server.signal()
        server.wait(lambda: server.get("/v2/health/ready")[0] == 503, "draining", STOP_S)
        server.signal()
        assert server.exit_code(3.0) == 128 + 15
    assert outcomes[0].cut


@pytest.mark.parametrize("is_chunked", [False, True], ids=["content-length", "chunked"])
def test_a_slow_upload_arrives_whole(server: Server, digits: Digits, is_chunked: bool):
    """A body that comes in pieces over more than 100 ms is waited for and answered as a whole."""
    body = json.dumps({"instances": digits.images[:1].tolist()}).encode()
    pieces = [body[at : at + 100] for at in range(0, len(body), 100)]
    assert len(pieces) >= 4
    length = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {len(body)}"
    head = f"POST /v1/models/digits:predict HTTP/1.1\r\nHost: kiln\r\nConnection: close\r\n{length}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.rest_port), timeout=TIMEOUT_S) as connection:
        connection.sendall(head.encode())
        for piece in pieces:
            assert select.select([connection], [], [], 0.06) == ([], [], []), "answered before the body was complete"
            connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if is_chunked else piece)
        if is_chunked:
            connection.sendall(b"0\r\n\r\n")
        with connection.makefile("rb") as file:
            answer_head, _, answer = file.read().partition(b"\r\n\r\n")
    assert answer_head.startswith(b"HTTP/1.1 200 "), answer
    np.testing.assert_allclose(json.loads(answer)["predictions"], digits.probabilities[:1], rtol=0, atol=1e-4)
