"""``python -m batchllm``."""

from batchllm.cli import command

if __name__ == "__main__":
    raise SystemExit(command())
