"""``python -m batchllm.launch_server``: what ``batchllm serve`` does."""

import sys

from batchllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
