"""What to run next. Pure: the same state gives the same answer, in the runtime, the simulator and the tests.

No torch, no sglang, no clock, no randomness.
"""

from batchllm.scheduler.decision import Admission, Decision
from batchllm.scheduler.policy import PlannedPolicy
from batchllm.scheduler.view import SchedulerView, WaitingRequest

__all__ = ["Admission", "Decision", "PlannedPolicy", "SchedulerView", "WaitingRequest"]
