"""SGLang's server arguments with our defaults, and the features that plans do not support yet. Runs in the engine's or
the server's process.

(Upstream: ``srt/server_args.py``.)
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import logging
import math
import os
from pathlib import Path
from typing import Any, Literal, Optional, get_type_hints

import torch
from sglang.srt.arg_groups.arg_utils import NS, A, Arg, add_cli_args_from_dataclass
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.server_args import ServerArgs, add_attention_backend_choices

from batchllm.dataset.field_checks import show
from batchllm.errors import ConfigError
from batchllm.srt import argument_values
from batchllm.srt.configs import model_support
from batchllm.srt.lora import adapter_files
from batchllm.srt.mem_cache import radix_cache
from batchllm.srt.model_loader import model_files

logger = logging.getLogger(__name__)

ATTENTION_BACKEND = "batchllm"
add_attention_backend_choices([ATTENTION_BACKEND])  # once: it is added to a list
_CPU_KV_TOKENS = 131_072
"""KV pool on CPU unless ``--max-total-tokens`` says otherwise: SGLang would take most of the machine's
memory.
"""


@dataclasses.dataclass
class BatchServerArgs(ServerArgs):
    """SGLang's server arguments and ours."""

    # SGLang evaluates these annotations itself, and knows Optional only.
    kv_limit: A[  # type: ignore[valid-type]
        Optional[int],  # noqa: UP045
        Arg(help="KV tokens that planned batches may have in use at once (default: the whole pool)."),
        NS("batchllm"),
    ] = None
    output_lengths: A[  # type: ignore[valid-type]
        Literal["learned", "bounded"],
        Arg(
            help="What a row without a known output length is expected to generate: learned from the rows that have "
            "finished, or always its limit (nothing is ever retracted, fewer rows run at once).",
            choices=["learned", "bounded"],
        ),
        NS("batchllm"),
    ] = "learned"
    max_tbt_ms: A[  # type: ignore[valid-type] # as above
        Optional[str],  # noqa: UP045 - as above
        Arg(
            help="Bound in ms on the time between two tokens of a live request: no step that carries one takes longer. "
            "Batches have what time is left, an eighth of it at least. auto: five times a decode step of sixteen rows, "
            "measured at start. (default: none)"
        ),
        NS("batchllm"),
    ] = None
    shares_attention: bool = False
    """Whether the scheduler process computes with `batchllm.srt.layers.attention_backend`: by ``attention_backend``."""
    orders_live: bool = True
    """Whether live requests wait in our order: not where a ``schedule_policy`` was asked for."""


_HINTS = get_type_hints(BatchServerArgs, include_extras=True)


def kv_limit_tokens(server_args: Any, kv_capacity_tokens: int) -> int:
    """KV tokens that planned batches may use of a pool of so many."""
    limit = getattr(server_args, "kv_limit", None)
    return kv_capacity_tokens if limit is None else min(limit, kv_capacity_tokens)


AUTO_TBT = "auto"

_OWN = ("kv_limit", "max_tbt_ms", "output_lengths")
_OWN_TITLE = "batchllm"

# Argument, the value that is fine, what to call it.
_UNSUPPORTED = (
    ("pp_size", 1, "pipeline parallelism"),
    ("dp_size", 1, "data parallelism inside one engine"),
    ("enable_dp_attention", False, "data-parallel attention"),
    ("speculative_algorithm", None, "speculative decoding"),
    ("enable_hierarchical_cache", False, "the hierarchical cache"),
    ("enable_lmcache", False, "LMCache"),
    ("enable_flexkv", False, "FlexKV"),
    ("disaggregation_mode", "null", "prefill/decode disaggregation"),
    ("enable_streaming_session", False, "streaming sessions"),
    ("enable_session_radix_cache", False, "session caches"),
    ("tokenizer_worker_num", 1, "several tokenizer processes"),
    ("detokenizer_worker_num", 1, "several detokenizer processes"),
    ("disable_radix_cache", False, "running without a prefix cache"),
    ("use_ray", False, "SGLang on Ray"),
    ("enable_pdmux", False, "prefill/decode multiplexing"),
    ("dllm_algorithm", None, "diffusion language models"),
    ("max_loaded_loras", None, "a bound on loaded adapters"),
    ("enable_lora_overlap_loading", False, "loading adapters beside steps"),
    ("lora_drain_wait_threshold", 0.0, "draining adapters"),
    ("completion_template", None, "a template for completions"),
)


