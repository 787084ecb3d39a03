"""The tree of errors: one code each, and a fresh object for each waiter."""

from __future__ import annotations

import pickle

import pytest

from service import errors
from service.errors import Code, Internal, KilnError, ModelLoadError, Overloaded

KINDS = sorted(
    (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, KilnError)),
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_can_be_raised_again_as_another_object(kind: type[KilnError]):
    """`again` keeps kind, text and code, but neither identity nor traceback."""
    try:
        raise kind("what was expected, and what came")
    except KilnError as raised:
        error = raised
    fresh = error.again()
    assert fresh is not error
    assert type(fresh) is kind
    assert (str(fresh), fresh.code) == ("what was expected, and what came", error.code)
    assert error.__traceback__ is not None
    assert fresh.__traceback__ is None


def test_an_overload_keeps_its_time_to_retry():
    """The text is the message alone; the time to retry survives `again` and pickling."""
    error = Overloaded("full", 2.5)
    for each in (error, error.again(), pickle.loads(pickle.dumps(error))):
        assert isinstance(each, Overloaded)
        assert (str(each), each.retry_after_s) == ("full", 2.5)
    assert Overloaded("full").retry_after_s == 1.0


def test_each_code_has_one_kind_of_its_own():
    """Codes and the errors of requests are one to one; what is left is `Internal`."""
    kinds = [kind for kind in KINDS if kind not in (KilnError, ModelLoadError)]
    assert sorted(kind.code.value for kind in kinds) == sorted(code.value for code in Code)
    assert KilnError.code is Internal.code is Code.INTERNAL
