"""Claims about requests outside any plan, beside jobs and among themselves, on the real runtime."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

from batchllm import BatchEngine
from batchllm.offline.job import NOTHING, Job
from batchllm.srt.managers.io_struct import PlannedShareReqInput
from tests.srt.live import GREEDY, answers_of, job_of, live_answer, live_request, run, tell_manager

pytestmark = pytest.mark.engine


def _ids(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(10, 1500) for _ in range(num_tokens)]


def _groups(seed: int, num_groups: int, group_size: int, shared_len: int, private_len: int) -> list[list[int]]:
    """Prompts of groups that share a prefix each, shuffled."""
    prompts = [
        _ids(seed * 1000 + group, shared_len) + _ids(seed * 1000 + 500 + group * group_size + i, private_len)
        for group in range(num_groups)
        for i in range(group_size)
    ]
    random.Random(seed).shuffle(prompts)
    return prompts


def _all_live(engine: BatchEngine, prompts: list[list[int]], **sampling: Any) -> list[dict[str, Any]]:
    async def all_answers() -> list[dict[str, Any]]:
        return await asyncio.gather(*(live_answer(engine, prompt, **sampling) for prompt in prompts))

    return run(engine, all_answers())


async def _all_at_once(engine: BatchEngine, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Answers to live requests that have all arrived before the first of them starts."""
    await tell_manager(engine, "send", PauseGenerationReqInput(mode="in_place"))
    tasks = [asyncio.ensure_future(live_answer(engine, prompt)) for prompt in prompts]
    await asyncio.sleep(0.1)  # each has sent its request before it waits for the answer
    await tell_manager(engine, "send", ContinueGenerationReqInput(torch_empty_cache=False))
    return list(await asyncio.gather(*tasks))


def _num_computed(answers: list[dict[str, Any]]) -> int:
    return sum(answer["meta_info"]["prompt_tokens"] - answer["meta_info"]["cached_tokens"] for answer in answers)


def _expected(engine: BatchEngine, prompts: list[list[int]]) -> list[list[int]]:
    return [list(c.output_ids) for c in engine.batch_generate(input_ids=prompts, sampling_params=GREEDY)]


# A closed job gives back everything


def test_batches_that_are_dropped_leave_the_whole_pool(engine: BatchEngine) -> None:
    """Wherever they were: what they had pinned for requests that never came is free again."""
    prompts = _groups(1, num_groups=3, group_size=40, shared_len=300, private_len=10)
    for num_taken in (1, 5, 30, 70):
        stream = engine.batch_generate_iter(input_ids=prompts, sampling_params=GREEDY)
        for _ in range(num_taken):
            next(stream)
        stream.close()  # an iterator to the caller, a generator here
    (answer,) = _all_live(engine, [_ids(2, 1400)])  # of 1500
    assert len(answer["output_ids"]) == 8
    engine.batch_generate(input_ids=prompts, sampling_params=GREEDY)
    report = engine.last_report
    assert report is not None
    assert report.num_computed_prompt_tokens == report.num_optimal_prompt_tokens


def test_a_job_that_is_planned_anew_finds_what_the_old_one_had_computed(engine: BatchEngine) -> None:
    """The old one is withdrawn, the new one submitted, the old one closed: prefixes that are there stay there."""
    prompts = _groups(3, num_groups=2, group_size=60, shared_len=400, private_len=10)
    expected = _expected(engine, prompts)
    old, new = job_of(engine, prompts), job_of(engine, prompts)

    async def replan() -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        begin = asyncio.Event()

        def withdraw() -> None:
            old.stop_admitting()
            begin.set()

        async def again() -> dict[int, list[int]]:
            await begin.wait()
            return await answers_of(new)

        first, second = await asyncio.gather(answers_of(old, withdraw), again())
        return first, second

    first, second = run(engine, replan())
    assert 0 < len(first) < len(prompts)
    assert all(ids == expected[row] for row, ids in first.items())
    assert second == dict(enumerate(expected))
    assert new.stats.num_computed_prompt_tokens <= new.stats.num_optimal_prompt_tokens - 350
    (answer,) = _all_live(engine, [_ids(4, 1400)])
    assert len(answer["output_ids"]) == 8


