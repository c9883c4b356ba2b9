import io
from pathlib import Path

import numpy as np
import pytest

from loramux_shared.bundle.npy import cast, read_config, weights_pieces, write_checked
from loramux_shared.deployment import Dtype
from loramux_shared.faults import BundleCorrupt
from loramux_shared.sources.files import hash_if_there

Q_A = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)
Q_B = np.array([[1, 0], [0, 1], [1, 1], [2, -1]], np.float32)
V_A = np.array([[1, -1, 0.5, 0]], np.float32)
V_B = np.array([[0.25], [-0.5]], np.float32)
CONFIG = np.array([[1, 0, 2, 0], [3, 0, 1, 0]], np.int32)


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write(path: Path, dtype: Dtype, q_scale: float) -> bytes:
    rows = [(cast(Q_A, dtype), cast(Q_B, dtype, q_scale)), (cast(V_A, dtype), cast(V_B, dtype, 4.0))]
    write_checked(path, weights_pieces(dtype, count=2, width=16, rows=rows))
    return path.read_bytes()


def test_a_file_that_is_read_back_is_the_same(tmp_path):
    """Written in pieces with gaps for zeros, and read back, it is the file that is written at once."""
    dtype, half = Dtype.FLOAT16, 5
    whole = [cast(Q_A, dtype).ravel(), cast(Q_B, dtype, 2.0).ravel()]
    pieces = [part for values in whole for part in (values[:half], values[half:])]
    rows = [pieces, [cast(V_A, dtype), cast(V_B, dtype, 4.0)]]
    at_once = write(tmp_path / "w.npy", dtype, 2.0)
    digest = write_checked(tmp_path / "p.npy", weights_pieces(dtype, count=2, width=16, rows=rows))
    assert (tmp_path / "p.npy").read_bytes() == at_once
    assert digest == hash_if_there(tmp_path / "w.npy")


def test_a_file_that_someone_else_writes_to_is_found(tmp_path):
    """A file with another size than the written one is refused: None."""

    def pieces():
        yield b"content"
        yield 5
        with (tmp_path / "f").open("ab") as file:
            file.write(b"more")

    assert write_checked(tmp_path / "f", pieces()) is None


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (0x3F800000, 0x3F80),
        (0x3F808000, 0x3F80),  # half way, to the even one below
        (0x3F818000, 0x3F82),  # half way, to the even one above
        (0x3F808001, 0x3F81),
        (0x7F7FFFFF, 0x7F80),  # beyond the largest: infinite
        (0x00000001, 0x0000),
    ],
)
def test_bfloat16_rounds_to_nearest_even(value, bits):
    """float32 becomes the nearest bfloat16; of two equally near ones the even one."""
    source = np.array([value], np.uint32).view(np.float32)
    assert cast(source, Dtype.BFLOAT16).view(np.uint16).tolist() == [bits]


def test_rows_that_do_not_fit_are_an_error(tmp_path):
    """A row of another type or width, or a missing one, is an error of the writer."""
    row = (cast(Q_A, Dtype.FLOAT16), cast(Q_B, Dtype.FLOAT16))
    with pytest.raises(ValueError, match="16 elements"):
        write_checked(tmp_path / "w", weights_pieces(Dtype.FLOAT16, count=1, width=15, rows=[row]))
    with pytest.raises(ValueError, match="1 rows"):
        write_checked(tmp_path / "w", weights_pieces(Dtype.FLOAT16, count=2, width=16, rows=[row]))


HOSTILE = [
    b"", b"PK\x03\x04", saved(CONFIG[None])[:100], saved(CONFIG[None]) + b"\0", saved(CONFIG[None])[:-1],
    saved(CONFIG), saved(CONFIG[None].astype(">i4")), saved(np.asfortranarray(CONFIG[None])),
    saved(CONFIG[None].astype("<i8")), saved(np.zeros((1, 0, 4), np.int32)),
    b"\x93NUMPY\x03\x00" + saved(CONFIG[None])[8:],
]  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_other_files_are_refused(data):
    """A file that is not exactly such an npy file is named corrupt, and nothing of it is used."""
    with pytest.raises(BundleCorrupt, match="expected"):
        read_config(data, "config")


def test_pickled_objects_are_refused(tmp_path):
    """An npy file of Python objects is refused by its type, before anything could be unpickled."""
    np.save(tmp_path / "o.npy", np.array([[["x"]]], dtype=object), allow_pickle=True)
    with pytest.raises(BundleCorrupt, match="expected a header"):
        read_config((tmp_path / "o.npy").read_bytes(), "config")
