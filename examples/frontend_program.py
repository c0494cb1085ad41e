"""A frontend program over a dozen documents and three hundred questions, planned as a whole.

    python examples/frontend_program.py                             # on an engine in this process
    python examples/frontend_program.py --url http://localhost:30000   # on a server: python -m batchllm.launch_server
    python examples/frontend_program.py --url ... --stock           # the same server through SGLang's own endpoint

The program is ordinary SGLang. Without ``-m`` the embedded model runs it, whose random weights give meaningless
answers.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import sglang as sgl
from make_questions import ABOUT_ANY_TEXT, QUESTIONS, TEXTS

from batchllm import BatchEngine
from batchllm.lang import BatchBackend, Endpoint

VERDICTS = ["stated in the text", "not stated", "contradicted"]


@sgl.function
def answer_question(s: Any, text: str, question: str) -> None:
    """A summary, an answer in the light of it, two critics at once, a verdict."""
    s += f"Text:\n{text}\n\nSummary in one sentence:"
    s += sgl.gen("summary", max_tokens=16, stop="\n")
    s += f"\nQuestion: {question}\nAnswer:"
    s += sgl.gen("answer", max_tokens=16, stop="\n")
    critics = s.fork(2)
    for critic, view in zip(critics, ("What is right about it:", "What is wrong about it:"), strict=True):
        critic += f"\n{view}" + sgl.gen("view", max_tokens=12, stop="\n")
    critics.join()
    s += f"\nFor it: {s['view'][0]}\nAgainst it: {s['view'][1]}\nThe answer is"
    s += " " + sgl.select("verdict", VERDICTS)


def main() -> None:
    args = _parse()
    arguments = [
        {"text": text, "question": question}
        for name, text in TEXTS.items()
        for question in QUESTIONS[name] + ABOUT_ANY_TEXT
    ]
    with _backend(args) as backend:
        sgl.set_default_backend(backend)
        started = time.perf_counter()
        states = answer_question.run_batch(arguments, temperature=0, progress_bar=True)
        seconds = time.perf_counter() - started
    for state, argument in list(zip(states, arguments, strict=True))[::60]:
        print(f"{argument['question']}\n    {state['answer']!r}: {state['verdict']}")
    print(dict(Counter(state["verdict"] for state in states)))
    print(f"{len(states)} programs of 6 requests in {seconds:.1f} s")
    if isinstance(backend, (BatchBackend, Endpoint)):
        print(f"{backend.waves.num_sent} requests in {backend.waves.num_waves} waves")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-m", "--model", help="a Hugging Face model, for the engine in this process")
    parser.add_argument("--url", help="of a server; none is started here")
    parser.add_argument("--stock", action="store_true", help="with --url: SGLang's own endpoint, 96 programs at a time")
    args = parser.parse_args()
    if args.stock and not args.url:
        parser.error("--stock needs --url")
    return args


@contextlib.contextmanager
def _backend(args: argparse.Namespace) -> Iterator[Any]:
    if args.stock:
        yield sgl.RuntimeEndpoint(args.url)
    elif args.url:
        endpoint = Endpoint(args.url)
        yield endpoint
        endpoint.shutdown()
    else:
        with BatchEngine(args.model) as engine:
            yield BatchBackend(engine)


if __name__ == "__main__":
    main()