def test_what_is_withdrawn_comes_back_together(engine: BatchEngine) -> None:
    """Thousands of messages would hold up live requests whenever a batch joins or leaves."""
    job = job_of(engine, _groups(11, num_groups=1, group_size=900, shared_len=300, private_len=10))

    async def count() -> tuple[int, int]:
        num_messages = num_answers = 0
        async for finished in job.run():
            job.stop_admitting()
            num_messages += finished is not NOTHING
            num_answers += len(finished.rows)
        return num_messages, num_answers

    num_messages, num_answers = run(engine, count())
    assert num_answers < 600, "nothing was withdrawn"
    assert num_messages <= num_answers + 2


# Neither live nor planned requests starve


def test_a_live_request_gets_room_from_a_job_that_pins_nearly_all_of_it(engine: BatchEngine) -> None:
    """Its prompt would not fit before the job ends; the job goes on behind it, and both are right."""
    prompts = _groups(5, num_groups=1, group_size=200, shared_len=1200, private_len=10)
    live_prompt = _ids(6, 700)
    expected, (expected_live,) = _expected(engine, prompts), _expected(engine, [live_prompt])
    job = job_of(engine, prompts)
    num_left: list[int] = []

    async def both() -> tuple[dict[int, list[int]], dict[str, Any]]:
        begin = asyncio.Event()

        async def live() -> dict[str, Any]:
            await begin.wait()
            answer = await live_answer(engine, live_prompt)
            num_left.append(len(job.rows_in_flight()))
            return answer

        done, answer = await asyncio.gather(answers_of(job, begin.set), live())
        return done, answer

    done, answer = run(engine, both())
    assert num_left[0] > 0
    assert list(answer["output_ids"]) == expected_live
    assert done == dict(enumerate(expected))
    # The prefix once more, and the few tokens that some prompts happen to share behind it.
    num_again = job.stats.num_computed_prompt_tokens - job.stats.num_optimal_prompt_tokens
    assert 1200 <= num_again == job.stats.num_recomputed_for_live <= 1200 + 50


def test_a_stream_of_live_requests_does_not_stop_a_job(engine: BatchEngine) -> None:
    """Though more wait at any time than the pool holds."""
    prompts = _groups(7, num_groups=6, group_size=10, shared_len=150, private_len=20)
    expected = _expected(engine, prompts)
    job = job_of(engine, prompts)
    num_live_left = 600

    async def stream(seed: int) -> None:
        nonlocal num_live_left
        while num_live_left and not done.done():
            num_live_left -= 1
            await live_answer(engine, _ids(seed + num_live_left, 200))

    async def both() -> None:
        nonlocal done
        done = asyncio.ensure_future(answers_of(job))
        await asyncio.gather(done, *(stream(10_000 * i) for i in range(1, 13)))

    done: asyncio.Future[dict[int, list[int]]] = engine.runtime.loop.create_future()
    run(engine, both())
    assert done.result() == dict(enumerate(expected))
    assert num_live_left > 0


def test_a_job_that_is_late_has_more_of_the_turns(engine: BatchEngine) -> None:
    """Beside more live requests than the pool holds: so many of these are answered before it is done."""
    prompts = _groups(17, num_groups=6, group_size=10, shared_len=150, private_len=20)
    expected = _expected(engine, prompts)
    num_answered = {}
    for share in (1 / 8, 3 / 4):
        run(engine, tell_manager(engine, "send", PlannedShareReqInput(share=share)))
        num_answered[share] = _flood(engine, job_of(engine, prompts), expected, seed=int(1e6 * share))
    run(engine, tell_manager(engine, "send", PlannedShareReqInput(share=1 / 8)))
    assert num_answered[3 / 4] < 0.6 * num_answered[1 / 8]


