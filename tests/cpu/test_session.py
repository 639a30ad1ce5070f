"""Sessions: prompts that begin with what the one before left answer as they do alone, and prefill less."""

from __future__ import annotations

import itertools
import linecache
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference as ref
from passes import block_batch
from test_kv_index import bounds, read_back
from test_model_api import spoil_row, with_tensor

import losart
from losart import NumericalError, OptionError, OutOfMemoryError, PromptError
from losart.config.options import generation_config
from losart.engine.batch import PassKind
from losart.engine.kv_pool import Prefix, common_length
from losart.measure.random_checkpoint import write_checkpoint

LOSA = {"attention": "losa", "budget": 32, "active": 2}
FIRST = np.random.default_rng(1).integers(0, 256, 101).tolist()
MORE = np.random.default_rng(2).integers(0, 256, 37).tolist()


@pytest.fixture(scope="module")
def calm_checkpoint(tmp_path_factory) -> Path:
    """Scores of standard deviation 1: sharper attention makes more of bfloat16's rounding.

    A pass takes the keys and values of its own block as they are, a prefill as they are held: in
    16-bit dtypes what a pass commits is what a prefill gives to rounding only.
    """
    return write_checkpoint(tmp_path_factory.mktemp("calm"), head_gain=1.0)


@pytest.fixture(scope="module")
def models(calm_checkpoint) -> Any:
    return {dtype: losart.load(calm_checkpoint, "cpu", dtype) for dtype in ("float32", "bfloat16")}


