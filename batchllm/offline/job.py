"""One job: requests in, completions out. Tokenize, check, plan, feed, collect."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import xxhash

from batchllm.dataset.limits import check_expected_len, check_prompt_len, check_token_ids, fit_max_new_tokens
from batchllm.errors import ConfigError, RowError
from batchllm.offline.encode import encode_requests, namespace_numbers
from batchllm.offline.feeder import MAX_RUN_REQUESTS, Feeder
from batchllm.offline.report import RunReport
from batchllm.offline.runtime import FinishedRequests, RunRequests, Runtime, RuntimeInfo
from batchllm.planner import DEFAULT_GROUP_ORDER, BatchPlan, GroupOrder, plan_batch
from batchllm.planner.run import PlannedRun, RunCutter
from batchllm.request import Completion, Request, SamplingParams
from batchllm.scheduler.output_length import PredictionError
from batchllm.tokens import TokenTable
from batchllm.trace import StepTrace
from batchllm.trace.steps import STEP_DTYPE, StepArray

_ENCODE_SLICE = 1024


@dataclass(slots=True)
class JobStats:
    """What a job has cost, all of it counted or timed where it happened."""

    num_prompt_tokens: int = 0
    num_optimal_prompt_tokens: int = 0
    num_computed_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_retractions: int = 0
    peak_kv_tokens: int = 0
    prediction: PredictionError = field(default_factory=PredictionError)
    tokenize_s: float = 0.0
    plan_s: float = 0.0
    run_s: float = 0.0


class _Samples:
    """Every sample of every request, as columns: the rows of the job's token table."""

    def __init__(self) -> None:
        self.token_ids: list[np.ndarray] = []
        self.request_index: list[int] = []
        self.sample: list[int] = []
        self.sampling_index: list[int] = []
        self.max_new_len: list[int] = []
        self.known_len: list[int] = []
        self.task: list[int] = []
        self.seed: list[int] = []
        self.namespace: list[str] = []


