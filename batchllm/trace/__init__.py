"""What a run looked like, step by step: recorded by whatever runs the steps, kept as a file, drawn as a page.

Knows: one line of numbers a forward step. Must not know: engines, plans, devices, clocks, where steps come from.
Invariant: a trace that was written reads back exactly, and every number shown is computed from its steps.
"""

from batchllm.trace.html_report import render_html, write_html
from batchllm.trace.step_trace import StepTrace
from batchllm.trace.steps import STEP_DTYPE, STEP_KINDS

__all__ = ["STEP_DTYPE", "STEP_KINDS", "StepTrace", "render_html", "write_html"]
