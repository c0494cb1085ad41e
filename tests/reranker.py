"""A model that ranks as Qwen3-Reranker does: its chat template asks for yes or no, and each is a token."""

from __future__ import annotations

import json
from pathlib import Path

from batchllm.default_model import default_model_path

TEMPLATE = (
    '<|im_start|>system\nJudge the document. The answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {{ instruct | default('find an answer') }}\n<Query>: {{ messages[0]['content'] }}\n"
    "<Document>: {{ messages[1]['content'] }}<|im_end|>\n<|im_start|>assistant\n"
)


def make_reranker(folder: Path) -> tuple[Path, int, int]:
    """The embedded model with such a template. It has a token for "no", and its last one becomes "yes".

    Returns:
        Where it is, and the ids of yes and no.
    """
    folder.mkdir()
    for file in Path(default_model_path()).iterdir():
        if file.name != "tokenizer.json":
            (folder / file.name).symlink_to(file)
    tokenizer = json.loads((Path(default_model_path()) / "tokenizer.json").read_text())
    model = tokenizer["model"]
    old, last = max(model["vocab"].items(), key=lambda item: item[1])
    del model["vocab"][old]
    model["vocab"]["yes"] = last
    model["merges"] = [merge for merge in model["merges"] if "".join(merge).replace(" ", "") != old]
    model["merges"].append(["y", "es"] if isinstance(model["merges"][0], list) else "y es")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder, last, model["vocab"]["no"]
