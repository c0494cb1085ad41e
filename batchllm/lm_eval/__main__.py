"""The harness's command, with `BatchLM` in it, which the import of this package has registered."""

from __future__ import annotations

import sys


def main() -> None:
    """Run it with this process's arguments."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        sys.exit(f"batchllm: the module {error.name} is not installed; pip install 'batchllm[lm-eval]'")
    cli_evaluate()


if __name__ == "__main__":
    main()
