"""The tables from what went wrong to a status of each protocol."""

from __future__ import annotations

from typing import Any

import pytest

from service.errors import Code
from service.rest.codes import HTTP_STATUS
from service.rpc.codes import GRPC_STATUS


@pytest.mark.parametrize("table", [HTTP_STATUS, GRPC_STATUS], ids=["HTTP", "gRPC"])
def test_every_code_has_a_status(table: dict[Code, Any]):
    """Nothing can go wrong that a front end has no status for."""
    assert set(table) == set(Code)


def test_both_protocols_agree_on_whose_fault_it_is():
    """What is the caller's fault over HTTP (4xx) is not INTERNAL or UNAVAILABLE over gRPC, and the other way round."""
    for code in Code:
        is_callers = HTTP_STATUS[code] < 500
        names = {"INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNIMPLEMENTED"}
        assert (GRPC_STATUS[code].name not in names) is is_callers, code
