"""Answers the English questions by reading their text, independently of what made it."""

import re

NAME = r"[Tt]he (\w+ \w+)"


def solve(text: str) -> str:
    """The numbers that answer a prompt's question."""
    document, question = text.split("\n\n")[:2]
    codes: dict[str, list[str]] = {}
    for name, code in re.findall(rf"access code of {NAME} is (?:now )?(\d+)\.", document):
        codes.setdefault(name, []).append(code)
    guards = dict(re.findall(rf"{NAME} guards the (\w+ \w+)\.", document))
    question = question.split("?")[0]
    asked = re.search(r"codes?(, the newest first,)? of (.*)", question)
    assert asked is not None
    answers = []
    for whose in re.split(r", | and ", asked[2]):
        name = re.sub(r"^the ", "", whose.split(" guarded by ")[-1])
        for _ in range(whose.count("guarded by")):
            name = guards[name]
        answers += codes[name][::-1] if asked[1] else codes[name][-1:]
    return ", ".join(answers)
