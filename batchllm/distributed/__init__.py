"""Several engines, on one machine or many, as one runtime. Ray starts them, carries messages, and sees who is gone.

    cluster        a Ray of the job's own, or one that is there
    actor          an engine in a Ray actor
    replica        such an actor as the driver sees it
    runtime        `ReplicatedRuntime`: all of them as a `batchllm.offline.runtime.Runtime`
    tokenizer      text to tokens on all of them
    live_router    which of them a live request goes to
    gateway        an ASGI application that hands live requests on
    live_metrics   their metrics on one page

Knows Ray and the seam to jobs. Must not know rows, files, or what a plan is: which engine gets what, the job says. Ray
is imported when a cluster is connected, not before. What its actors run is any runtime.
"""
