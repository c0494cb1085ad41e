"""What ``scripts/gpu_bench`` runs: correctness, then measurements against stock SGLang on the same card.

`parts` says what is run, `setting` on which model and which workloads, `engines` and `engine_process` carry it out in
processes of their own, `card` measures the limits, `kernel_trace` reads a profile, `report` makes the tables.
"""