def _flood(engine: BatchEngine, job: Job, expected: list[list[int]], seed: int) -> int:
    """Runs a job while a dozen live requests wait at any time; returns how many of these were answered meanwhile."""
    num_answered = 0

    async def stream(number: int, done: asyncio.Future[dict[int, list[int]]]) -> None:
        nonlocal num_answered
        for i in range(600):
            await live_answer(engine, _ids(seed + 1000 * number + i, 200))
            if done.done():
                return
            num_answered += 1

    async def both() -> dict[int, list[int]]:
        done = asyncio.ensure_future(answers_of(job))
        await asyncio.gather(*(stream(number, done) for number in range(12)))
        return await done

    assert run(engine, both()) == dict(enumerate(expected))
    return num_answered


def test_a_live_request_that_may_run_long_does_not_stop_a_job(engine: BatchEngine) -> None:
    """Its limit is most of the pool; the job opens one prefix after the other beside it."""
    prompts = _groups(8, num_groups=6, group_size=4, shared_len=100, private_len=10)
    expected = _expected(engine, prompts)
    job = job_of(engine, prompts)

    async def both() -> tuple[dict[int, list[int]], bool, int]:
        live = asyncio.ensure_future(live_answer(engine, _ids(9, 20), max_new_tokens=1200))
        await asyncio.sleep(0.5)
        answers = await answers_of(job)
        is_first = not live.done()
        return answers, is_first, len((await live)["output_ids"])

    answers, is_first, num_generated = run(engine, both())
    assert answers == dict(enumerate(expected))
    assert is_first
    assert num_generated == 1200


def test_a_live_request_that_waits_for_another_does_not_stop_a_job(engine: BatchEngine) -> None:
    """It fits beside what runs as little as its limit does; the job needs much less, and goes on."""
    prompts = _groups(20, num_groups=6, group_size=4, shared_len=100, private_len=10)
    expected = _expected(engine, prompts)
    job = job_of(engine, prompts)

    async def both() -> tuple[dict[int, list[int]], bool, list[int]]:
        running = asyncio.ensure_future(live_answer(engine, _ids(21, 20), max_new_tokens=1000))
        await asyncio.sleep(0.2)
        waiting = asyncio.ensure_future(live_answer(engine, _ids(22, 1300), max_new_tokens=20))
        await asyncio.sleep(0.1)
        answers = await answers_of(job)
        is_first = not running.done() and not waiting.done()
        return answers, is_first, [len(answer["output_ids"]) for answer in await asyncio.gather(running, waiting)]

    answers, is_first, lens = run(engine, both())
    assert answers == dict(enumerate(expected))
    assert is_first
    assert lens == [1000, 20]


# A plan over what waits


@pytest.mark.parametrize("max_new_tokens", [0, 1])
def test_live_requests_that_end_with_their_prompt_do_not_stop_a_job(engine: BatchEngine, max_new_tokens: int) -> None:
    """Their pieces take the whole of several steps, and no row decodes when they are gone."""
    job = job_of(engine, [_ids(600 + i, 20) for i in range(6)])

    async def both() -> tuple[list[dict[str, Any]], dict[int, list[int]]]:
        await tell_manager(engine, "send", PauseGenerationReqInput(mode="in_place"))
        live = [
            asyncio.ensure_future(live_answer(engine, _ids(700 + i, 1000), max_new_tokens=max_new_tokens))
            for i in range(2)
        ]
        planned = asyncio.ensure_future(answers_of(job))
        await asyncio.sleep(0.5)  # all have been sent
        await tell_manager(engine, "send", ContinueGenerationReqInput(torch_empty_cache=False))
        return list(await asyncio.gather(*live)), await asyncio.wait_for(planned, 60)

    live, planned = run(engine, both())
    assert [len(answer["output_ids"]) for answer in live] == [max_new_tokens] * 2
    assert sorted(planned) == list(range(6))


