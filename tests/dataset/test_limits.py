"""What the engine cannot take is refused with the numbers needed and available."""

from __future__ import annotations

import pytest

from batchllm.dataset import check_prompt_len, check_token_ids, fit_max_new_tokens
from batchllm.dataset.limits import check_adapter, check_sampling_ids, check_sampling_texts
from batchllm.errors import RowError
from batchllm.request import SamplingParams

TEN = SamplingParams(max_new_tokens=10)


def test_prompt_and_output_may_fill_the_context_exactly() -> None:
    check_prompt_len(90, TEN, context_len=100, kv_capacity=100)


@pytest.mark.parametrize("prompt_len", [91, 99, 100, 5000])
def test_more_than_the_context_is_too_long_with_both_numbers(prompt_len: int) -> None:
    with pytest.raises(RowError) as caught:
        check_prompt_len(prompt_len, TEN, context_len=100, kv_capacity=10_000)
    assert caught.value.code == "prompt_too_long"
    assert str(prompt_len) in caught.value.message and "100" in caught.value.message


def test_the_field_to_change_is_the_one_named() -> None:
    with pytest.raises(RowError) as caught:
        check_prompt_len(95, TEN, context_len=100, kv_capacity=10_000)
    assert caught.value.param == "max_new_tokens"
    assert "at most 5" in caught.value.message


def test_more_than_the_whole_kv_pool_never_fits() -> None:
    with pytest.raises(RowError) as caught:
        check_prompt_len(60, TEN, context_len=100, kv_capacity=64)
    assert caught.value.code == "never_fits_kv_pool"
    assert "70" in caught.value.message and "64" in caught.value.message


def test_samples_count_alone_for_the_kv_pool() -> None:
    sampling = SamplingParams(max_new_tokens=10, n=8)
    check_prompt_len(60, sampling, context_len=100, kv_capacity=70)


def test_default_limit_is_lowered_to_what_is_left() -> None:
    fitted = fit_max_new_tokens(TEN, 95, context_len=100, kv_capacity=98)
    assert fitted.max_new_tokens == 3
    check_prompt_len(95, fitted, context_len=100, kv_capacity=98)


@pytest.mark.parametrize("prompt_len", [5, 90, 100, 200])
def test_limit_stays_where_it_fits_or_nothing_does(prompt_len: int) -> None:
    assert fit_max_new_tokens(TEN, prompt_len, context_len=100, kv_capacity=100) is TEN


def test_limit_is_not_lowered_below_the_minimum() -> None:
    sampling = SamplingParams(max_new_tokens=10, min_new_tokens=8)
    assert fit_max_new_tokens(sampling, 95, context_len=100, kv_capacity=100) is sampling


def test_token_ids_of_the_vocabulary_pass() -> None:
    check_token_ids([0, 31_999], 32_000)
    check_token_ids([], 32_000)


@pytest.mark.parametrize("wrong", [32_000, -1])
def test_first_token_id_outside_the_vocabulary_is_named(wrong: int) -> None:
    with pytest.raises(RowError) as caught:
        check_token_ids([5, wrong, 99_999], 32_000)
    assert caught.value.code == "token_id_out_of_range"
    assert f"input_ids[1] is {wrong}" in caught.value.message
    assert "31999" in caught.value.message


def test_stop_token_ids_are_the_vocabularys() -> None:
    """Beside ``min_new_tokens`` the scheduler has a score for each of them."""
    check_sampling_ids(SamplingParams(stop_token_ids=(0, 99)), vocab_size=100)
    with pytest.raises(RowError) as caught:
        check_sampling_ids(SamplingParams(stop_token_ids=(5, 100)), vocab_size=100)
    assert (caught.value.code, caught.value.param) == ("token_id_out_of_range", "stop_token_ids")
    assert "100" in caught.value.message and "0 to 99" in caught.value.message


@pytest.mark.parametrize(
    ("sampling", "param"),
    [(SamplingParams(stop=("a",)), "stop"), (SamplingParams(min_new_tokens=1), "min_new_tokens")],
)
def test_what_needs_a_tokenizer_is_refused_without_one(sampling: SamplingParams, param: str) -> None:
    check_sampling_texts(SamplingParams(stop_token_ids=(1,)))
    with pytest.raises(RowError) as caught:
        check_sampling_texts(sampling)
    assert (caught.value.code, caught.value.param) == ("tokenizer_needed", param)


def test_only_adapters_that_are_loaded_may_be_named() -> None:
    check_adapter(None, ())
    check_adapter("a", ("a", "b"))
    check_adapter("a", None)
    for loaded, words in (((), "none is loaded"), (("c", "b"), "loaded are b, c")):
        with pytest.raises(RowError, match=words) as caught:
            check_adapter("a", loaded)
        assert (caught.value.code, caught.value.param) == ("unknown_adapter", "lora_path")