_INSTEAD = {
    "dp_size": "one scheduler carries out a plan. `batchllm run` and `batchllm serve` take --replicas N: N engines "
    "that share one plan"
}


def make_server_args(model_path: str, **server_args: Any) -> ServerArgs:
    """SGLang's arguments for a planned engine.

    Raises:
        ConfigError: An argument is unknown, wrong, or asks for what plans do not support.
    """
    if not isinstance(model_path, str):
        raise ConfigError(f"--model-path {show(model_path)}: must be a folder or a hub name")
    if not model_path:
        raise ConfigError("--model-path: the name of the model is empty; give a folder or a hub name, or leave it out")
    known = {field.name for field in dataclasses.fields(BatchServerArgs) if field.init}
    for name in server_args:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {_flag(close[0])}?" if close else ""
            raise ConfigError(f"{_flag(name)}: SGLang has no such server argument{hint}")
    server_args = argument_values.checked(server_args, _HINTS)
    _check_supported(server_args)
    _check_page_size(server_args.get("page_size"))
    if server_args.get("enable_strict_thinking") and not torch.cuda.is_available():
        raise ConfigError("--enable-strict-thinking: SGLang filters tokens on GPUs only, and would end; drop the flag")
    _check_batching(server_args)
    _check_environment()
    model_files.check(model_path, server_args)
    is_folder = model_files.is_folder(model_path)
    if is_folder:  # first, since SGLang's arguments fail of some models without saying that it is the model
        _check_model(_model_config(model_path, server_args), model_path, server_args)
    radix_cache.register()
    try:
        given = server_args | {"model_path": model_path, "orders_live": "schedule_policy" not in server_args}
        args = BatchServerArgs(**_attention(_defaults(model_path) | given))
    except (OSError, ValueError, AssertionError, TypeError) as error:
        if isinstance(error, OSError) and not os.path.exists(model_path):
            reason = "there is no such folder, and the Hub gives no model of this name"
            raise ConfigError(f"-m {model_path}: {reason}: {_one_line(error)}") from error
        raise ConfigError(f"-m {model_path}: {error}") from error
    adapter_files.check(args)
    config = args.get_model_config()
    if not is_folder:
        _check_model(config, model_path, server_args)
    first_len = model_support.first_context_len(config)
    if first_len is None or server_args.get("context_length") is not None:
        return args
    logger.warning(
        "-m %s: LongRoPE: the context is %d tokens; --context-length gives a longer one", model_path, first_len
    )
    return make_server_args(model_path, **server_args | {"context_length": first_len})


_MAX_ERROR_LEN = 300
_CONFIG_ARGUMENTS = {
    "context_length": "context_length",
    "decrypted_config_file": "override_config_file",
    "disable_hybrid_swa_memory": "disable_hybrid_swa_memory",
    "dtype": "dtype",
    "enable_multimodal": "enable_multimodal",
    "is_embedding": "is_embedding",
    "json_model_override_args": "model_override_args",
    "model_config_parser": "model_config_parser",
    "model_impl": "model_impl",
    "quantization": "quantization",
    "trust_remote_code": "trust_remote_code",
}
"""Server arguments that SGLang reads a model's configuration with, and what `ModelConfig` calls them."""


def _model_config(model_path: str, server_args: dict[str, Any]) -> ModelConfig:
    """What SGLang's scheduler will know of a model.

    Raises:
        ConfigError: It cannot be read.
    """
    given = {theirs: server_args[ours] for ours, theirs in _CONFIG_ARGUMENTS.items() if ours in server_args}
    try:
        return ModelConfig(model_path, **{"trust_remote_code": False} | _one_kv_size() | given)
    except Exception as error:  # whatever it is: the model's own file is what was read
        raise ConfigError(f"-m {model_path}: {model_support.no_config(model_path)}: {_one_line(error)}") from error


