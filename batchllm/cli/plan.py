"""``batchllm plan``: what will be shared, and what it saves, before anything runs."""

from __future__ import annotations

import argparse
import json

from batchllm.cli.inputs import Prompts
from batchllm.cli.outcome import EXIT_OK, EXIT_ROWS_FAILED, refuse, say_failed
from batchllm.dataset.field_checks import MAX_INT32
from batchllm.errors import ConfigError


def plan(args: argparse.Namespace, server_flags: list[str]) -> int:
    """Tokenize and plan, print the summary; returns the exit status."""
    refuse(server_flags, "plan")
    if not 1 <= args.page_size <= MAX_INT32:
        raise ConfigError(f"--page-size {args.page_size}: must be from 1 to {MAX_INT32}")
    from batchllm.planner import explain, plan_batch

    prompts = Prompts(args)
    batch_plan = plan_batch(
        prompts.table,
        page_size=args.page_size,
        namespaces=prompts.rows.namespaces(prompts.samples),
        share_lens=prompts.share_lens,
    )
    summary = explain(batch_plan, prompts.table)
    print(json.dumps(summary.to_dict(), indent=2) if args.json else summary.render())
    say_failed(prompts.bad, len(prompts.bad))
    return EXIT_ROWS_FAILED if prompts.bad else EXIT_OK
