"""The ``batchllm`` command.

    batchllm run        answer every row of an input; an interrupted job goes on where it ended
    batchllm status     say how far a job is, how fast, and what failed
    batchllm retry      run again what failed in a job
    batchllm serve      SGLang's server, with plans and the batch API
    batchllm plan       say what would be shared and saved, without running
    batchllm report     say what a run looked like, from its trace
    batchllm simulate   run a workload on a simulated device
    batchllm calibrate  fit the simulator's cost model to the steps of a trace

Exit status: 0 every row was answered, 1 some rows failed, 2 the job could not run or not to its end, 3 stopped by
Ctrl-C, SIGTERM or SIGHUP; after 2 and 3 the same command goes on where it ended.

Nothing is imported here that takes time: signals are to be answered from the first moment on.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

from batchllm.cli import interrupts
from batchllm.host import standard_streams

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from typing import TextIO

_STOPPED = 3
"""`outcome.EXIT_STOPPED`, which takes a second to import."""
_VERBOSE_FLAGS = ("-v", "--verbose", "--log-level")
_RAY_FLAGS = ("--replicas", "--ray-address")


def command(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the command, in a process of its own; returns the exit status.

    Args:
        arguments: The command line; None for the process's own.
    """
    standard_streams.reserve()
    signals = interrupts.Interrupts()
    try:
        signals.note()
        status = main(sys.argv[1:] if arguments is None else arguments, signals)
    except SystemExit as end:  # argparse, which has said why
        status = end.code if isinstance(end.code, int) else 2
    except KeyboardInterrupt:  # outside any command
        interrupts.tell()
        status = _STOPPED
    signals.ignore()
    return _flush(status)


def _flush(status: int) -> int:
    """Write what Python still holds back. Python itself ends with status 120 where that fails, whatever was done."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
    except OSError as error:
        _discard(sys.stdout)
        print(f"batchllm: standard output: {error.strerror}; give it another place", file=sys.stderr)
        status = status or 2
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:  # nobody can be told
        _discard(sys.stderr)
    return status


def _discard(stream: TextIO) -> None:
    """Have what the stream still holds go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(arguments: Sequence[str], signals: interrupts.Interrupts | None = None) -> int:
    """Run a command; returns the exit status.

    Args:
        arguments: The command line.
        signals: What signals do; None where they are the caller's, but for SIGTERM.
    """
    if signals is not None:
        from batchllm import tokenizer

        tokenizer.needs_no_torch = True
    if sys.stderr is None:  # closed by whoever started us, who then wants to hear nothing
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives
    with begin_engine(arguments):
        try:
            return _run(arguments, signals)
        finally:
            if signals is not None:
                signals.ignore()


def begin_engine(arguments: Sequence[str]) -> AbstractContextManager[None]:
    """Begin with what takes longest, if these arguments ask for an engine: SGLang is imported in another process, while
    this one does the rest.
    """
    from batchllm.host import template
    from batchllm.srt.platforms import host_imports

    command = arguments[0] if arguments else ""
    if command == "serve":  # this process will host the engine; numpy must not be imported before
        host_imports.prepare_environment()
    names = {argument.partition("=")[0] for argument in arguments}
    if command != "run" or names & {"-h", "--help", *_RAY_FLAGS}:
        return nullcontext()  # nothing runs, or elsewhere; where `retry` runs, its job's folder says
    return template.held(is_verbose=is_verbose(arguments))


def is_verbose(arguments: Sequence[str]) -> bool:
    """Whether an engine's processes print to standard error."""
    return any(argument.partition("=")[0] in _VERBOSE_FLAGS for argument in arguments)


def _run(arguments: Sequence[str], signals: interrupts.Interrupts | None) -> int:
    from batchllm.cli.outcome import EXIT_CANNOT_RUN, EXIT_STOPPED, say
    from batchllm.cli.parser import make_parser
    from batchllm.errors import BatchLLMError

    args, server_flags = make_parser().parse_known_args(arguments)
    command: Callable[[argparse.Namespace, list[str]], int] = args.command
    try:
        if signals is None:
            signal.signal(signal.SIGTERM, interrupts.interrupt)
        else:
            signals.act()
        return command(args, server_flags)
    except BatchLLMError as error:
        say("\n".join([str(error), *getattr(error, "__notes__", ())]))
        return EXIT_CANNOT_RUN
    except BrokenPipeError as error:  # e.g. `batchllm plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        say("\n".join(getattr(error, "__notes__", ())))
        return EXIT_CANNOT_RUN
    except OSError as error:  # e.g. a name that the file system does not take
        say("\n".join([_in_words(error), *getattr(error, "__notes__", ())]))
        return EXIT_CANNOT_RUN
    except MemoryError as error:
        words = "out of memory; run it where there is more, or with less of it for token ids (--token-memory)"
        say("\n".join([words, *getattr(error, "__notes__", ())]))
        return EXIT_CANNOT_RUN
    except KeyboardInterrupt as interrupt:
        say("\n".join(["interrupted", *getattr(interrupt, "__notes__", ())]))
        return EXIT_STOPPED


def _in_words(error: OSError) -> str:
    if error.filename is not None:
        return str(error)
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the folder that this was called in has been removed; call it in another one"
    return f"standard output: {error.strerror}; give it another place" if error.strerror else str(error)
