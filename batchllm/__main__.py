"""``python -m batchllm``."""

from batchllm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