def check_turns(model: losart.Model, options: dict[str, Any]) -> None:
    """Three prompts, of which the second goes on after the first and the third turns off within it."""
    length, page = options["block_length"], options["page_size"]
    session = model.session(**options)
    first = session.generate(FIRST)
    assert (first.stats.reused_tokens, first.stats.prefilled_tokens) == (0, len(FIRST) // length * length)

    going_on = [*FIRST, *first.token_ids, *MORE]
    second = session.generate(going_on)
    # Whole pages, without the block that the answer ended in.
    step = math.lcm(length, page)
    held = (len(FIRST) + len(first.token_ids) - 1) // length * length // step * step
    assert second.stats.reused_tokens == held > len(FIRST)
    assert second.stats.prefilled_tokens == len(going_on) // length * length - held
    assert second.token_ids == model.generate(going_on, **options).token_ids

    turning_off = [*FIRST[:90], *MORE[:30]]
    third = session.generate(turning_off)
    assert third.stats.reused_tokens == 90 // step * step
    assert third.token_ids == model.generate(turning_off, **options).token_ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_length", [1, 4, 16])
@pytest.mark.parametrize("page_size", [16, 48])
@pytest.mark.parametrize("attention", [{}, LOSA], ids=["dense", "losa"])
def test_later_prompts_answer_as_in_a_cache_of_their_own(models, dtype, block_length, page_size, attention):
    options = {"max_new_tokens": 50, "stop_token_ids": [], "block_length": block_length}
    check_turns(models[dtype], options | attention | {"page_size": page_size})


@pytest.mark.gpu
@pytest.mark.parametrize("block_length", [1, 4, 16])
@pytest.mark.parametrize("page_size", [16, 48])
def test_later_prompts_answer_as_in_a_cache_of_their_own_on_cuda(calm_checkpoint, block_length, page_size):
    """In float32: kernels of prefill and of passes round sums in 16 bits to either side."""
    options = {"max_new_tokens": 50, "stop_token_ids": [], "block_length": block_length}
    check_turns(losart.load(calm_checkpoint, "cuda", "float32"), options | {"page_size": page_size})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_length", [1, 4, 16])
@pytest.mark.parametrize("page_size", [16, 48])
@pytest.mark.parametrize("attention", [{}, LOSA], ids=["dense", "losa"])
def test_a_second_prompt_answers_as_after_the_same_blocks(
    tiny_checkpoint, dtype, block_length, page_size, attention
):
    """With a sharper attention, and bit for bit: the first answer's blocks are committed, not prefilled."""
    model = losart.load(tiny_checkpoint, "cpu", dtype)
    options = {"max_new_tokens": 50, "stop_token_ids": [], "block_length": block_length}
    options |= attention | {"page_size": page_size}
    session = model.session(**options)
    first = session.generate(FIRST).token_ids
    second = session.generate([*FIRST, *first, *MORE])

    config = generation_config(model.config, options)
    engine, ids = model._engine, [*FIRST, *first, *MORE]
    transformer = engine.runner
    cache = transformer.new_cache(config, len(ids))
    engine.prefill(engine.sequence(FIRST, config, cache))
    slot = transformer.new_slot(config)
    while cache.length < second.stats.reused_tokens:
        block = ids[cache.length :][:block_length]
        cache.reserve(cache.length + len(block))
        transformer.forward(
            block_batch(cache, len(block), PassKind.COMMIT, slot=slot, options=config, ids=block)
        )
        cache.advance(len(block))
    sequence = engine.sequence(ids, config, cache)
    assert list(engine.steps(sequence))
    assert second.token_ids == sequence.output.tokens


def test_the_same_prompt_again_is_prefilled_no_more(models):
    model, prompt = models["float32"], FIRST[:96]
    session = model.session(max_new_tokens=9, stop_token_ids=[])
    once, again, shorter = session.generate(prompt), session.generate(prompt), session.generate(prompt[:32])
    assert once.token_ids == again.token_ids
    assert (again.stats.reused_tokens, again.stats.prefilled_tokens) == (96, 0)
    assert (shorter.stats.reused_tokens, shorter.stats.prefilled_tokens) == (32, 0)
    assert shorter.token_ids == model.generate(prompt[:32], max_new_tokens=9, stop_token_ids=[]).token_ids


def test_options_of_one_generation(models):
    """The prompt is prefilled once for all of them, and the session's own options stay."""
    model, prompt = models["float32"], FIRST[:96]
    options = {"max_new_tokens": 20, "stop_token_ids": [], "block_length": 4}
    others = [
        LOSA,
        {"attention": "quest", "budget": 16},
        {"temperature": 1.0, "seed": 5},
        {"max_new_tokens": 3},
    ]
    session = model.session(**options)
    dense = session.generate(prompt)
    for changed in (*others, {}):
        found = session.generate(prompt, **changed)
        assert found.token_ids == model.generate(prompt, **(options | changed)).token_ids
        assert (found.stats.reused_tokens, found.stats.prefilled_tokens) == (96, 0)
    assert found.token_ids == dense.token_ids and found.stats.density == 1.0
    assert session.options == generation_config(model.config, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_length": 8}, "block_length must be the session's, 4, not 8"),
        ({"page_size": 32}, "page_size must be the session's, 16, not 32"),
        ({"budget": 0}, "budget must be"),
        ({"attention": "mage"}, "attention must be one of"),
    ],
)
def test_options_that_one_generation_cannot_have(models, options, message):
    session = models["float32"].session(block_length=4, max_new_tokens=4, stop_token_ids=[])
    with pytest.raises(OptionError, match=message):
        session.generate(FIRST[:32], **options)
    assert session.generate(FIRST[:32]).token_ids


def test_a_prompt_that_is_text_again_is_not_taken_for_another(models):
    model = models["float32"]
    session = model.session(max_new_tokens=4, stop_token_ids=[])
    for text in ("one two", "one two", "one too", ["one two", 1][:0] or "one two"):
        assert (
            session.generate(text).token_ids
            == model.generate(text, max_new_tokens=4, stop_token_ids=[]).token_ids
        )
    messages = FIRST[:8]
    session.generate(messages)
    messages[0] += 1  # the same list, with something else in it
    assert (
        session.generate(messages).token_ids
        == model.generate(messages, max_new_tokens=4, stop_token_ids=[]).token_ids
    )


