"""A full memory is recognised however it is reported, and the file in work is named."""

from pathlib import Path

import pyarrow as pa
import pytest

from trainmerge.system.disk_space import naming
from trainmerge.system.memory import is_out_of_memory


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (MemoryError(), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyError("out of memory"), False),
        (pa.ArrowException("Unknown error: Failed to launch worker thread: try again"), True),
    ],
)
def test_which_errors_mean_a_full_memory(error: Exception, full: bool) -> None:
    assert is_out_of_memory(error) == full


def test_the_file_in_work_is_named() -> None:
    with pytest.raises(MemoryError, match=r"a/b: no memory is left"), naming(Path("a/b")):
        raise MemoryError
