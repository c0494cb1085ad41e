"""SGLang's detokenizer, decoding finished planned requests in bulk. Runs in the detokenizer's process. (Upstream:
``srt/managers/detokenizer_manager.py``.)
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.managers.detokenizer_manager import run_detokenizer_process as run_upstream
from sglang.utils import TypeBasedDispatcher

from batchllm.srt.entrypoints import child_process
from batchllm.srt.managers.io_struct import PlannedBatchOutput
from batchllm.srt.managers.schedule_batch import find_stop


class BatchDetokenizerManager(DetokenizerManager):
    """Decodes each planned request once, when it has finished."""

    def init_request_dispatcher(self) -> None:
        super().init_request_dispatcher()
        self._request_dispatcher += TypeBasedDispatcher([(PlannedBatchOutput, self.handle_planned_output)])

    def handle_planned_output(self, output: PlannedBatchOutput) -> PlannedBatchOutput:
        """Fill in the texts: what the output adds to the end of the prompt, without what stopped it."""
        contexts, spans = [], []
        ends = list(zip(output.finish_reasons, output.no_stop_trim, strict=True))
        # A model may have more tokens than its tokenizer; some tokenizers would end this process on them.
        context_ids, output_ids = (
            [self._clamp_decode_ids(ids, self.vocab_size) for ids in column]
            for column in (output.context_ids, output.output_ids)
        )
        for context, ids, (reason, no_trim) in zip(context_ids, output_ids, ends, strict=True):
            contexts.append(context)
            spans.append(context + self.trim_matched_stop(ids, reason, no_stop_trim=no_trim))
        spaces = output.spaces_between_special_tokens
        context_texts = self._grouped_batch_decode(contexts, output.skip_special_tokens, spaces)
        span_texts = self._grouped_batch_decode(spans, output.skip_special_tokens, spaces)
        output.texts = [
            self.trim_matched_stop(span[len(context) :], reason, no_stop_trim=no_trim)
            for context, span, (reason, no_trim) in zip(context_texts, span_texts, ends, strict=True)
        ]
        for i, reason in enumerate(output.finish_reasons):
            if "num_early" in reason:  # the stop string may stand among the first tokens too
                head = contexts[i] + output_ids[i][: reason["num_early"]]
                (early,) = self._grouped_batch_decode([head], [output.skip_special_tokens[i]], [spaces[i]])
                text, context_len = span_texts[i], len(context_texts[i])
                at = find_stop(text[context_len:], early[context_len:], reason["matched"])
                if at >= 0 and output.no_stop_trim[i]:
                    at += len(reason["matched"])
                output.texts[i] = text[context_len:] if at < 0 else text[context_len : context_len + at]
        return output


def run_detokenizer_process(*args: Any, **kwargs: Any) -> None:
    """Target of the detokenizer process."""
    child_process.begin("detokenizer")
    run_upstream(*args, **kwargs, detokenizer_manager_class=BatchDetokenizerManager)