def test_what_a_burst_of_live_requests_shares_is_computed_once(engine: BatchEngine) -> None:
    """Shuffled groups, far more than the pool holds: as many prompt tokens as a plan of them all computes."""
    prompts = _groups(10, num_groups=12, group_size=12, shared_len=300, private_len=20)
    expected = _expected(engine, prompts)
    report = engine.last_report
    assert report is not None
    answers = run(engine, _all_at_once(engine, prompts))
    assert [list(answer["output_ids"]) for answer in answers] == expected
    assert _num_computed(answers) == report.num_optimal_prompt_tokens


def test_live_requests_that_read_together_are_answered_as_planned_ones(engine: BatchEngine) -> None:
    """Under three levels of prefixes, some of them duplicates or prefixes of others: the same outputs as planned."""
    rng = random.Random(40)
    prompts = []
    for i in range(4):
        outer = _ids(41, 60) + _ids(50 + i, 120)
        for j in range(4):
            inner = outer + _ids(60 + 10 * i + j, 80)
            prompts += [outer, inner, inner, inner + _ids(100 + 10 * i + j, rng.randint(1, 60))]
    rng.shuffle(prompts)
    expected = _expected(engine, prompts)
    for _ in range(2):
        answers = run(engine, _all_at_once(engine, prompts))
        assert [list(answer["output_ids"]) for answer in answers] == expected


def test_live_duplicates_are_computed_once(engine: BatchEngine) -> None:
    """All but the last token, whose logits each needs."""
    prompt = _ids(12, 200)
    answers = _all_live(engine, [prompt] * 20)
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 1
    assert _num_computed(answers) == 200 + 19


def test_namespaces_of_live_requests_share_nothing(engine: BatchEngine) -> None:
    """The extra key keeps them apart."""
    prompt = _ids(13, 150)

    async def all_answers() -> list[dict[str, Any]]:
        return await asyncio.gather(
            *(live_request(engine, input_ids=prompt, sampling_params=GREEDY, extra_key=key) for key in ("a", "b", "a"))
        )

    assert _num_computed(run(engine, all_answers())) == 150 + 150 + 1


def test_a_long_live_prompt_in_pieces_is_shared_too(engine: BatchEngine) -> None:
    """The chunk is 256 tokens; the followers wait until what they share has been computed."""
    prompts = [_ids(14, 900) + _ids(15 + i, 10) for i in range(6)]
    answers = _all_live(engine, prompts)
    assert _num_computed(answers) == 900 + 6 * 10


def test_the_next_turn_of_a_chat_reads_the_one_before(engine: BatchEngine) -> None:
    """Prompt and answer of a turn stay in the cache while there is room."""
    prompt = _ids(30, 100)
    (first,) = _all_live(engine, [prompt])
    (second,) = _all_live(engine, [prompt + list(first["output_ids"]) + _ids(31, 10)])
    assert second["meta_info"]["cached_tokens"] == 100 + 8 - 1


def test_live_requests_that_are_aborted_while_they_wait_leave_the_rest_alone(engine: BatchEngine) -> None:
    """Whoever stays is answered as ever."""
    prompts = _groups(32, num_groups=4, group_size=10, shared_len=200, private_len=20)
    expected = _expected(engine, prompts)

    async def all_answers() -> list[list[int]]:
        blocker = asyncio.ensure_future(live_answer(engine, _ids(33, 1300), max_new_tokens=40))
        tasks = [
            asyncio.ensure_future(
                live_request(
                    engine, input_ids=prompt, sampling_params=GREEDY, rid=f"live-{'gone' if i % 2 else 'kept'}-{i}"
                )
            )
            for i, prompt in enumerate(prompts)
        ]
        await asyncio.sleep(0.2)
        for i in range(1, len(prompts), 2):
            await tell_manager(engine, "abort_request", rid=f"live-gone-{i}")
        await blocker
        await asyncio.gather(*tasks[1::2], return_exceptions=True)
        return [list(answer["output_ids"]) for answer in await asyncio.gather(*tasks[::2])]

    assert run(engine, all_answers()) == expected[::2]


