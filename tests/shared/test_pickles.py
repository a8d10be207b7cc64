"""The restricted pickle reader reads plain arrays of every spelling and runs nothing else."""
import io
import os
import pickle

import numpy as np
import pytest

from shared.cli import UserError
from shared.data.safe import load_numpy_pickle


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("array", [
    np.arange(12, dtype=np.uint8).reshape(3, 4), np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(5, dtype=">i4"), np.array([True, False]), np.zeros((0, 3), np.int64)])
def test_plain_arrays_survive(protocol, array):
    back = load_numpy_pickle(pickle.dumps({"data": array, "labels": [1, 2]}, protocol=protocol), "file")
    assert back["labels"] == [1, 2]
    assert back["data"].dtype == array.dtype and back["data"].shape == array.shape
    np.testing.assert_array_equal(back["data"], array)


def test_numpy_scalar_becomes_number():
    assert load_numpy_pickle(pickle.dumps([np.float64(0.5), np.int64(3)]), "file") == [0.5, 3]


def test_python2_batch_is_read():
    # What Python 2 wrote: a text-mode global and a byte string for the data.
    raw = (b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04"
           b"K\x00\x85U\x01b\x87Rq\x05"
           b"(K\x01K\x02K\x02\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
           b"\x89U\x04\x01\x80\xff\x02tbU\x06labelsq\x08]q\x09K\x07au.")
    batch = load_numpy_pickle(raw, "data_batch_1")
    np.testing.assert_array_equal(batch["data"], np.array([[1, 128], [255, 2]], np.uint8))
    assert batch["labels"] == [7]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"data": x}, lambda x: [np.arange(3), x]])
def test_hostile_pickle_is_refused_by_name(wrap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"refused, it asks for (posix|nt)\.system"):
        load_numpy_pickle(pickle.dumps(wrap(Hostile())), "data_batch_1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.array([object()], dtype=object), np.dtype("O"), np.array(["text"]),
                                   np.zeros(2, dtype=[("a", "i4")])])
def test_arrays_that_are_not_numbers_are_refused(value):
    with pytest.raises(UserError):
        load_numpy_pickle(pickle.dumps({"data": value}), "file")


def test_every_truncation_is_one_line():
    whole = pickle.dumps({"data": np.arange(100, dtype=np.uint8), "labels": list(range(100))}, protocol=2)
    for end in range(len(whole) - 1):
        with pytest.raises(UserError) as error:
            load_numpy_pickle(io.BytesIO(whole[:end]), "data_batch_1")
        assert str(error.value).startswith("data_batch_1: ")