def _check_model(config: ModelConfig, model_path: str, server_args: dict[str, Any]) -> None:
    is_on_cpu = server_args.get("device") == "cpu" or not _has_accelerator()
    is_ours = server_args.get("attention_backend", ATTENTION_BACKEND) == ATTENTION_BACKEND
    model_support.check(config, model_path=model_path, is_on_cpu=is_on_cpu, has_our_operators=is_ours)
    if is_on_cpu:
        _check_ranks(config, model_path, server_args.get("tp_size", 1))


def _check_ranks(config: ModelConfig, model_path: str, num_ranks: Any) -> None:
    """SGLang would add heads to a model until ranks can share them, but loads such a model with ``sgl_kernel`` only."""
    if not isinstance(num_ranks, int) or num_ranks < 1:
        raise ConfigError(f"--tp-size {num_ranks}: must be a number of ranks, at least 1")
    num_heads, num_kv_heads = config.num_attention_heads, config.get_total_num_kv_heads()
    if num_heads % num_ranks or num_kv_heads % num_ranks:
        most = math.gcd(num_heads, num_kv_heads)
        raise ConfigError(
            f"--tp-size {num_ranks}: the {num_heads} heads and {num_kv_heads} KV heads of -m {model_path} must be "
            f"multiples of it on a CPU; take {most}, or a divisor of it"
        )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MAX_ERROR_LEN else f"{text[:_MAX_ERROR_LEN]}..."


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Of every flag of SGLang's server, and ours in a group of their own. What is not given is not in its result.

    Args:
        prog: What ``--help`` calls the program; None for a parser without ``--help``.
    """
    parser = _Parser(prog=prog, allow_abbrev=False, add_help=prog is not None, argument_default=argparse.SUPPRESS)
    ServerArgs.add_cli_args(parser)
    add_cli_args_from_dataclass(own_flags(parser), BatchServerArgs, fields=sorted(_OWN))
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            action.default = argparse.SUPPRESS
        action.required = False
    return parser


def own_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The group of our flags."""
    for group in parser._action_groups:
        if group.title == _OWN_TITLE:
            return group
    return parser.add_argument_group(_OWN_TITLE)


def parse_server_flags(flags: list[str], parser: argparse.ArgumentParser | None = None) -> dict[str, Any]:
    """SGLang's command line flags as server arguments; only those given.

    Args:
        flags: The command line.
        parser: From `make_parser`, with further flags of the caller's, whose values are among the result.

    Raises:
        ConfigError: A flag is unknown or its value is wrong.
    """
    parser = parser or make_parser()
    fields = {field.name for field in dataclasses.fields(BatchServerArgs) if field.init}
    fields |= {action.dest for action in own_flags(parser)._group_actions}
    if any(flag == "--config" or flag.startswith("--config=") for flag in flags):
        from sglang.srt.server_args_config_parser import ConfigArgumentMerger

        try:
            flags = ConfigArgumentMerger(parser).merge_config_with_args(flags)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"--config: {error}") from error
    try:
        values = vars(parser.parse_args(flags))
    except (AssertionError, ValueError) as error:  # of an action of SGLang's that reads a value itself
        raise ConfigError(f"--lora-paths: give NAME=FOLDER or a JSON object: {_one_line(error)}") from error
    renamed = {"tensor_parallel_size": "tp_size", "pipeline_parallel_size": "pp_size"}
    values = {renamed.get(name, name): value for name, value in values.items()}
    return {name: value for name, value in values.items() if name in fields}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{message} (every flag of `python -m sglang.launch_server --help` is taken)")


def _defaults(model_path: str) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "log_level": "error",
        "sleep_on_idle": True,
        "radix_cache_backend": radix_cache.BACKEND_NAME,
        # FlashInfer's sampling kernels take no seed per request.
        "sampling_backend": "pytorch",
    }
    if not _has_accelerator():
        defaults |= _one_kv_size() | {
            "device": "cpu",
            "max_total_tokens": _CPU_KV_TOKENS,
            "lora_backend": adapter_files.CPU_BACKEND,
        }
        if _is_float32(model_path):
            # SGLang's "auto" would make it bfloat16, which a CPU computes no faster and less exactly.
            defaults["dtype"] = "float32"
    else:
        # On CPU mixed steps win nothing: decoding rows alone fill it, and SGLang's own attention is quadratic there.
        defaults["enable_mixed_chunk"] = True
    return defaults