def test_log_probabilities_of_a_live_prompt_are_all_there(engine: BatchEngine) -> None:
    """Such a request reads nothing from the cache, and is not held back for anybody."""
    prompt = _ids(34, 60)

    async def all_answers() -> list[dict[str, Any]]:
        return await asyncio.gather(
            *(
                live_request(engine, input_ids=prompt, sampling_params=GREEDY, return_logprob=True, logprob_start_len=0)
                for _ in range(3)
            )
        )

    for answer in run(engine, all_answers()):
        assert len(answer["meta_info"]["input_token_logprobs"]) == 60


def test_pausing_takes_the_kv_of_all_and_going_on_answers_all(engine: BatchEngine) -> None:
    """SGLang retracts whatever runs, planned or live."""
    prompts = _groups(35, num_groups=3, group_size=20, shared_len=150, private_len=10)
    live_prompts = _groups(36, num_groups=2, group_size=5, shared_len=100, private_len=10)
    expected, expected_live = _expected(engine, prompts), _expected(engine, live_prompts)
    job = job_of(engine, prompts)

    async def both() -> tuple[dict[int, list[int]], list[dict[str, Any]]]:
        begin = asyncio.Event()

        async def live() -> list[dict[str, Any]]:
            await begin.wait()
            tasks = [asyncio.ensure_future(live_answer(engine, prompt)) for prompt in live_prompts]
            await asyncio.sleep(0.02)
            await tell_manager(engine, "send", PauseGenerationReqInput(mode="retract"))
            await asyncio.sleep(0.1)
            await tell_manager(engine, "send", ContinueGenerationReqInput(torch_empty_cache=False))
            return list(await asyncio.gather(*tasks))

        done, answers = await asyncio.gather(answers_of(job, begin.set), live())
        return done, answers

    done, answers = run(engine, both())
    assert done == dict(enumerate(expected))
    assert [list(answer["output_ids"]) for answer in answers] == expected_live


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"logit_bias": {"5": -1e308}}, "32 bits"),
        ({"temperature": 1e39}, "32 bits"),
        ({"temperature": 1.0, "top_k": 2**63}, "top_k"),
        ({"sampling_seed": 2**63}, "sampling_seed"),
        ({"min_new_tokens": 2, "stop_token_ids": [10**6]}, "vocabulary"),
    ],
)
def test_a_live_request_that_would_end_the_engine_ends_alone(
    engine: BatchEngine, sampling: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        run(engine, live_request(engine, input_ids=[5, 6, 7], sampling_params=GREEDY | sampling))
    assert run(engine, live_answer(engine, [5, 6, 7]))["output_ids"]


@pytest.mark.parametrize("token_id", [-1, 10**6, 2**40])
def test_a_live_prompt_of_tokens_that_the_model_does_not_have_is_refused(engine: BatchEngine, token_id: int) -> None:
    with pytest.raises(ValueError, match="vocab"):
        run(engine, live_request(engine, input_ids=[5, token_id, 7], sampling_params=GREEDY))
    assert run(engine, live_answer(engine, [5, 6, 7]))["output_ids"]


@pytest.mark.parametrize("fields", [{"top_logprobs_num": 2**31}, {"token_ids_logprob": [10**6]}])
def test_a_live_request_for_log_probabilities_of_no_tokens_ends_alone(
    engine: BatchEngine, fields: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        run(engine, live_request(engine, input_ids=[5, 6, 7], sampling_params=GREEDY, return_logprob=True, **fields))
    assert run(engine, live_answer(engine, [5, 6, 7]))["output_ids"]


@pytest.mark.parametrize("num", [2**31, 1025, 0, -1, True, 1.5, "2", None])
def test_a_live_request_has_as_many_answers_as_there_can_be(engine: BatchEngine, num: object) -> None:
    """SGLang makes a request for each of them, until there is no memory left."""
    with pytest.raises(ValueError, match="n must be an integer from 1 to 1024"):
        run(engine, live_request(engine, input_ids=[5, 6, 7], sampling_params=GREEDY | {"n": num}))
    answers = run(engine, live_request(engine, input_ids=[5, 6, 7], sampling_params=GREEDY | {"n": 3}))
    assert len(answers) == 3


_CANNOT_BE: list[tuple[dict[str, Any], str]] = [
    ({"return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num must be 0 or more, not -1"),
    ({"return_logprob": True, "logprob_start_len": -2}, "logprob_start_len must be -1 or more, not -2"),
    ({"return_logprob": True, "top_logprobs_num": [1]}, "top_logprobs_num is a list, and there is one prompt"),
    ({"return_logprob": True, "token_ids_logprob": [[5]]}, "token_ids_logprob is a list, and there is one prompt"),
    ({"rid": ["a"]}, "rid is a list, and there is one prompt"),
    ({"input_ids": [[5], [6]], "return_logprob": [True]}, "return_logprob has 1 values for 2 prompts"),
    ({"input_ids": [[5], [6]], "sampling_params": [GREEDY]}, "sampling_params has 1 values for 2 prompts"),
    ({"positional_embed_overrides": [[1]]}, "positional_embed_overrides cannot be given as JSON"),
    ({"sampling_params": {"max_new_tokens": 1.5}}, "max_new_tokens is 1.5: Expected `int"),
    ({"sampling_params": {"stream_interval": [5]}}, r"stream_interval is \[5\]: Expected `int"),
    ({"sampling_params": {"stop_token_ids": 5}}, "stop_token_ids is 5: Expected `array"),
    ({"sampling_params": {"temperature": "x"}}, "temperature is 'x': Expected `float`"),
    ({"sampling_params": {"stop_regex": ["a", "("]}}, r"stop_regex '\(' is no regular .*: missing \), unterminated"),
    ({"sampling_params": {"stop_regex": "a{99999999999}"}}, r"stop_regex 'a\{9+\}' is no regular .*: the repetition"),
    ({"sampling_params": {"is_normalized": True}}, "unknown parameter 'is_normalized'"),
]


@pytest.mark.parametrize(("fields", "message"), _CANNOT_BE)
def test_a_live_request_that_cannot_be_carried_out_is_refused_by_name_and_ends_nothing(
    engine: BatchEngine, fields: dict[str, Any], message: str
) -> None:
    """SGLang checks none of these; most end its scheduler, with every request that runs."""
    fields = {"input_ids": [5, 6, 7], "sampling_params": GREEDY} | fields
    with pytest.raises(ValueError, match=message):
        run(engine, live_request(engine, **fields))
    assert run(engine, live_answer(engine, [5, 6, 7]))["output_ids"]


def test_a_list_for_several_prompts_of_a_live_request_is_taken(engine: BatchEngine) -> None:
    """A value for each prompt, one for all, or token ids for all."""
    fields = {"return_logprob": [True, False], "token_ids_logprob": [5, 7], "sampling_params": [GREEDY, GREEDY]}
    first, second = run(engine, live_request(engine, input_ids=[[5, 6], [7, 8]], **fields))
    assert len(first["meta_info"]["output_token_ids_logprobs"][0]) == 2
    assert "output_token_logprobs" not in second["meta_info"]
    whole = run(engine, live_request(engine, input_ids=[5, 6], sampling_params={"max_new_tokens": 4.0}))
    assert len(whole["output_ids"]) <= 4