class Job:
    """A batch of requests on a runtime.

    Args:
        runtime: What runs them.
        group_order: Order of sibling groups in the plan.
        max_run_requests: Most requests that one message carries.
        keep_steps: Keep what each forward step was like, for `trace`.

    Attributes:
        rejected: Requests that cannot run, with the reason. The others go on.
        stats: Counts and times so far.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        group_order: GroupOrder = DEFAULT_GROUP_ORDER,
        max_run_requests: int = MAX_RUN_REQUESTS,
        keep_steps: bool = False,
    ) -> None:
        self._runtime = runtime
        self._group_order: GroupOrder = group_order
        self._max_run_requests = max_run_requests
        self._steps: list[StepArray] | None = [] if keep_steps else None
        self._started_at = 0.0  # on the monotonic clock
        self._task_ids: dict[str, int] = {"": -1}
        self._samples = _Samples()
        self._sampling_ids: dict[SamplingParams, int] = {}
        self._plan: BatchPlan | None = None
        self._table: TokenTable | None = None
        self.rejected: list[tuple[Request, RowError]] = []
        self.stats = JobStats()

    def prepare(self, requests: Iterable[Request]) -> None:
        """Tokenize in bulk, check each request against the runtime, and plan the batch.

        Raises:
            ConfigError: A request fits the KV pool, but not the KV limit.
        """
        started = time.perf_counter()
        requests = iter(requests)
        while requests_slice := list(islice(requests, _ENCODE_SLICE)):
            encoded = encode_requests(requests_slice, self._runtime.tokenizer)
            for request, token_ids in zip(requests_slice, encoded, strict=True):
                try:
                    self._add(request, token_ids)
                except RowError as error:
                    self.rejected.append((request, error))
        self._check_kv_limit()
        tokenized = time.perf_counter()
        self._table = TokenTable.from_lists(self._samples.token_ids)
        self._samples.token_ids = []
        self._plan = plan_batch(
            self._table,
            page_size=self._runtime.info.page_size,
            namespaces=namespace_numbers(self._samples.namespace),
            decode_lens=self._expected_lens(),
            group_order=self._group_order,
        )
        self.stats.num_prompt_tokens = self._plan.num_prompt_tokens
        self.stats.num_optimal_prompt_tokens = self._plan.optimal_prefill_tokens
        self.stats.tokenize_s = tokenized - started
        self.stats.plan_s = time.perf_counter() - tokenized

    async def run(self) -> AsyncGenerator[list[Completion], None]:
        """Run the prepared batch.

        Yields:
            Completions as they finish, in no particular order.

        Raises:
            EngineDiedError: The runtime is gone.
        """
        assert self._plan is not None and self._table is not None, "prepare() first"
        started = time.perf_counter()
        self._started_at = time.monotonic()
        cutter = RunCutter(
            self._plan,
            self._table,
            np.array(self._samples.max_new_len, np.int64),
            np.array(self._samples.known_len, np.int64),
            np.array(self._samples.task, np.int32),
        )
        feeder = Feeder(cutter, self._runtime.info.kv_limit_tokens, self._max_run_requests)
        job_id = self._runtime.open_job()
        try:
            while not feeder.is_done:
                while (run := feeder.take_run()) is not None:
                    self._runtime.submit(job_id, self._with_sampling(run))
                finished = await self._runtime.receive(job_id)
                feeder.finish(finished.positions)
                completions = self._collect(finished)
                self.stats.run_s = time.perf_counter() - started
                yield completions
        finally:
            self._runtime.close_job(job_id, is_complete=feeder.is_done)

    def report(self, *, num_requests: int, num_failed: int, elapsed_s: float) -> RunReport:
        """What the job has done.

        Args:
            num_requests: Rows of the input, those that never became a request included.
            num_failed: Those of them without an answer.
            elapsed_s: Seconds of the whole job.
        """
        stats = self.stats
        return RunReport(
            num_requests=num_requests,
            num_succeeded=num_requests - num_failed,
            num_failed=num_failed,
            num_prompt_tokens=stats.num_prompt_tokens,
            num_computed_prompt_tokens=stats.num_computed_prompt_tokens,
            num_optimal_prompt_tokens=stats.num_optimal_prompt_tokens,
            num_output_tokens=stats.num_output_tokens,
            elapsed_s=elapsed_s,
            num_retractions=stats.num_retractions,
            peak_kv_tokens=stats.peak_kv_tokens,
            kv_capacity_tokens=self._runtime.info.kv_capacity_tokens,
            num_predicted=stats.prediction.num_requests,
            num_predicted_tokens=round(stats.prediction.num_predicted_tokens),
            num_predicted_actual_tokens=stats.prediction.num_actual_tokens,
            sum_prediction_error_tokens=round(stats.prediction.sum_absolute_error),
            tokenize_s=stats.tokenize_s,
            plan_s=stats.plan_s,
            run_s=stats.run_s,
        )

    def trace(self, label: str) -> StepTrace:
        """What each forward step was like; the job must have been made with ``keep_steps``."""
        assert self._steps is not None
        steps = np.concatenate([*self._steps, np.zeros(0, STEP_DTYPE)])
        # The first step may begin before the job: its results were those of the one before.
        steps["start_s"] = np.maximum(steps["start_s"] - self._started_at, 0.0)
        info = self._runtime.info
        return StepTrace(
            label=label,
            kv_capacity_tokens=info.kv_capacity_tokens,
            kv_limit_tokens=info.kv_limit_tokens,
            steps=steps,
        )

    def _expected_lens(self) -> np.ndarray:
        """Output tokens expected of each row: what is known, else its limit."""
        known = np.array(self._samples.known_len, np.int64)
        return np.where(known > 0, known, np.array(self._samples.max_new_len, np.int64))

    def _check_kv_limit(self) -> None:
        info = self._runtime.info
        limit = info.max_request_len(info.kv_limit_tokens)
        for ids, max_new_len, index in zip(
            self._samples.token_ids, self._samples.max_new_len, self._samples.request_index, strict=True
        ):
            needed = len(ids) + max_new_len
            if needed > limit:
                enough = info.kv_limit_tokens + needed - limit
                raise ConfigError(
                    f"--kv-limit {info.kv_limit_tokens}: request {index} needs up to {needed} tokens "
                    f"({len(ids)} prompt + {max_new_len} new); raise it to at least {enough}"
                )

    def _add(self, request: Request, token_ids: Sequence[int] | RowError) -> None:
        if isinstance(token_ids, RowError):
            raise token_ids
        info, sampling = self._runtime.info, request.sampling
        if request.input_ids is not None:
            check_token_ids(token_ids, info.vocab_size)
        if request.may_lower_max_new_tokens:
            room = info.max_request_len(info.kv_limit_tokens)
            sampling = fit_max_new_tokens(sampling, len(token_ids), context_len=info.context_len, kv_capacity=room)
        room = info.max_request_len(info.kv_capacity_tokens)
        check_prompt_len(len(token_ids), sampling, context_len=info.context_len, kv_capacity=room)
        _check_supported(sampling, info)
        # The limit travels per request; what is left is shared by many.
        kind = replace(sampling, max_new_tokens=request.sampling.max_new_tokens, n=1, seed=None)
        sampling_index = self._sampling_ids.setdefault(kind, len(self._sampling_ids))
        check_expected_len(request.expected_new_tokens, len(token_ids), info.context_len)
        known_len = sampling.max_new_tokens if sampling.has_known_len else request.expected_new_tokens or 0
        task = self._task_ids.setdefault(request.task, len(self._task_ids) - 1)
        ids = np.asarray(token_ids, dtype=np.int32)
        samples = self._samples
        for sample in range(sampling.n):
            samples.token_ids.append(ids)
            samples.request_index.append(request.index)
            samples.sample.append(sample)
            samples.sampling_index.append(sampling_index)
            samples.max_new_len.append(sampling.max_new_tokens)
            samples.known_len.append(known_len)
            samples.task.append(task)
            samples.seed.append(_seed(sampling.seed, info.random_seed, request.index, sample))
            samples.namespace.append(request.namespace)

    def _with_sampling(self, run: PlannedRun) -> RunRequests:
        """The run with only the sampling parameters that occur in it."""
        samples, rows = self._samples, run.request_row.tolist()
        kinds = list(self._sampling_ids)
        used = sorted({samples.sampling_index[row] for row in rows})
        place = {sampling_index: i for i, sampling_index in enumerate(used)}
        namespaces = [samples.namespace[row] for row in rows]
        return RunRequests(
            run=run,
            sampling=tuple(kinds[i] for i in used),
            sampling_index=[place[samples.sampling_index[row]] for row in rows],
            seeds=[samples.seed[row] for row in rows],
            namespaces=namespaces if any(namespaces) else None,
        )

    def _collect(self, finished: FinishedRequests) -> list[Completion]:
        assert self._plan is not None
        samples = self._samples
        completions = []
        for position, completion in zip(finished.positions, finished.completions, strict=True):
            row = int(self._plan.order[position])
            self.stats.num_output_tokens += completion.completion_tokens
            completions.append(replace(completion, index=samples.request_index[row], sample=samples.sample[row]))
        self.stats.num_computed_prompt_tokens = finished.num_computed_prompt_tokens
        self.stats.num_retractions = finished.num_retractions
        self.stats.peak_kv_tokens = finished.peak_kv_tokens
        self.stats.prediction = finished.prediction
        if self._steps is not None:
            self._steps.append(finished.steps)
        return completions


def _check_supported(sampling: SamplingParams, info: RuntimeInfo) -> None:
    if sampling.seed is not None and not info.has_seeded_sampling:
        raise RowError(
            "a seed needs --sampling-backend pytorch; this engine runs another one",
            code="seed_not_supported",
            param="seed",
        )
    has_grammar = sampling.json_schema is not None or sampling.regex is not None
    if has_grammar and not info.has_grammar:
        raise RowError(
            "structured output (json_schema, regex) is switched off; start the engine without --grammar-backend none",
            code="grammar_not_supported",
            param="json_schema" if sampling.json_schema is not None else "regex",
        )


def _seed(seed: int | None, job_seed: int, index: int, sample: int) -> int:
    """Seed of one sample: what the row says, and something of its own for every further sample."""
    if seed is not None and sample == 0:
        return seed
    text = f"{seed},{sample}" if seed is not None else f"{job_seed},{index},{sample}"
    return xxhash.xxh64_intdigest(text.encode()) >> 1
