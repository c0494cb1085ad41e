"""Sends a workload to a server from so many threads, each request when the one before has been answered.

    python eval/http_load.py http://127.0.0.1:30000 "one_level(0, 100, 20)" --threads 64

A process of its own, so that the server's cores are shared with as little as possible. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import workloads
from workloads import Workload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("workload", help="an expression over eval/workloads.py")
    parser.add_argument("--threads", type=int, default=64)
    args = parser.parse_args()
    workload: Workload = eval(args.workload, vars(workloads))
    bodies = [
        json.dumps(
            {
                "input_ids": prompt,
                "sampling_params": {"temperature": 0, "max_new_tokens": output_len, "ignore_eos": True},
            }
        )
        for prompt, output_len in zip(workload.prompts, workload.output_lens, strict=True)
    ]
    answers: list[Any] = [None] * len(bodies)
    numbers = iter(range(len(bodies)))
    lock = threading.Lock()

    def send() -> None:
        connection = http.client.HTTPConnection(urlsplit(args.url).netloc, timeout=600)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            connection.request("POST", "/generate", bodies[number], {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
            assert response.status == 200, text
            answers[number] = text

    threads = [threading.Thread(target=send) for _ in range(args.threads)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    parsed = [json.loads(answer) for answer in answers]
    num_cached = sum(answer["meta_info"]["cached_tokens"] for answer in parsed)
    num_prompt = sum(map(len, workload.prompts))
    print(
        json.dumps(
            {
                "workload": args.workload,
                "num_threads": args.threads,
                "num_requests": len(bodies),
                "seconds": round(seconds, 3),
                "num_prompt_tokens": num_prompt,
                "num_computed_prompt_tokens": num_prompt - num_cached,
                "output_ids": [answer["output_ids"] for answer in parsed],
            }
        )
    )


if __name__ == "__main__":
    main()
