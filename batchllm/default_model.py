"""The model used when none is named: a small random Llama, built here from a seed in seconds.

Knows the files of a Hugging Face model folder, how its weights are drawn, and where builds are
kept. Must not know what runs the model, and never downloads anything.

INVARIANT: a folder returned by `cached_model_path` has every file its marker names, byte for byte.

Its answers mean nothing, but they depend on every token of the prompt, so a wrongly shared prefix
shows: `eval/bench_default_model.py` measures it. The usual initialisation (standard deviation 0.02)
would ignore the prompt; far larger weights would turn rounding errors into other answers.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batchllm.cache_folder import cache_folder
from batchllm.errors import ConfigError

Float32Array = npt.NDArray[np.float32]

_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_BOS_ID, _EOS_ID, _PAD_ID = 0, 2, 0
_MARKER = "complete.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomModelShape:
    """Sizes of a random model, a Llama with an untied output layer.

    Attributes:
        name: First part of its folder's name in the cache.
        vocab_size: Tokens, each with a string of its own; at least 300.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Transformer layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads; divides the query heads.
        intermediate_size: Width inside an MLP.
        max_position_embeddings: Longest context in tokens.
    """

    name: str = "default"
    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    intermediate_size: int = 512
    max_position_embeddings: int = 8192

    @property
    def head_dim(self) -> int:
        """Width of one attention head; 64 in every shape here, which all GPU kernels take."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model."""
        kv_size = self.num_key_value_heads * self.head_dim
        attention = 2 * self.hidden_size * (self.hidden_size + kv_size)
        mlp = 3 * self.hidden_size * self.intermediate_size
        layers = self.num_hidden_layers * (attention + mlp + 2 * self.hidden_size)
        return layers + 2 * self.vocab_size * self.hidden_size + self.hidden_size


DEFAULT = RandomModelShape()
"""5.6M parameters: what runs when no model is named."""

SHAPE_28M = RandomModelShape(
    name="28m",
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=1408,
)
"""27.8M parameters: enough arithmetic for throughput to mean something on a CPU."""

