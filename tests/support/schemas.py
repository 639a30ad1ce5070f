"""Random JSON schemas, and whether a model's answers are what they describe.

`python tests/support/schemas.py COUNT [MODEL]` answers so many of them, greedily and at a temperature.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from typing import Any

import losart

NAMES = (
    "name",
    "age",
    "a b",
    'quo"ted',
    "back\\slash",
    "größe",
    "日本",
    "x",
    "",
    "new\nline",
    "$ref",
    "type",
)
TEXTS = ("red", "green", 'say "hi"', "ünï", "a\\b", "", "line\nbreak", "0", "true", "😀")
PATTERNS = ("^[a-z]{1,6}$", "^(yes|no)$", r"^\d{3}-\d{2}$", "^[A-Z][a-z]*!?$", "^(ab|cd)+e$")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")
SIMPLE = ("string", "text", "pattern", "format", "integer", "number", "boolean", "null", "enum", "const")
NESTED = ("object", "object", "open", "array", "tuple", "any", "ref", "types")


def random_schema(seed: int, depth: int = 3) -> dict[str, Any]:
    """A schema with values that end: their strings, numbers and lists are bounded, but for some."""
    rng = random.Random(seed)
    definitions = {name: _schema(rng, 1, ()) for name in ("one", "two")[: rng.randrange(3)]}
    schema = _schema(rng, depth, tuple(definitions))
    return schema | {"$defs": definitions} if definitions else schema


def _schema(rng: random.Random, depth: int, known: tuple[str, ...]) -> dict[str, Any]:
    kind = rng.choice(SIMPLE if depth == 0 else SIMPLE + 2 * NESTED)
    if kind == "ref":
        return {"$ref": f"#/$defs/{rng.choice(known)}"} if known else {"type": "boolean"}
    if kind in NESTED:
        return _nested(rng, kind, depth, known)
    low, more = rng.randrange(-50, 50), rng.randrange(200)
    return {
        "string": {"type": "string", "minLength": rng.randrange(3), "maxLength": 3 + rng.randrange(10)},
        "text": {"type": "string", "maxLength": 40},
        "pattern": {"type": "string", "pattern": rng.choice(PATTERNS)},
        "format": {"type": "string", "format": rng.choice(FORMATS)},
        "integer": {"type": "integer", "minimum": low, "maximum": low + more},
        "number": {"type": "number", "minimum": low - 0.5, "exclusiveMaximum": low + more + 0.25},
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "enum": {"enum": rng.sample([*TEXTS, 1, -2.5, None, False, [], {"a": [1]}], 1 + rng.randrange(5))},
        "const": {"const": rng.choice([*TEXTS, 0, None, True, {"k": "v"}])},
    }[kind]


def _nested(rng: random.Random, kind: str, depth: int, known: tuple[str, ...]) -> dict[str, Any]:
    def inner() -> dict[str, Any]:
        return _schema(rng, depth - 1, known)

    if kind in ("object", "open"):
        names = rng.sample(NAMES, rng.randrange(5))
        schema: dict[str, Any] = {"type": "object", "properties": {name: inner() for name in names}}
        schema["required"] = [name for name in names if rng.random() < 0.7]
        if kind == "object":
            return schema | {"additionalProperties": False}
        return schema | {"additionalProperties": inner()} if rng.random() < 0.5 else schema
    if kind == "array":
        low = rng.randrange(3)
        return {"type": "array", "items": inner(), "minItems": low, "maxItems": low + rng.randrange(3)}
    if kind == "tuple":
        parts = [inner() for _ in range(1 + rng.randrange(3))]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
    if kind == "any":
        return {"anyOf": [inner() for _ in range(1 + rng.randrange(3))]}
    return {"type": rng.sample(["integer", "boolean", "null"], 2)}


def fault(schema: dict[str, Any], result: losart.GenerationResult) -> str | None:
    """What is wrong with an answer; None of one that is right, or was cut."""
    from jsonschema import Draft202012Validator, FormatChecker

    if result.finish_reason == "length":
        return None
    try:
        value = json.loads(result.text)
    except ValueError as error:
        return f"{error}: {result.text!r}"
    # Not of dates: RFC 3339 has a year 0, and Python's calendar none.
    checker = FormatChecker(("uuid", "ipv4", "email"))
    errors = Draft202012Validator(schema, format_checker=checker).iter_errors(value)
    return next((f"{error.message}: {result.text!r}" for error in errors), None)


def check(model: losart.Model, seeds: Iterable[int], **options: Any) -> Counter[str]:
    """Answer some schemas together; how many answers ended how. AssertionError: one is wrong."""
    engine, refused = losart.Engine(model), Counter[str]()
    streams = []
    for seed in seeds:
        schema, prompt = random_schema(seed), [1 + seed % 200, 5, 1 + seed % 7]
        try:
            stream = engine.submit(prompt, json_schema=schema, each_step=False, seed=seed, **options)
        except losart.OptionError as error:  # what no text fits, or llguidance does not support
            assert str(error).startswith("json_schema: "), error
            refused["refused"] += 1
            refused[f"refused: {str(error)[:60]}"] += 1
        else:
            streams.append((seed, schema, stream))
    ended = Counter[str]()
    for seed, schema, stream in streams:
        result = stream.result()
        wrong = fault(schema, result)
        assert wrong is None, f"seed {seed}, {json.dumps(schema)}: {wrong}"
        ended[result.finish_reason] += 1
    return ended + refused


def main() -> None:
    """Answer as many as the command line says."""
    count = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 2:
            path: Any = sys.argv[2]
        else:
            from losart.measure.random_checkpoint import write_checkpoint

            path = write_checkpoint(folder, hidden_size=64, intermediate_size=96, num_layers=2, head_dim=32)
        model = losart.load(path, "cpu")
        for options in ({}, {"temperature": 1.0}, {"temperature": 0.6, "top_p": 0.8, "top_k": 40}):
            found = Counter[str]()
            for first in range(0, count, 64):
                seeds = range(first, min(first + 64, count))
                found += check(model, seeds, max_new_tokens=400, block_length=8, **options)
            print(options, dict(found), flush=True)


if __name__ == "__main__":
    main()
