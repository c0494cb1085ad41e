"""How far a backend's output may be from `reference.attention` on the same rounded inputs: the one table of it.

Where the numbers come from, with the unit roundoff u of a dtype (half its ``eps``) and inputs of unit variance as in
the tests:

* ``reference``: two ways through float64 differ by the order of sums, some tens of u = 1.1e-16; 1e-12 is far above
  it and far below any mistake.
* ``cpu`` computes in float32 and rounds the output once. The sums are off by up to 1.6e-6 (measured, over all test
  cases, head_dim 64 and 128), of which atol is three times; rtol is 2 u of the output's dtype, twice its rounding.
* ``cpu_pairs`` is ``cpu`` where it multiplies pairs of bfloat16: it rounds as ``triton`` does.
* ``triton`` also rounds the softmax weights to the dtype of the values, for the matrix units: by at most u of the
  weighted mean of ``|v|``, 0.65 u at worst when measured. atol is 2 u, rtol as above. In float32 it rounds neither
  (``input_precision="ieee"``).

Partial outputs are merged in float32 before the one rounding, so segments add nothing that is seen here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Backend = Literal["reference", "cpu", "cpu_pairs", "triton"]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Bound on the error of each element: ``atol + rtol * |expected|``."""

    atol: float
    rtol: float


_FLOAT32 = Tolerance(atol=5e-6, rtol=2.4e-7)

TOLERANCES: dict[tuple[Backend, torch.dtype], Tolerance] = {
    ("reference", torch.float64): Tolerance(atol=1e-12, rtol=1e-12),
    ("cpu", torch.float32): _FLOAT32,
    ("cpu", torch.float16): Tolerance(atol=5e-6, rtol=9.8e-4),
    ("cpu", torch.bfloat16): Tolerance(atol=5e-6, rtol=7.9e-3),
    ("cpu_pairs", torch.bfloat16): Tolerance(atol=7.9e-3, rtol=7.9e-3),
    ("triton", torch.float32): _FLOAT32,
    ("triton", torch.float16): Tolerance(atol=9.8e-4, rtol=9.8e-4),
    ("triton", torch.bfloat16): Tolerance(atol=7.9e-3, rtol=7.9e-3),
}
"""By backend and dtype of its output, which is that of queries and caches."""


def check_close(actual: torch.Tensor, expected: torch.Tensor, backend: Backend) -> None:
    """Compare a backend's output with the reference's.

    Args:
        actual: Any shape; its dtype chooses the tolerance.
        expected: float64, the same shape.
        backend: Whose output it is.

    Raises:
        AssertionError: Some element is further off; the message says how many, and where the worst is.
    """
    tolerance = TOLERANCES[backend, actual.dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance.atol, rtol=tolerance.rtol, check_device=False)
