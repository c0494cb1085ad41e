"""`batchllm` as a model of lm-evaluation-harness: each set of requests is one planned batch.

The harness has no entry points for models of other packages: its documentation has them imported. So this package is
run in the place of its command, with the same arguments::

    python -m batchllm.lm_eval --model batchllm --model_args pretrained=DIR,max_total_tokens=65536 --tasks ...

or imported before ``lm_eval.simple_evaluate(model="batchllm", ...)``. Needs ``pip install batchllm[lm-eval]``.
"""

from __future__ import annotations

try:
    from batchllm.lm_eval.model import BatchLM
except ModuleNotFoundError as error:  # `__main__`, which is imported after this, says what to install
    if error.name is None or not error.name.startswith("lm_eval"):
        raise
else:
    __all__ = ["BatchLM"]