WIDTH_64 = RandomModelShape(
    name="width-64",
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    intermediate_size=176,
)
"""0.6M parameters in one narrow layer: nearly all the time is the runtime's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gains:
    """What each matrix multiplies the root mean square of its input by.

    The first layer attends almost evenly and loudly: every prompt token moves every later hidden
    state a little, by design. The others are selective, and amplify that into another answer.
    Amplifying alone would reach as far only where it also amplifies rounding errors.

    Attributes:
        embedding: Root mean square of an embedding itself.
        first_query_key: Factor of queries and of keys in the first layer.
        first_attention_output: Factor of what attention adds to the residual stream in the first layer.
        query_key: Factor of queries and of keys in the other layers.
        attention_output: Factor of what attention adds in the other layers.
        value: Factor of values.
        mlp_input: Factor of both MLP branches.
        mlp_output: Factor of what an MLP adds to the residual stream. If it is low, answers repeat themselves.
        logits: Standard deviation of the logits.
    """

    embedding: float = 1.0
    first_query_key: float = 0.5
    first_attention_output: float = 6.0
    query_key: float = 2.0
    attention_output: float = 3.0
    value: float = 1.5
    mlp_input: float = 1.7
    mlp_output: float = 1.7
    logits: float = 3.0


_GAINS = _Gains()


def default_model_path() -> str:
    """Folder of the model used when none is named; built on the first call.

    Raises:
        ConfigError: The cache folder cannot be written.
    """
    return cached_model_path(DEFAULT)


def cached_model_path(shape: RandomModelShape, seed: int = 0) -> str:
    """Folder of a model in the user's cache; built if it is absent or damaged.

    Every file is hashed on every call. Any number of processes may call this at once: one builds,
    and the others wait for it.

    Args:
        shape: Sizes of the model.
        seed: Seed of the weights.

    Returns:
        ``$XDG_CACHE_HOME/batchllm/models/<name>-<version>``, below ``~/.cache`` if that is unset.
        The version changes with the shape, the seed and this module.

    Raises:
        ConfigError: The cache folder cannot be written.
    """
    models = cache_folder("models")
    target = models / f"{shape.name}-{_version(shape, seed)}"
    if _is_complete(target):
        return str(target)
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / f".{target.name}.lock"):
            if not _is_complete(target):
                _install(target, shape, seed)
    except OSError as error:
        raise ConfigError(
            f"the default model cannot be kept in {models}: {error}; "
            "name a model with -m, or set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return str(target)


def build_model(path: str | os.PathLike[str], shape: RandomModelShape = DEFAULT, seed: int = 0) -> None:
    """Writes a model folder that ``transformers`` and SGLang load. Same arguments, same bytes.

    Args:
        path: Folder to write; made if absent.
        shape: Sizes of the model.
        seed: Seed of the weights.
    """
    from safetensors.numpy import save_file

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_json = _train_tokenizer(shape.vocab_size)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    for name, content in _config_files(shape).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    weights = _draw_weights(shape, seed, _unspoken_ids(tokenizer_json))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    hashes = {file.name: _sha256(file) for file in sorted(folder.iterdir()) if file.name != _MARKER}
    # INVARIANT: written last, so a folder with a marker was finished.
    (folder / _MARKER).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")


@functools.cache
def _version(shape: RandomModelShape, seed: int) -> str:
    recipe = json.dumps([asdict(shape), seed], sort_keys=True).encode()
    return hashlib.sha256(Path(__file__).read_bytes() + recipe).hexdigest()[:12]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_complete(folder: Path) -> bool:
    try:
        hashes = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return bool(hashes) and all(_sha256(folder / name) == was for name, was in hashes.items())
    except (OSError, ValueError, AttributeError):  # absent, cut short, or not an object
        return False


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # released when the stream closes, or the process dies
        yield


def _install(target: Path, shape: RandomModelShape, seed: int) -> None:
    """Builds beside the target and renames; the caller holds the target's lock."""
    building = target.with_name(f".{target.name}.building")
    for leftover in (building, target):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
    build_model(building, shape, seed)
    building.rename(target)


def _config_files(shape: RandomModelShape) -> dict[str, dict[str, Any]]:
    token_ids = {"bos_token_id": _BOS_ID, "eos_token_id": _EOS_ID, "pad_token_id": _PAD_ID}
    sizes = {name: value for name, value in asdict(shape).items() if name != "name"}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **token_ids,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL_TOKENS[_BOS_ID],
        "eos_token": _SPECIAL_TOKENS[_EOS_ID],
        "pad_token": _SPECIAL_TOKENS[_PAD_ID],
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_position_embeddings,
        "chat_template": _CHAT_TEMPLATE,
    }
    return {
        "config.json": config,
        "generation_config.json": {"do_sample": False, **token_ids},
        "tokenizer_config.json": tokenizer_config,
    }


def _draw_weights(shape: RandomModelShape, seed: int, unspoken: list[int]) -> dict[str, Float32Array]:
    random = np.random.Generator(np.random.PCG64(seed))
    hidden, inner = shape.hidden_size, shape.intermediate_size
    kv_size = shape.num_key_value_heads * shape.head_dim

    def matrix(rows: int, columns: int, gain: float) -> Float32Array:
        values = random.standard_normal((rows, columns), dtype=np.float32)
        return values * np.float32(gain / np.sqrt(columns))

    ones = np.ones(hidden, dtype=np.float32)
    embedding_gain = _GAINS.embedding * float(np.sqrt(hidden))  # a row of it is not a sum
    weights = {"model.embed_tokens.weight": matrix(shape.vocab_size, hidden, embedding_gain)}
    for layer in range(shape.num_hidden_layers):
        is_first = layer == 0
        query_key = _GAINS.first_query_key if is_first else _GAINS.query_key
        output = _GAINS.first_attention_output if is_first else _GAINS.attention_output
        for name, rows, columns, gain in (
            ("self_attn.q_proj", hidden, hidden, query_key),
            ("self_attn.k_proj", kv_size, hidden, query_key),
            ("self_attn.v_proj", kv_size, hidden, _GAINS.value),
            ("self_attn.o_proj", hidden, hidden, output),
            ("mlp.gate_proj", inner, hidden, _GAINS.mlp_input),
            ("mlp.up_proj", inner, hidden, _GAINS.mlp_input),
            ("mlp.down_proj", hidden, inner, _GAINS.mlp_output),
        ):
            weights[f"model.layers.{layer}.{name}.weight"] = matrix(rows, columns, gain)
        weights[f"model.layers.{layer}.input_layernorm.weight"] = ones
        weights[f"model.layers.{layer}.post_attention_layernorm.weight"] = ones
    weights["model.norm.weight"] = ones
    weights["lm_head.weight"] = matrix(shape.vocab_size, hidden, _GAINS.logits)
    weights["lm_head.weight"][unspoken] = 0.0
    return weights


