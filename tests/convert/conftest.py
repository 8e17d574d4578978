"""Files of tensors."""

import numpy as np
import pytest
from safetensors.numpy import save_file


@pytest.fixture
def file(tmp_path):
    """Writes tensors, returns the path."""

    def write(found, name="weights.safetensors"):
        save_file({n: np.ascontiguousarray(x) for n, x in found.items()}, tmp_path / name)
        return tmp_path / name

    return write
