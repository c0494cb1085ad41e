"""The real runtime: SGLang 0.5.17, extended. The only package that imports sglang.

Folders and files mirror ``sglang/srt``, so that whoever knows SGLang knows where to look. The first lines of a file say
in which process it runs. What is decided here comes from ``batchllm.scheduler`` and ``batchllm.prefix_cache``; these
modules only show them the live state and carry out the answer.
"""

import warnings

# On a machine without a GPU, SGLang says at import which kernels it does not have.
warnings.filterwarnings("ignore", category=UserWarning, module="sglang")
