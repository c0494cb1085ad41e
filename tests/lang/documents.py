"""Frontend programs over short documents, as a user would write them."""

from __future__ import annotations

from typing import Any

import sglang as sgl

DOCUMENTS = [
    f"Report {number}. The {kind} was opened in {1900 + 7 * number} and holds {number * 13 + 5} rooms. Visitors "
    f"praise its garden, its staff and the view over the {place}; the roof needs work."
    for number, (kind, place) in enumerate([("hotel", "lake"), ("museum", "river"), ("school", "valley")])
]
QUESTIONS = ["When was it opened?", "How many rooms are there?", "What do visitors praise?", "What needs work?"]
ARGUMENTS = [{"document": document, "question": question} for question in QUESTIONS for document in DOCUMENTS]


@sgl.function
def review(s: Any, document: str, question: str) -> Any:
    """A summary, an answer, three opinions in forks, a verdict, and what was read in between."""
    s += sgl.system("You read reports.")
    s += sgl.user(document + "\n" + question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=12, ignore_eos=True))
    s += sgl.user("Rate it." if len(s["answer"]) % 2 else "Rate it well.")
    forks = s.fork(3)
    for number, fork in enumerate(forks):
        fork += f"Reader {number + 1}:" + sgl.gen("opinion", max_tokens=6, stop=["\n", "."])
    forks.join()
    s += "Verdict: " + sgl.select("verdict", ["good", "bad", "neither good nor bad"])
    s += " in the year " + sgl.gen("year", regex=r"[12][0-9]{3}", max_tokens=8)
    s += " rooms: " + sgl.gen("rooms", dtype=int, max_tokens=6)
    with s.var_scope("last"):
        s += " and " + sgl.gen("end", max_tokens=4)
    return s["verdict"]


def what_came(state: Any) -> dict[str, Any]:
    """Everything a program left, but not what it cost."""
    assert state.error() is None
    return {
        "text": state.text(),
        "messages": state.messages(),
        "value": state.ret_value,
        "variables": {name: state[name] for name in ("answer", "opinion", "verdict", "year", "rooms", "last", "end")},
    }
