"""Chat templates of the kinds that models have, and models that have one of them and nothing else of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from batchllm.default_model import default_model_path

_TURN = "{{ '<|im_start|>' + m.role + '\n' }}"
_END = "{{ '<|im_end|>\n' }}"
_ASSISTANT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

TEMPLATES = {
    "string": f"{{% for m in messages %}}{_TURN}{{{{ m.content }}}}{_END}{{% endfor %}}{_ASSISTANT}",
    "parts only": (
        f"{{% for m in messages %}}{_TURN}{{% for part in m.content %}}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
        f"{_END}{{% endfor %}}{_ASSISTANT}"
    ),
    "tools with tojson": (
        "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
        f"{_END}"
        f"{{% endif %}}{{% for m in messages %}}{_TURN}{{% if m.content %}}{{{{ m.content }}}}{{% endif %}}"
        "{% for c in m.tool_calls or [] %}{{ '\n<call>' + c.function.name + ' ' }}"
        f"{{{{ c.function.arguments | tojson }}}}{{% endfor %}}{_END}{{% endfor %}}{_ASSISTANT}"
    ),
    "tools with items": (
        f"{{% for m in messages %}}{_TURN}{{{{ m.content or '' }}}}{{% for c in m.tool_calls or [] %}}"
        "{{ '<call ' + c.function.name }}{% for k, v in c.function.arguments | items %}{{ ' ' ~ k ~ '=' ~ v }}"
        f"{{% endfor %}}>{{% endfor %}}{_END}{{% endfor %}}{_ASSISTANT}"
    ),
    "strict roles": (
        "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{{ messages[0].content + '\n\n' }}"
        "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}"
        "{% if m.role != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
        "{{ raise_exception('roles must alternate: ' + m.role) }}{% endif %}"
        f"{_TURN}{{{{ m.content | trim }}}}{_END}{{% endfor %}}{_ASSISTANT}"
    ),
    "thinking switch": (
        f"{{% for m in messages %}}{_TURN}{{% if m.role == 'assistant' and '</think>' in m.content %}}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
        f"{_END}{{% endfor %}}{_ASSISTANT}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    ),
}


def model_with(template: str | list[dict[str, Any]], folder: Path) -> str:
    """A folder with the tokenizer of the embedded model, but another chat template, or several with names. It has no
    weights.
    """
    source = Path(default_model_path())
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(source / name, folder)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return str(folder)
