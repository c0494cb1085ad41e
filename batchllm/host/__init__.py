"""An engine in processes of its own, as the process that uses it sees it.

    template          the process that has imported SGLang; engines are forked from it
    runtime           `HostedRuntime`: an engine forked from it, as a `batchllm.offline.runtime.Runtime`
    tokenizer         the engine's tokenizer, asked from here
    messages          what the two sides say to each other
    logs              what the processes of an engine print
    own_folder        temporary folders of those processes, and what the dead have left of them
    environment       variables for processes that are started meanwhile
    standard_streams  file descriptors 0 to 2, where they were closed

Knows the wire and the seam to jobs. Must not know SGLang: importing this room takes no torch and no seconds. The other
side is `batchllm.srt.entrypoints.template` and `batchllm.srt.entrypoints.engine_host`.
"""
