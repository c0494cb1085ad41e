"""The ground that this package stands on, verified when a process starts. Runs in every process that imports SGLang.

SGLang logs and swallows errors of plugins, so nothing here relies on them silently: the version must match
exactly, and every upstream function that we override or replace must still be the one we read. After an
upgrade, run ``python -m batchllm.srt.compat`` and walk through what has changed.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import pkgutil
from importlib.metadata import version

from batchllm.errors import SeamError

SGLANG_VERSION = "0.5.17"

# First 12 digits of the SHA-256 of the source of each upstream function that we override, replace or lean on.
PINNED: dict[str, str] = {
    "sglang.srt.managers.scheduler:Scheduler.__init__": "991355af71d8",
    "sglang.srt.managers.scheduler:Scheduler.init_running_status": "ebfc63db2624",
    "sglang.srt.managers.scheduler:Scheduler.init_ipc_channels": "750d68fbc579",
    "sglang.srt.managers.scheduler:Scheduler.init_request_dispatcher": "2586ba70430a",
    "sglang.srt.managers.scheduler:Scheduler.init_output_streamer": "3eee08a8d9e4",
    "sglang.srt.managers.scheduler:Scheduler.run_event_loop": "acb21c1a9683",
    "sglang.srt.managers.scheduler:Scheduler.event_loop_normal": "1bb8fae5cf58",
    "sglang.srt.managers.scheduler:Scheduler.event_loop_overlap": "ccfc721a7ae8",
    "sglang.srt.managers.scheduler:Scheduler.handle_generate_request": "f0610d799ae7",
    "sglang.srt.managers.scheduler:Scheduler._add_request_to_queue": "075bf4dbc714",
    "sglang.srt.managers.scheduler:Scheduler._set_or_validate_priority": "e206b5f52ca0",
    "sglang.srt.managers.scheduler:Scheduler._abort_on_queued_limit": "bf482add511f",
    "sglang.srt.managers.scheduler:Scheduler._abort_on_waiting_timeout": "d831c46ea81c",
    "sglang.srt.managers.scheduler:Scheduler.get_num_allocatable_reqs": "a4102a510154",
    "sglang.srt.managers.scheduler:Scheduler.get_next_batch_to_run": "e6a99a24e15c",
    "sglang.srt.managers.scheduler:Scheduler.get_new_batch_prefill": "e6c7c21ed672",
    "sglang.srt.managers.scheduler:Scheduler._get_new_batch_prefill_raw": "c52950a4fefc",
    "sglang.srt.managers.scheduler:Scheduler.update_running_batch": "a36af157c1d7",
    "sglang.srt.managers.scheduler:Scheduler.run_batch": "af728442e936",
    "sglang.srt.managers.scheduler:Scheduler.abort_request": "7e21b552f849",
    "sglang.srt.managers.scheduler:Scheduler.pause_generation": "d3c14a7df269",
    "sglang.srt.managers.scheduler:Scheduler.process_pending_chunked_abort": "a46cda9bd86d",
    "sglang.srt.managers.scheduler:Scheduler.is_fully_idle": "7a5ff7e94515",
    "sglang.srt.managers.scheduler:Scheduler.stash_chunked_request": "c3a9d340502f",
    "sglang.srt.managers.scheduler:Scheduler.on_idle": "a6e5e6adff8f",
    "sglang.srt.managers.scheduler:Scheduler.maybe_sleep_on_idle": "3c39e1fe8220",
    "sglang.srt.managers.schedule_batch:ScheduleBatch.check_decode_mem": "4a524f91bed9",
    "sglang.srt.managers.schedule_batch:retract_all": "06596fe956b2",
    "sglang.srt.managers.schedule_batch:ScheduleBatch.filter_batch": "bf6325d2cbeb",
    "sglang.srt.managers.schedule_batch:ScheduleBatch.merge_batch": "3cb7173f62ca",
    "sglang.srt.managers.schedule_batch:ScheduleBatch.prepare_for_decode": "83f27af779b3",
    "sglang.srt.managers.schedule_batch:ScheduleBatch.init_new": "e9f3ef069ad3",
    "sglang.srt.sampling.penaltylib.orchestrator:BatchedPenalizerOrchestrator": "5d00a984e510",
    "sglang.srt.managers.scheduler_components.invariant_checker:SchedulerInvariantChecker._get_total_uncached_sizes": "f3035f506742",
    "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.flush_cache_after_weight_update": "c26059c19b24",
    "sglang.srt.managers.schedule_batch:ScheduleBatch.mix_with_running": "f01f36ec650f",
    "sglang.srt.managers.scheduler:run_scheduler_process": "932c4889e759",
    "sglang.srt.managers.schedule_policy:SchedulePolicy.calc_priority": "10e6fa5718ab",
    "sglang.srt.managers.schedule_batch:Req._compute_max_prefix_len": "80f286d6ffac",
    "sglang.srt.managers.schedule_policy:PrefillAdder.__init__": "ae9e0cd542de",
    "sglang.srt.managers.schedule_policy:PrefillAdder.add_one_req": "0e0643fee8c7",
    "sglang.srt.managers.schedule_policy:PrefillAdder.add_chunked_req": "d71442519fbf",
    "sglang.srt.managers.schedule_policy:PrefillAdder._update_prefill_budget": "20bb8d4ecf1e",
    "sglang.srt.managers.schedule_batch:Req.__init__": "e704b6ed9f43",
    "sglang.srt.managers.schedule_batch:Req.init_next_round_input": "202af99da877",
    "sglang.srt.managers.schedule_batch:Req.reset_for_retract": "380a2bc45276",
    "sglang.srt.managers.schedule_batch:Req.update_finish_state": "470076e58287",
    "sglang.srt.managers.schedule_batch:Req._check_str_based_finish": "bba588eb6056",
    "sglang.srt.managers.schedule_batch:Req._stop_match_tail_len": "a4f0f4fb35b1",
    "sglang.srt.managers.schedule_batch:Req.set_finish_with_abort": "6931d07d8ee3",
    "sglang.srt.constrained.xgrammar_backend:XGrammarGrammar.accept_token": "10ac43f0c3da",
    "sglang.srt.sampling.penaltylib.min_new_tokens:BatchedMinNewTokensPenalizer": "8d46995eca77",
    "sglang.srt.managers.schedule_batch:release_req": "d4331967c8e9",
    "sglang.srt.managers.schedule_batch:ScheduleBatch.prepare_for_extend": "62b9a70bb45c",
    "sglang.srt.managers.schedule_batch:ScheduleBatch.retract_decode": "caac93f667f1",
    "sglang.srt.mem_cache.radix_cache:RadixCache": "2ec1dcfd3e94",
    "sglang.srt.mem_cache.common:evict_from_tree_cache": "d4662ee0b631",
    "sglang.srt.mem_cache.evict_policy:EvictionStrategy": "fab9d573ffa2",
    "sglang.srt.mem_cache.common:release_kv_cache": "0fb7e224c744",
    "sglang.srt.mem_cache.common:maybe_cache_unfinished_req": "1711eac8200b",
    "sglang.srt.mem_cache.allocation:alloc_for_extend": "613c8506494b",
    "sglang.srt.mem_cache.allocator.token:TokenToKVPoolAllocator": "237dacf0b760",
    "sglang.srt.managers.scheduler_components.output_streamer:SchedulerOutputStreamer": "9ddb2ac6b042",
    "sglang.srt.managers.scheduler_components.batch_result_processor:SchedulerBatchResultProcessor.process_batch_result_prefill": "72e3b1282fe4",
    "sglang.srt.managers.scheduler_components.batch_result_processor:SchedulerBatchResultProcessor.process_batch_result_decode": "f9da1ca362ae",
    "sglang.srt.managers.tokenizer_manager:TokenizerManager.init_running_status": "549e64686a05",
    "sglang.srt.managers.tokenizer_manager:TokenizerManager.init_request_dispatcher": "5c20b8df4c70",
    "sglang.srt.managers.tokenizer_manager:TokenizerManager.auto_create_handle_loop": "b1681bd4acbd",
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._handle_batch_output": "9af0d3e113a2",
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._handle_abort_req": "0e828e959208",
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._remove_req_state": "befe494f6534",
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._dispatch_to_scheduler": "ed9f20c2b6f0",
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._send_one_request": "75ba8116cdcf",
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._send_batch_request": "da676a041914",
    "sglang.srt.managers.tokenizer_manager:TokenizerManager.convert_logprob_style": "fd7cc49e5f78",
    "sglang.srt.managers.tokenizer_control_mixin:TokenizerControlMixin.flush_cache": "d5de04a644f0",
    "sglang.srt.managers.tokenizer_manager:SignalHandler": "5dc4ad2d5605",
    "sglang.srt.managers.detokenizer_manager:DetokenizerManager.init_request_dispatcher": "35b9e9bef339",
    "sglang.srt.managers.detokenizer_manager:DetokenizerManager.trim_matched_stop": "bf9541d96ce2",
    "sglang.srt.managers.detokenizer_manager:DetokenizerManager._grouped_batch_decode": "10d76730e093",
    "sglang.srt.managers.detokenizer_manager:DetokenizerManager._clamp_decode_ids": "b4cc696550d4",
    "sglang.srt.managers.detokenizer_manager:run_detokenizer_process": "b640ab17fd84",
    "sglang.srt.entrypoints.engine:Engine.__init__": "cbbb5a0f1b08",
    "sglang.srt.entrypoints.engine:Engine._launch_subprocesses": "f44750494f67",
    "sglang.srt.entrypoints.engine:Engine.shutdown": "dd245a47c0f0",
    "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend.__init__": "681e6d1c8d8a",
    "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend.init_forward_metadata": "fa215b8a68bd",
    "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend.forward_decode": "057e1386b847",
    "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend.forward_extend": "9d94d3cc90d2",
    "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.__init__": "a158dd4935bd",
    "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.init_forward_metadata": "28cb5de10c12",
    "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.init_forward_metadata_out_graph": "2926c4960c9f",
    "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.init_cuda_graph_state": "ec0e89fcb2a2",
    "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_decode": "60e35b1ee3aa",
    "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_extend": "1e22dcac8563",
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner:build_replay_fb_view": "923c704c5205",
    "sglang.srt.managers.scheduler:Scheduler._apply_war_barrier": "795909ae5f28",
    "sglang.srt.layers.attention.base_attn_backend:AttentionBackend.forward": "7512975897cb",
    "sglang.srt.layers.radix_attention:RadixAttention.__init__": "ff59225a3651",
    "sglang.srt.layers.utils.multi_platform:MultiPlatformOp.dispatch_forward": "1a4dc6df9638",
    "sglang.srt.layers.layernorm:RMSNorm.__init__": "6cbcc62648a7",
    "sglang.srt.layers.layernorm:RMSNorm.forward_native": "671406a88fe1",
    "sglang.srt.layers.activation:SiluAndMul.forward_native": "14b495349c7e",
    "sglang.srt.layers.rotary_embedding.base:RotaryEmbedding.forward_native": "e70aa8ff1c2e",
    "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod.apply": "ee14848df6ec",
    "sglang.srt.layers.logits_processor:LogitsProcessor._compute_lm_head": "89f11dc68e71",
    "sglang.srt.layers.logits_processor:should_apply_lm_head_quant_method": "b5c710e52259",
    "sglang.srt.layers.logits_processor:LogitsProcessor._get_logits": "116d4eb29744",
    "sglang.kernels.ops.activation.softcap:softcap_inplace_logits": "b7f0b3d0544f",
    "sglang.kernels.ops.elementwise.elementwise:fused_gate_sigmoid_mul_add": "953a764b824b",
    "sglang.srt.model_loader.loader:DefaultModelLoader.load_model": "7e75141023e9",
    "sglang.srt.model_loader.loader:DefaultModelLoader.load_weights_and_postprocess": "07f612e062d7",
    "sglang.srt.model_loader.utils:resolve_transformers_arch": "c955a53a3ba2",
    "sglang.srt.configs.hybrid_arch:mambaish_config": "a2ba8a94e7bb",
    "sglang.srt.configs.model_config:ModelConfig.__init__": "07e138703fa8",
    "sglang.srt.configs.model_config:ModelConfig.from_server_args": "b22338f7600f",
    "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.set_kv_buffer": "4735b90d0d44",
    "sglang.srt.utils.common:support_triton": "f11989efd261",
    "sglang.srt.layers.sampler:Sampler._sample_from_probs": "bc7514cbd8e4",
    "sglang.srt.layers.logprob_processor:get_token_ids_logprobs": "6cac67759309",
    "sglang.srt.layers.logprob_processor:get_token_ids_logprobs_batch_optimized": "a4469f8aac54",
    "sglang.srt.managers.scheduler_components.logprob_result_processor:SchedulerLogprobResultProcessor": "25fea63be21f",
    "sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo.from_schedule_batch": "04411a63bd78",
    "sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo.merge_batch": "b83258510049",
    "sglang.srt.constrained.xgrammar_backend:XGrammarGrammar.apply_vocab_mask": "59743e0a87a1",
    "sglang.srt.constrained.xgrammar_backend:_allocate_token_bitmask": "81fb7f0147c6",
    "sglang.srt.constrained.grammar_manager:GrammarManager.process_req_with_grammar": "1b3dd4f1984c",
    "sglang.srt.constrained.grammar_manager:GrammarManager.get_ready_grammar_requests": "64435f363ee0",
    "sglang.srt.server_args:ServerArgs._handle_cpu_backends": "c9501e23305a",
    "sglang.srt.server_args:PortArgs.init_new": "05e7d1cd7ae5",
    "sglang.srt.entrypoints.http_server:launch_server": "232091472ea1",
    "sglang.srt.entrypoints.http_server:_setup_and_run_http_server": "2e3fa3776d38",
    "sglang.srt.entrypoints.http_server:_execute_server_warmup": "420af7b48271",
    "sglang.srt.entrypoints.http_server:lifespan": "ac716dc10579",
    "sglang.srt.entrypoints.http_server:health_generate": "138c6aa1bbd9",
    "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat.__init__": "00cf2415785d",
    "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._validate_request": "3d853f90d549",
    "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._convert_to_internal_request": "6b13c455c2b4",
    "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._process_messages": "bfa5ccf65d64",
    "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._apply_jinja_template": "0584087e24d9",
    "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._apply_conversation_template": "60377b9ae4ea",
    "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._handle_last_assistant_message": "33c922053ccf",
    "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._append_assistant_prefix_to_prompt_ids": "9c2eab714d01",
    "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._build_chat_response": "bca0854ea937",
    "sglang.srt.entrypoints.openai.serving_completions:OpenAIServingCompletion._convert_to_internal_request": "22f786c72eb5",
    "sglang.srt.entrypoints.openai.serving_completions:OpenAIServingCompletion._build_completion_response": "38f25f6e8440",
    "sglang.srt.entrypoints.openai.serving_completions:OpenAIServingCompletion._generate_completion_stream": "e84f6b0d1c88",
    "sglang.srt.entrypoints.openai.serving_embedding:OpenAIServingEmbedding": "ac328ea3331f",
    "sglang.srt.managers.scheduler:Scheduler.handle_embedding_request": "e6541d0e191f",
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._validate_for_matryoshka_dim": "394c50897ce1",
    "sglang.srt.layers.pooler:Pooler": "86ab7c0f9fae",
    "sglang.srt.layers.pooler:pool_hidden_states": "8dcd2fe6758c",
    "sglang.srt.configs.model_config:is_generation_model": "beb2b22ce5c1",
    "sglang.srt.entrypoints.openai.serving_rerank:_detect_rerank_backend": "025407ac38dd",
    "sglang.srt.entrypoints.openai.serving_rerank:_get_yes_no_token_ids": "7c19913f390b",
    "sglang.srt.entrypoints.openai.serving_rerank:_get_jinja_env": "2c60cccb7cf1",
    "sglang.srt.entrypoints.openai.serving_rerank:_render_jinja_chat_template": "228fcffdae5f",
    "sglang.srt.entrypoints.openai.serving_rerank:OpenAIServingRerank": "4fa0b1a5b05e",
    "sglang.srt.entrypoints.openai.serving_score:OpenAIServingScore": "4eaf9801f773",
    "sglang.srt.managers.tokenizer_manager_score_mixin:TokenizerManagerScoreMixin.score_request": "50f353caae59",
    "sglang.srt.entrypoints.openai.serving_base:OpenAIServingBase._parse_model_parameter": "492c6c1a545c",
    "sglang.srt.entrypoints.openai.serving_base:OpenAIServingBase._resolve_lora_path": "355816e6d7cf",
    "sglang.srt.managers.tokenizer_control_mixin:TokenizerControlMixin._unload_lora_adapter_locked": "2040317f7862",
    "sglang.srt.managers.scheduler:Scheduler._can_schedule_lora_req": "43d725863455",
    "sglang.srt.lora.lora_manager:LoRAManager.validate_lora_batch": "5fd468662ba3",
    "sglang.srt.lora.lora_registry:LoRARegistry.get_all_adapters": "943f1dfc49ff",
    "sglang.srt.lora.backend.torch_backend:TorchNativeLoRABackend.prepare_lora_batch": "6ce4c7cf28ff",
    "sglang.srt.entrypoints.openai.serving_base:OpenAIServingBase._compute_extra_key": "473b3b920008",
    "sglang.srt.parser.jinja_template_utils:process_content_for_template_format": "ef1d9951c775",
    "sglang.srt.managers.tokenizer_manager:TokenizerManager.serving_chat_class.fget": "721eb3913739",
    "sglang.srt.managers.scheduler:Scheduler.get_init_info": "ff0eddbe8720",
    "sglang.srt.managers.load_snapshot:shm_path_for": "89bcf0774b36",
    "sglang.srt.managers.scheduler:Scheduler.init_profiler": "8bede13b8658",
    "sglang.srt.managers.scheduler:Scheduler.init_grammar_manager": "340282d4a389",
    "sglang.srt.managers.scheduler:Scheduler.process_input_requests": "b28e433d094f",
    "sglang.srt.managers.scheduler_components.profiler_manager:SchedulerProfilerManager._profile_batch_predicate": "606d5de20812",
    "sglang.srt.managers.scheduler_components.profiler_manager:SchedulerProfilerManager._stop_profile": "c62f6ddc22be",
    "sglang.srt.managers.tokenizer_control_mixin:TokenizerControlMixin.init_communicators": "54b217a02067",
    "sglang.srt.managers.communicator:FanOutCommunicator": "c5b8251c2112",
    "sglang.srt.constrained.base_grammar_backend:BaseGrammarBackend.get_cached_or_future_value": "b91c4e84a1fd",
    "sglang.srt.constrained.base_grammar_backend:BaseGrammarBackend.set_cache": "985c3ab9b9ee",
    "sglang.srt.managers.tokenizer_manager:TokenizerManager.abort_request": "0f1a80fb39ea",
    "sglang.srt.distributed.parallel_state:init_model_parallel_group": "7693f403fc58",
    "sglang.srt.utils.numa_utils:init_threads_binding": "65ce8574b7ef",
    "sglang.srt.layers.rotary_embedding.factory:get_rope_wrapper": "59a0a4b3c8b9",
    "sglang.srt.layers.rotary_embedding.rope_variant:Phi3LongRoPEScaledRotaryEmbedding.__init__": "70412584942d",
    "sglang.srt.layers.rotary_embedding.rope_variant:Phi3LongRoPEScaledRotaryEmbedding.forward": "f2053b189ea4",
    "sglang.srt.mem_cache.memory_pool:MLATokenToKVPool.__init__": "3e6e636cc4a8",
    "sglang.srt.layers.sampler:Sampler._sync_token_ids_across_tp": "5f790b66cab4",
    "sglang.srt.configs.model_config:is_hybrid_swa_model": "700362c3ea81",
    "sglang.lang.interpreter:StreamExecutor.__init__": "61486024da82",
    "sglang.lang.interpreter:StreamExecutor.submit": "5682ff730b15",
    "sglang.lang.interpreter:StreamExecutor.sync": "44df2f5ad3a3",
    "sglang.lang.interpreter:StreamExecutor.get_var": "5eddce0927eb",
    "sglang.lang.interpreter:StreamExecutor.get_meta_info": "7d228417fea8",
    "sglang.lang.interpreter:StreamExecutor.fork": "d860e2868bf7",
    "sglang.lang.interpreter:StreamExecutor._execute": "1780c775e388",
    "sglang.lang.interpreter:StreamExecutor._execute_gen": "205d69c8594d",
    "sglang.lang.interpreter:StreamExecutor._execute_select": "a4d5b1c0655a",
    "sglang.lang.interpreter:StreamExecutor._init_var_event": "774a76fdf11c",
    "sglang.lang.interpreter:run_internal": "ab92729c4b0a",
    "sglang.lang.interpreter:run_program": "917f3a7185ec",
    "sglang.lang.interpreter:run_program_batch": "62ce8c0ac8e9",
    "sglang.lang.backend.runtime_endpoint:RuntimeEndpoint.select": "75ed99dc2965",
    "sglang.lang.backend.runtime_endpoint:RuntimeEndpoint._handle_dtype_to_regex": "c2907a68162f",
    "sglang.lang.backend.runtime_endpoint:RuntimeEndpoint._assert_success": "dbe7c603f423",
}


def digest(qualified_name: str) -> str:
    """Short hash of the source of an upstream function, e.g.
    ``sglang.srt.managers.scheduler:Scheduler.run_batch``.
    """
    source = inspect.getsource(pkgutil.resolve_name(qualified_name))
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def check() -> None:
    """Verify version and sources.

    Raises:
        SeamError: Naming what differs.
    """
    installed = version("sglang")
    if installed != SGLANG_VERSION:
        raise SeamError(
            f"sglang {installed} is installed, this version of batchllm extends {SGLANG_VERSION}: "
            f"pip install sglang=={SGLANG_VERSION}"
        )
    changed = [name for name, expected in PINNED.items() if digest(name) != expected]
    if changed:
        raise SeamError(
            f"the installed sglang {installed} has been modified in {', '.join(changed)}: reinstall it with "
            f"pip install --force-reinstall --no-deps sglang=={SGLANG_VERSION}"
        )


@functools.cache
def check_once() -> None:
    """Like `check`, where neither this process nor the one that it was forked from has done it."""
    check()


if __name__ == "__main__":
    for name in PINNED:
        print(f'    "{name}": "{digest(name)}",')
