"""One forward step as numbers: the fields, what values they may have, and what kind of step it was.

INVARIANT: steps that `checked_steps` returned are in order of time, finite, not negative, and can no longer be changed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

STEP_DTYPE = np.dtype(
    [
        ("start_s", "<f8"),  # seconds from the beginning of the job to the beginning of the step
        ("duration_s", "<f8"),  # seconds from there to its end, the scheduler's own time included
        ("host_s", "<f8"),  # of these, before the forward pass: the scheduler's own, where the device does not hide it
        ("num_prefill_tokens", "<i4"),  # prompt tokens computed
        ("num_decode_tokens", "<i4"),  # rows that decoded, one token each
        ("num_running", "<i4"),  # requests that hold KV of their own
        ("num_waiting", "<i4"),  # requests in the scheduler's window that do not run yet
        ("kv_pinned_tokens", "<i8"),  # slots of planned prefixes
        ("kv_private_tokens", "<i8"),  # slots of tokens that one request alone reads
        ("kv_free_tokens", "<i8"),  # slots that can be had at once
        ("num_open_prefixes", "<i4"),  # planned prefixes computing or resident
        ("num_retracted", "<i4"),  # requests that lost their KV in this step
        ("num_sampled", "<i4"),  # tokens sampled: one for each row that decoded, and for each prompt completed
        ("num_live_prefill_tokens", "<i4"),  # of the prompt tokens computed, those of requests outside any plan
        ("num_live_decode_tokens", "<i4"),  # of the rows that decoded, theirs
        ("prefill_pairs", "<i8"),  # sum over the prompt tokens computed of the tokens each attends to
        ("decode_kv_tokens", "<i8"),  # sum over the rows that decoded of the tokens each attended to
        ("kv_read_tokens", "<i8"),  # KV tokens that attention read, all rows
    ]
)
"""One forward step. Counts of requests, prefixes and slots are those during the step, after its admissions."""

StepArray = npt.NDArray[np.void]
Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

FIELD_NAMES: tuple[str, ...] = STEP_DTYPE.names or ()
TIME_FIELDS = ("start_s", "duration_s", "host_s")

STEP_KINDS = ("idle", "prefill", "decode", "mixed")
"""What `step_kinds` counts: bit 0 is prefill, bit 1 is decode."""

_MAX_S = 1e9  # 31 years; more is a time since the epoch
MAX_COUNT = 2**53
"""No count is greater: viewers read numbers as double, which is exact up to here."""


def step_kinds(steps: StepArray) -> npt.NDArray[np.int64]:
    """Kind of each step, int64 ``[num_steps]``: an index into `STEP_KINDS`."""
    has_prefill = (steps["num_prefill_tokens"] > 0).astype(np.int64)
    has_decode = (steps["num_decode_tokens"] > 0).astype(np.int64)
    return has_prefill + 2 * has_decode


def used_tokens(steps: StepArray) -> npt.NDArray[np.float64]:
    """Slots pinned or private during each step, float64 ``[num_steps]``."""
    return steps["kv_pinned_tokens"].astype(np.float64) + steps["kv_private_tokens"].astype(np.float64)


def checked_steps(steps: StepArray) -> StepArray:
    """The same steps, read only.

    Args:
        steps: `STEP_DTYPE` ``[num_steps]``; not copied.

    Raises:
        ValueError: Another type or shape; a time that is negative, not finite or above 1e9 s; a
            count that is negative or above `MAX_COUNT`; a step that starts before the one in front of it.
            Names the first such step.
    """
    if steps.dtype != STEP_DTYPE or steps.ndim != 1:
        raise ValueError(f"steps are {steps.dtype} {list(steps.shape)}, not STEP_DTYPE [num_steps]")
    for name in FIELD_NAMES:
        values = steps[name]
        most, unit = (_MAX_S, " seconds") if name in TIME_FIELDS else (MAX_COUNT, "")
        wrong = ~((values >= 0) & (values <= most))  # a comparison with NaN is false
        if wrong.any():
            at = int(wrong.argmax())
            raise ValueError(f"step {at}: {name} is {values[at]}, and must be from 0 to {most:g}{unit}")
    backwards = np.diff(steps["start_s"]) < 0
    if backwards.any():
        at = int(backwards.argmax()) + 1
        raise ValueError(
            f"step {at}: start_s is {steps['start_s'][at]}, before that of step {at - 1}, {steps['start_s'][at - 1]}"
        )
    frozen = steps.view()
    frozen.flags.writeable = False
    return frozen
