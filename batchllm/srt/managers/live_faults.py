"""Live requests whose answers cannot be made: they fail, and nothing else does. Runs in the engine's or the server's
process.

(Upstream: ``TokenizerManager.handle_loop``, which ends the whole process where one answer cannot be made.)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.io_struct import AbortReq

logger = logging.getLogger(__name__)


def fail_requests(manager: Any, states: Mapping[str, Any], error: Exception) -> None:
    """End the requests whose answers came in one message, of which SGLang could not take all.

    Args:
        manager: The `BatchTokenizerManager`.
        states: SGLang's states of the requests, by their ids; those that have been answered in full stay so.
        error: What it failed by.
    """
    logger.error("%d live requests fail, their answers cannot be made", len(states), exc_info=error)
    message = f"the answer cannot be made: {type(error).__name__}: {error}"
    reason = {"type": "abort", "status_code": HTTPStatus.INTERNAL_SERVER_ERROR, "message": message}
    for rid, state in states.items():
        if rid in manager.rid_to_state or not state.out_list:
            state.finished = True
            told = {"id": rid, "finish_reason": reason, "completion_tokens": 0}
            state.out_list.append({"text": "", "output_ids": [], "meta_info": told})
            manager._remove_req_state(rid)
            manager.send(AbortReq(rid=rid))
        state.event.set()