def _train_tokenizer(vocab_size: int) -> str:
    """A byte-level BPE as the text of ``tokenizer.json``; special tokens first, then bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ConfigError(f"vocab_size {vocab_size}: the built-in text gives {tokenizer.get_vocab_size()} tokens")
    return str(tokenizer.to_str(pretty=True))


def _unspoken_ids(tokenizer_json: str) -> list[int]:
    """Tokens a greedy answer never holds: special ones, and bytes that are no ASCII text.

    Their logits are zero, far below the greatest: answers are readable text and do not end early.
    """
    vocab: dict[str, int] = json.loads(tokenizer_json)["model"]["vocab"]
    return sorted(
        token_id
        for token, token_id in vocab.items()
        if token in _SPECIAL_TOKENS or (len(token) == 1 and not "!" <= token <= "~")
    )


def _training_text() -> Iterator[str]:
    random = np.random.Generator(np.random.PCG64(0))
    words = [word + ending for ending in _ENDINGS for word in _WORDS.split()]
    # Zipf's law: the k-th most frequent word is as frequent as 1 / k.
    frequencies = 1.0 / np.arange(1, len(words) + 1)
    chosen = random.choice(len(words), size=(4000, 12), p=frequencies / frequencies.sum())
    for line, row in enumerate(chosen):
        text = " ".join(words[i] for i in row)
        yield f"{text[0].upper()}{text[1:]}."
        yield _FORMS[line % len(_FORMS)].format(*(words[i] for i in row), number=line)
    for word in words:
        yield f"{word} {word} {word.capitalize()} {word.capitalize()}"


_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] or [] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_FORMS = (
    '{{"{0}": "{1} {2}", "{3}": {number}, "{4}": [true, false, null]}}\n',
    "def {0}_{1}({2}, {3}):\n    return {4}.{5}({number})\n",
    "Question: {0} {1} {2}?\nAnswer: {3}, {4}; {5}!\n",
    "# {0} {1}\n\n- {2}: {number}\n- {3} ({4})\n",
    "https://www.{0}.com/{1}?{2}={number}&{3}=1\n",
    "user: {0} {1}... system: you're {2}, it's {3}, don't {4}\n",
)

_ENDINGS = ("", "s", "ed", "ing", "er", "ly", "ment", "able")

_WORDS = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had
an they which one you were all her she there would their we him been has when who will no more if
out so up said what its about than into them can only other time new some could these two may first
then do any like my now over such our man me even most made after also did many off before must
well back through years where much your way down should because long each just state those people
between being under three never know same last another while us might great go come since against
right came take used himself few house use place during high without again home around small
however found part school every think does once water number room system always public almost
answer question write text word line page list table file code function value name data type
model token prompt batch request server cache prefix tree node group plan schedule engine memory
attention layer head query key hidden vector matrix weight random seed sample length position
count total average measure test check error warning result report summary translate explain
describe compare classify extract document paragraph sentence language english french german
chinese city country history science physics chemistry biology computer program machine learn
below open close begin end start stop run walk speak listen read watch build break carry bring
feel believe remember understand consider expect suggest require provide include contain produce
create develop design control process method example problem solution reason cause effect idea
"""
