"""Answers symbolic prompts by reading their text, independently of what made it."""

import re


def solve(prompt: str) -> str:
    """The answer's words; the last line of the prompt is the question."""
    *lines, question = prompt.strip().splitlines()
    values: dict[str, list[str]] = {}
    for key, value in re.findall(r"(\w+-\w+): (\w+-\w+)\.", " ".join(lines)):
        values.setdefault(key.lower(), []).append(value)
    words = []
    for key, marks in re.findall(r"(\w+-\w+) ?([>+]*)", question):
        key = key.lower()
        if marks.startswith("+"):
            words += values[key][::-1][: 1 + len(marks) // 2]
            continue
        for _ in range(1 + len(marks) // 2):
            key = values[key][-1]
            words.append(key)
    return " ".join(words).replace("-", " ")
