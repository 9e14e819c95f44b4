"""The collector rests while libraries are imported, and works afterwards, but not on them."""

import gc

import pytest

from perl_megatron.runtime import garbage


def test_what_is_made_in_a_pause_is_not_gone_over_again():
    made = []
    with garbage.paused():
        assert not gc.isenabled()
        made += [[] for _ in range(1000)]
        with garbage.paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    seen = {id(each) for each in gc.get_objects()}  # frozen ones are left out
    assert not seen & set(map(id, made))


def test_a_failing_import_ends_the_pause():
    with pytest.raises(ImportError), garbage.paused():
        raise ImportError("no such library")
    assert gc.isenabled()
