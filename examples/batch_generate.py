"""A dozen questions about one shared text: its KV is computed once. Run: python examples/batch_generate.py

Without an argument it runs the embedded model, whose random weights give meaningless answers; name a Hugging
Face model for better ones: python examples/batch_generate.py MODEL
"""

from __future__ import annotations

import sys

from batchllm import BatchEngine

TEXT = """\
The kettle was first boiled over a fire, then on a stove, and now mostly on a heating coil of its own. An
electric kettle of two kilowatts brings a litre of water from fifteen degrees to the boil in about three
minutes. It switches itself off because steam flows down a channel to a strip of two metals, which bends
when it gets hot and opens the switch. High in the mountains water boils sooner and cooler, by about one
degree for every three hundred metres, so tea made there is weaker. Hard water leaves a crust of lime in the
kettle; vinegar dissolves it."""

QUESTIONS = [
    "Where was the kettle first boiled?",
    "What heats most kettles now?",
    "How long does a litre of water take to boil?",
    "How powerful is the electric kettle?",
    "At which temperature does the water start?",
    "How does a kettle switch itself off?",
    "What does the strip of two metals do?",
    "Where does water boil cooler?",
    "How many metres lower the boiling point by one degree?",
    "Why is tea weaker in the mountains?",
    "What does hard water leave?",
    "What dissolves lime?",
]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else None
    prompts = [f"{TEXT}\n\nQuestion: {question}\nAnswer:" for question in QUESTIONS]
    with BatchEngine(model) as engine:
        completions = engine.batch_generate(prompts, {"max_new_tokens": 24, "temperature": 0})
        report = engine.last_report
    for question, completion in zip(QUESTIONS, completions, strict=True):
        print(f"{question}\n    {completion.text!r}")
    if report is not None:
        print(report.render())


if __name__ == "__main__":
    main()
