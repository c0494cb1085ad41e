"""Memory of a server over time, while batches join, leave, are cancelled, and are deleted.

A batch is always open. Every event is one of: a batch of 20 to 200 rows over a few of 40 shared documents begins, one
is cancelled, one that has ended is deleted with its files, ten plain requests are answered. At most 50 batches that
have ended are kept. The resident set size of each of the server's processes is read every few seconds; pages that
they share are counted in each.

    python eval/soak.py --minutes 20 --out eval/results/soak.md
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path

import openai
import psutil
import server_process

_POOL = ("--max-total-tokens", "8192", "--chunked-prefill-size", "1024", "--random-seed", "0")
_MIB = 1 << 20
_NUM_OPEN = 6
_MOST_ENDED = 50
_ENDED = ("completed", "failed", "expired", "cancelled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out")
    args = parser.parse_args()
    from batchllm import default_model

    model = str(default_model.cached_model_path(default_model.DEFAULT))
    with server_process.running("ours", model, *_POOL) as url:
        (server,) = [child for child in psutil.Process().children() if "launch_server" in " ".join(child.cmdline())]
        soak = _Soak(url, server, random.Random(args.seed))
        soak.run(args.minutes * 60)
    text = soak.render(args.minutes, args.seed)
    print(text)
    if args.out:
        Path(args.out).write_text(text)


class _Soak:
    def __init__(self, url: str, server: psutil.Process, draw: random.Random) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=2)
        self._server = server
        self._draw = draw
        self._open: list[str] = []
        self._ended: list[str] = []
        self.counts: dict[str, int] = defaultdict(int)
        self.samples: list[tuple[float, dict[str, int]]] = []

    def run(self, seconds: float) -> None:
        started = time.monotonic()
        next_sample = 0.0
        while (now := time.monotonic() - started) < seconds:
            if now >= next_sample:
                self.samples.append((now, self._memory()))
                next_sample += seconds / 40
            self._act()
        self.samples.append((seconds, self._memory()))

    def _act(self) -> None:
        for batch_id in list(self._open):
            if self._client.batches.retrieve(batch_id).status in _ENDED:
                self._open.remove(batch_id)
                self._ended.append(batch_id)
        if len(self._open) < _NUM_OPEN:
            self._begin()
        while len(self._ended) > _MOST_ENDED:
            self._delete(self._ended.pop(0))
        kind = self._draw.choice(["cancel", "delete", "delete", "plain"])
        if kind == "cancel" and len(self._open) > 1:
            batch_id = self._draw.choice(self._open)
            try:
                self._client.batches.cancel(batch_id)
                self.counts["batches cancelled"] += 1
            except openai.ConflictError:
                pass  # it has ended in this moment
        elif kind == "delete" and self._ended:
            self._delete(self._ended.pop())
        elif kind == "plain":
            for _ in range(10):
                prompt = [self._draw.randrange(10, 4000) for _ in range(50)]
                self._client.completions.create(model="m", prompt=prompt, max_tokens=4, temperature=0)
            self.counts["plain requests"] += 10

    def _begin(self) -> None:
        rows = []
        documents = self._draw.sample(range(40), self._draw.randint(1, 6))
        for i in range(self._draw.randint(20, 200)):
            document = self._draw.choice(documents)
            prompt = [10 + (document * 7 + k) % 3000 for k in range(200)] + [self._draw.randrange(10, 4000)]
            body = {"model": "m", "prompt": prompt, "max_tokens": self._draw.randint(1, 16), "temperature": 0}
            rows.append({"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body})
        data = io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())
        file = self._client.files.create(file=("rows.jsonl", data), purpose="batch")
        batch = self._client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        self._open.append(batch.id)
        self.counts["batches begun"] += 1
        self.counts["rows"] += len(rows)

    def _delete(self, batch_id: str) -> None:
        batch = self._client.batches.retrieve(batch_id)
        for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                self._client.files.delete(file_id)
        self._client.delete(f"/batches/{batch_id}", cast_to=object)
        self.counts["batches deleted"] += 1

    def _memory(self) -> dict[str, int]:
        """Resident set size of each process, in MiB."""
        processes = {"server": self._server}
        for child in self._server.children(recursive=True):
            name = " ".join(child.cmdline())
            for part in ("scheduler", "detokenizer"):
                if part in name:
                    processes[part] = child
        return {name: process.memory_info().rss // _MIB for name, process in processes.items()}

    def render(self, minutes: float, seed: int) -> str:
        """The curve as a table, and how much the last quarter is above the second."""
        names = sorted(self.samples[0][1])
        lines = [
            "# Memory of a server over time",
            "",
            f"`python eval/soak.py --minutes {minutes:g} --seed {seed}`: "
            + ", ".join(f"{count:,} {what}" for what, count in sorted(self.counts.items()))
            + ".",
            "",
            "Resident set size, MiB:",
            "",
            "| minute | " + " | ".join(names) + " |",
            "|" + "---|" * (len(names) + 1),
        ]
        lines += [
            f"| {seconds / 60:.1f} | " + " | ".join(f"{sizes.get(name, 0):,}" for name in names) + " |"
            for seconds, sizes in self.samples
        ]
        quarter = len(self.samples) // 4
        growth = {}
        for name in names:
            values = [sizes.get(name, 0) for _, sizes in self.samples]
            second, last = statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])
            growth[name] = f"{name} {last - second:+.0f} MiB ({last / second:.3f}x)"
        lines += ["", "Median of the last quarter against that of the second: " + ", ".join(growth.values()) + ".", ""]
        return "\n".join(lines)


if __name__ == "__main__":
    main()
