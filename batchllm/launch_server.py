"""``python -m batchllm.launch_server``: what ``batchllm serve`` does."""

import sys

from batchllm.cli import command

if __name__ == "__main__":
    sys.exit(command(["serve", *sys.argv[1:]]))