def test_prompts_of_several_pieces(models):
    """Prefill goes by 512 tokens, from wherever it begins: here from page 43, at 688."""
    model = models["float32"]
    prompt = np.random.default_rng(3).integers(0, 256, 1900).tolist()
    session = model.session(max_new_tokens=8, stop_token_ids=[])
    session.generate(prompt[:700])
    seen = []
    result = session.generate(prompt, progress=lambda *done: seen.append(done))
    assert seen == [(512, 1212), (1024, 1212), (1212, 1212)]
    assert result.token_ids == model.generate(prompt, max_new_tokens=8, stop_token_ids=[]).token_ids


def test_a_stream_that_is_left_is_no_trouble(models):
    model, options = models["float32"], {"max_new_tokens": 40, "stop_token_ids": [], **LOSA, "page_size": 48}
    session = model.session(**options)
    for steps in (0, 1, 2, 7, 23):
        prompt = [steps, *FIRST]
        said = list(itertools.islice(session.stream(prompt), steps))
        known = [token for step in said[-1:] for token in step.block if token is not None]
        going_on = [*prompt, *known, *MORE]
        found = session.generate(going_on)
        assert found.token_ids == model.generate(going_on, **options).token_ids
        assert found.stats.reused_tokens == (96 if steps else 0)


def test_what_a_left_stream_has_answered_is_found(models):
    """While the stream is kept, too."""
    model, options = models["float32"], {"max_new_tokens": 80, "stop_token_ids": []}
    answer = model.generate(FIRST, **options).token_ids
    session = model.session(**options)
    stream = session.stream(FIRST)
    for step in stream:
        if step.block_start >= 144:
            break
    going_on = [*FIRST, *answer[:43], *MORE]
    found = session.generate(going_on)
    assert found.stats.reused_tokens == 144
    assert found.token_ids == model.generate(going_on, **options).token_ids
    with pytest.raises(PromptError, match="begun another"):
        next(stream)