def _one_kv_size() -> dict[str, Any]:
    """On a CPU layers with a window keep all KV, like the others: plans pin it, and attention sees to the window."""
    return {} if _has_accelerator() else {"disable_hybrid_swa_memory": True}


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.xpu.is_available()


def _attention(server_args: dict[str, Any]) -> dict[str, Any]:
    """Our attention backend by the name that SGLang knows it by, see `srt.layers.attention_backend.register`."""
    if _has_accelerator() or server_args.get("attention_backend", ATTENTION_BACKEND) != ATTENTION_BACKEND:
        return server_args
    return server_args | {"attention_backend": "torch_native", "shares_attention": True}


def _is_float32(model_path: str) -> bool:
    try:
        config = json.loads(Path(model_path, "config.json").read_bytes())
    except (OSError, ValueError):
        return False  # a hub name, or nothing: SGLang says so itself
    return config.get("dtype", config.get("torch_dtype")) == "float32"


def _check_supported(server_args: dict[str, Any]) -> None:
    for name, fine, what in _UNSUPPORTED:
        if name in server_args and server_args[name] != fine:
            instead = _INSTEAD.get(name, "drop the flag")
            raise ConfigError(f"{_flag(name)} {server_args[name]}: {what} is not supported with plans; {instead}")
    backend = server_args.get("radix_cache_backend", radix_cache.BACKEND_NAME)
    if backend != radix_cache.BACKEND_NAME:
        raise ConfigError(f"--radix-cache-backend {backend}: plans need {radix_cache.BACKEND_NAME}")


def _check_page_size(page_size: int | None) -> None:
    if page_size not in (None, 1) and not torch.cuda.is_available():
        raise ConfigError(f"--page-size {page_size}: on CPU only --page-size 1 is supported; drop the flag")


def _check_batching(server_args: dict[str, Any]) -> None:
    kv_limit, pool = server_args.get("kv_limit"), server_args.get("max_total_tokens")
    if kv_limit is not None and (not isinstance(kv_limit, int) or kv_limit < 2):
        raise ConfigError(f"--kv-limit {kv_limit}: must be a number of tokens, at least 2")
    if kv_limit is not None and pool is not None and kv_limit > pool:
        raise ConfigError(
            f"--kv-limit {kv_limit}: the pool has --max-total-tokens {pool}; lower one or raise the other"
        )
    if server_args.get("enable_mixed_chunk") and (server_args.get("chunked_prefill_size") or 1) < 0:
        raise ConfigError("--enable-mixed-chunk needs chunks: drop it, or --chunked-prefill-size -1")
    _check_tbt(server_args)
    lengths = server_args.get("output_lengths", "learned")
    if lengths not in ("learned", "bounded"):
        raise ConfigError(f"--output-lengths {lengths}: must be learned or bounded")


def _check_tbt(server_args: dict[str, Any]) -> None:
    bound = server_args.get("max_tbt_ms")
    if bound is None:
        return
    if bound != AUTO_TBT:
        try:
            is_right = 0 < float(bound) < math.inf
        except (TypeError, ValueError):
            is_right = False
        if not is_right:
            raise ConfigError(f"--max-tbt-ms {bound}: must be a number of milliseconds above 0, or auto")
    if (server_args.get("chunked_prefill_size") or 1) < 0:
        raise ConfigError("--max-tbt-ms needs prompts in pieces: drop it, or --chunked-prefill-size -1")
    if server_args.get("is_embedding"):
        raise ConfigError(
            "--max-tbt-ms: a model that embeds generates no tokens to wait for; drop it, or --is-embedding"
        )
    if server_args.get("tp_size", 1) != 1:
        raise ConfigError("--max-tbt-ms: not with --tp-size, whose ranks would have to agree on times; drop one")


def _check_environment() -> None:
    for name, fine in (("SGLANG_RUST_SERVER", "0"), ("SGLANG_USE_PICKLE_IPC", "1")):
        value = os.environ.get(name, fine)
        if value.lower() not in (fine, {"0": "false", "1": "true"}[fine]):
            raise ConfigError(f"{name}={value} in the environment is not supported with plans; unset it")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
