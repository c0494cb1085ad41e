"""Environment variables that make computing on a CPU fast. Some of them torch reads when it is loaded. Runs in every
process that imports SGLang.
"""

from __future__ import annotations

import os


def set_environment_defaults() -> None:
    """Set the environment variables that make computing on a CPU fast, unless the user has set them.

    libgomp spins while it waits: beside a tokenizer and a detokenizer process on the same cores that makes two threads
    about ten times slower than one. 500 turns, some 10 us, cost little there, and save a thread that gets its next work
    at once from being woken. ``torch.compile`` takes half a minute and a C++ compiler for the small functions
    that SGLang compiles (sampling, penalties). Huge pages make reading weights and KV faster.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "500")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