def test_an_interrupted_prefill_goes_on_where_it_was(models, monkeypatch):
    model, options = models["float32"], {"max_new_tokens": 8, "stop_token_ids": []}
    prompt = np.random.default_rng(3).integers(0, 256, 1900).tolist()
    runner: Any = model._engine.runner
    begin, passes = runner.begin, itertools.count(1)

    def interrupted(*args: Any) -> Any:
        finish = begin(*args)

        def wait() -> Any:
            result = finish()
            if next(passes) == 3:
                raise KeyboardInterrupt
            return result

        return wait

    session = model.session(**options)
    monkeypatch.setattr(runner, "begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.generate(prompt)
    monkeypatch.undo()
    again = session.generate(prompt)
    assert again.stats.reused_tokens == 1024
    assert again.token_ids == model.generate(prompt, **options).token_ids


def test_a_conversation_outgrows_small_chunks(models, monkeypatch):
    monkeypatch.setattr("losart.engine.kv_cache.FEW_POSITIONS", 300)
    model, options = models["float32"], {"max_new_tokens": 60, "stop_token_ids": []}
    session, prompt, known, sizes = model.session(**options), FIRST, 0, []
    for _ in range(4):
        result = session.generate(prompt)
        assert result.stats.reused_tokens == known
        assert result.token_ids == model.generate(prompt, **options).token_ids
        (prefix,) = held_by(session)
        sizes.append(prefix.positions_per_chunk)
        known = (len(prompt) + 59) // 16 * 16
        prompt = [*prompt, *result.token_ids, *MORE]
    assert sizes == [256, 256, 1024, 1024]


@pytest.mark.parametrize(("commit", "reused"), [("dense", 144), ("sparse", 96)])
def test_answers_that_were_committed_sparsely_are_prefilled(models, commit, reused):
    model = models["float32"]
    options = {
        "max_new_tokens": 50,
        "stop_token_ids": [],
        "attention": "quest",
        "budget": 32,
        "commit": commit,
    }
    session = model.session(**options)
    going_on = [*FIRST, *session.generate(FIRST).token_ids, *MORE]
    found = session.generate(going_on)
    assert found.stats.reused_tokens == reused
    assert found.token_ids == model.generate(going_on, **options).token_ids


def test_a_stream_cannot_go_on_after_another_began(models):
    session = models["float32"].session(max_new_tokens=12, stop_token_ids=[])
    expected = session.generate(FIRST).token_ids
    old = session.stream(MORE)
    next(old)
    new = session.stream(FIRST)
    with pytest.raises(PromptError, match="begun another"):
        next(old)
    assert list(new)[-1].result.token_ids == expected


def test_a_stream_that_has_ended_has_its_result_whatever_came_since(models):
    session = models["float32"].session(max_new_tokens=12, stop_token_ids=[])
    ended = session.stream(FIRST)
    while (step := next(ended)).result is None:
        pass
    session.generate(MORE)
    assert ended.result() is step.result


FILES = {
    str(Path(losart.__file__).parent / f"{name}.py")
    for name in (
        *("api/session", "engine/engine", "engine/sequence", "models/transformer"),
        *("engine/kv_cache", "engine/kv_pool"),
    )
}


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that runs in the files above.

    At the next one, where that is the end of a `with` or a `try`: there Python calls no handler of a signal,
    and a lock would stay taken.
    """

    def __init__(self, lines: int) -> None:
        self.left = lines
        self.raised = False
        self.before: dict[Any, int] = {}  # the line before, by frame

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        file, line = frame.f_code.co_filename, frame.f_lineno
        if file not in FILES:
            return None
        if event == "line":
            self.left -= 1
            back = self.before.get(frame, 0) > line
            self.before[frame] = line
            if self.left > 0 or self.raised:
                return self
            text = linecache.getline(file, line).strip()
            if text != "try:" and not (back and text.startswith("with ")):
                self.raised = True
                self.before.clear()
                raise KeyboardInterrupt
        elif event == "return":
            self.before.pop(frame, None)
        return self


def held_by(session: losart.Session) -> list[Prefix]:
    return list(session._engine._pool._held)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in the end of a stream
@pytest.mark.parametrize("attention", [{}, {"attention": "quest", "budget": 16}], ids=["dense", "quest"])
def test_an_interrupt_anywhere_leaves_a_usable_session(make_checkpoint, attention):
    model = losart.load(make_checkpoint(), device="cpu")
    options = {"max_new_tokens": 10, "stop_token_ids": [], "block_length": 4, "page_size": 16, **attention}
    whole = [*FIRST, *model.generate(FIRST, **options).token_ids]

    def turn_off(place: int) -> list[int]:
        return [*whole[:place], *MORE]

    # What follows goes on with all, or turns off early, or where what the interrupt left ends.
    expected = {}
    interrupted = found = 0
    for line in itertools.count(1, 5):
        session = model.session(**options)
        session.generate(FIRST[:30])
        before = sys.gettrace()
        sys.settrace(Interrupt(line))
        try:
            session.generate(FIRST)
        except KeyboardInterrupt:
            interrupted += 1
        else:
            break
        finally:
            sys.settrace(before)
        length = max((len(prefix.ids) for prefix in held_by(session)), default=0)
        place = (length, length, len(whole), 40)[line % 4]
        if place not in expected:
            expected[place] = model.generate(turn_off(place), **options).token_ids
        common = 0
        for prefix in held_by(session):
            check_bounds(prefix)
            common = common_length(prefix.ids, turn_off(place)) // 16 * 16
        again = session.generate(turn_off(place))
        assert again.token_ids == expected[place], line
        assert again.stats.reused_tokens == common
        found += again.stats.reused_tokens > 30
        (prefix,) = held_by(session)
        check_bounds(prefix)
        assert session._engine.stats.kv_bytes_in_use == 0
    assert interrupted > 100 and found > interrupted / 3


def check_bounds(prefix: Prefix) -> None:
    """Of the one layer's pages: those of the keys that are held."""
    keys, _ = read_back(prefix.chunks, 0, len(prefix.ids), "float32")
    smallest, largest = ref.page_bounds(keys, prefix.kind.page_size)
    found = [bound[: len(largest)] for bound in bounds(prefix.chunks, 0)]
    np.testing.assert_array_equal(found, [largest, smallest])


def test_an_error_leaves_a_usable_session(make_checkpoint):
    path = with_tensor(make_checkpoint(), "model.embed_tokens.weight", spoil_row(3, np.nan))
    model = losart.load(path, device="cpu")
    options = {"max_new_tokens": 10, "stop_token_ids": []}
    session = model.session(**options)
    good, bad = [token + 4 for token in FIRST[:98]], [*range(20, 50), 3, *range(60, 90)]
    expected = model.generate(good, **options).token_ids
    assert session.generate(good).token_ids == expected
    with pytest.raises(NumericalError):
        session.generate(bad)
    again = session.generate(good)
    assert (again.token_ids, again.stats.reused_tokens) == (expected, 96)
    with pytest.raises(NumericalError):
        session.generate(bad)
    assert session.generate([*bad[:28], *good]).stats.reused_tokens == 0


def test_a_block_whose_keys_are_not_finite_does_not_stay(models, monkeypatch):
    """It is committed by itself, and the stream left before logits have come of it."""
    model = models["float32"]
    options = {"attention": "quest", "block_length": 4, "stop_token_ids": []}
    runner, start, broken = model._engine.runner, 76, True
    begin = runner.begin

    def spoiling(batch: Any, *more: Any) -> Any:
        finish = begin(batch, *more)
        one = batch.sequences[0]
        if broken and one.kind is PassKind.COMMIT and one.prefix_length == start:
            for kv, _ in one.cache.chunks:
                kv[:, :, :, start : start + 4] = np.nan
        return finish

    prompt = FIRST[:62]
    answer = model.generate(prompt, **options).token_ids
    session = model.session(**options)
    monkeypatch.setattr(runner, "begin", spoiling)
    stream = session.stream(prompt)
    for step in stream:
        if step.block_start == start and None not in step.block:
            break
    stream.close()
    broken = False
    following = [*prompt, *answer[:30]]
    with pytest.raises(NumericalError):
        session.generate(following)
    assert session.generate(following).token_ids == model.generate(following, **options).token_ids


def test_no_memory_leaves_a_usable_session(models, monkeypatch):
    model, long = models["float32"], [7] * 1500
    session = model.session(max_new_tokens=4, stop_token_ids=[])
    expected = session.generate(FIRST).token_ids

    def no_memory(*_: object) -> None:
        raise OutOfMemoryError("no memory")

    monkeypatch.setattr(losart.engine.kv_cache.PagedKVCache, "reserve", no_memory)
    with pytest.raises(OutOfMemoryError):
        session.generate(long)
    monkeypatch.undo()
    assert session.generate(FIRST).token_ids == expected


def test_mistakes(models):
    model = models["float32"]
    for options in ({"temprature": 1}, {"top_p": 2}, {"attention": "sparse"}, {"remasking": "random"}):
        with pytest.raises(OptionError):
            model.session(**options)
    session = model.session(max_new_tokens=4)
    expected = session.generate(FIRST).token_ids
    for prompt in ("", [], [10**6], [1] * 4096, [FIRST, FIRST]):
        with pytest.raises(PromptError):
            session.stream(prompt)
    again = session.generate(FIRST)
    assert again.token_ids == expected
    assert again.stats.reused_tokens > 0
