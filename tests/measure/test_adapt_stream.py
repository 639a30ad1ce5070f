"""What the adaptation's training sees and predicts, against the definition written out."""

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="training needs torch")

from adapt.stream import SLOT, Noise, Sizes, make_stream, slots, whole_slots  # noqa: E402
from adapt.stream_attention import TILE, StreamAttention, attend, tiles  # noqa: E402

END, MASK = 2, 3
SIZES = Sizes(384, 256, 200)


def drawn_texts(rng, lengths=(64, 23, 50, 41, 64)):
    """Texts of several turns, each with a block length; answers end with the end token."""
    texts = []
    for length in lengths:
        turns = int(rng.integers(1, 4))
        ids, answers = rng.integers(10, 90, length).astype(np.int32), np.zeros(length, bool)
        cuts = [*np.sort(rng.choice(np.arange(2, length - 2), 2 * turns - 1, replace=False)), length]
        for start, end in zip(cuts[::2], cuts[1::2], strict=True):
            answers[start:end] = True
            ids[end - 1] = END
        texts.append((ids, answers))
    return texts, rng.choice([4, 8, 16], len(lengths)).tolist()


class Places:
    """Of every token of a stream: its text, block length, and whether it is noisy."""

    def __init__(self, texts, blocks, stream):
        self.text = -1 - np.arange(SIZES.clean) // SLOT  # of what no text fills
        block, start = np.full(SIZES.clean, SLOT), 0
        for number, ((ids, _), of_text) in enumerate(zip(texts, blocks, strict=True)):
            part = slice(start, start + slots(len(ids)))
            self.text[part], block[part], start = number, of_text, part.stop
        source = stream.clean_from.numpy()[SIZES.clean :]
        self.text = np.concatenate([self.text, self.text[source]])
        self.block = np.concatenate([block, block[source]])
        self.noisy = np.arange(SIZES.tokens) >= SIZES.clean
        self.position = stream.positions.numpy()

    def sees(self):
        """Which token sees which, as the layout of block diffusion has it."""
        number, place = self.position // self.block, np.arange(SIZES.tokens) // self.block
        query, key = np.ix_(range(SIZES.tokens), range(SIZES.tokens))
        same_block = self.noisy[query] & (place[query] == place[key]) & (self.block[query] == self.block[key])
        earlier = number[key] < number[query]
        earlier |= ~self.noisy[query] & (number[key] == number[query])
        return np.where(self.noisy[key], same_block, earlier & (self.text[query] == self.text[key]))


@pytest.mark.parametrize("shifted", [True, False])
def test_attention_is_as_defined(shifted):
    rng = np.random.default_rng(shifted)
    texts, blocks = drawn_texts(rng, (300, 23, 34))
    stream = make_stream(rng, texts, blocks, SIZES, Noise(MASK, END, shifted))
    places = Places(texts, blocks, stream)
    expected = places.sees()
    flex, dense = (StreamAttention(SIZES, torch.device("cpu"), kind) for kind in (True, False))
    for kind in (flex, dense):
        kind.set(stream)
    np.testing.assert_array_equal(dense.mask.numpy(), expected)
    some, whole = (part.numpy() for part in tiles(stream, SIZES))
    count = SIZES.tokens // TILE
    of_tiles = expected.reshape(count, TILE, count, TILE)
    assert not (some & whole).any() and (of_tiles.all((1, 3)) >= whole).all()
    assert (of_tiles.any((1, 3)) <= some | whole).all() and whole.any()

    kept = flex.mask
    other = make_stream(rng, texts[::-1], blocks[::-1], SIZES, Noise(MASK, END, shifted))
    for kind in (flex, dense):
        kind.set(other)
    assert flex.mask is kept  # its tensors are others: what is compiled reads them anew
    q, k, v = (torch.randn(1, heads, SIZES.tokens, 16) for heads in (4, 2, 2))
    torch.testing.assert_close(attend(flex.mask, q, k, v), attend(dense.mask, q, k, v))


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("exactly", [None, 3])
def test_predictions_are_of_the_right_tokens(shifted, exactly):
    rng = np.random.default_rng(10 + shifted)
    for _ in range(5):
        texts, blocks = drawn_texts(rng)
        stream = make_stream(rng, texts, blocks, SIZES, Noise(MASK, END, shifted, decay=0.5, exactly=exactly))
        places, ids = Places(texts, blocks, stream), stream.ids.numpy()
        predicted = {}
        for row, target, weight in zip(stream.rows, stream.targets, stream.weights, strict=True):
            if weight == 0:
                continue
            at = int(row) + shifted
            predicted[at] = 1
            position, block = places.position[at], places.block[at]
            tokens, answers = texts[places.text[at]]
            if not places.noisy[row]:  # the last row of the block before
                assert shifted and position % block == 0 and weight == 1 and ids[at] == target
                assert answers[position]
                continue
            assert ids[at] == MASK and not (shifted and position % block == 0)
            before = slice(position - position % block, position)
            ended = (answers[before] & (tokens[before] == END)).any() or position >= len(tokens)
            assert target == (END if ended else tokens[position]) and (ended or answers[position])
            masked = 0
            while (at - masked) % block and ids[at - masked - 1] == MASK:
                masked += 1
            assert weight == 0.5**masked
        masked = np.flatnonzero(ids == MASK)
        assert len(masked) and (len(predicted) == SIZES.targets or set(masked) <= set(predicted))
        if exactly is not None and not shifted:
            counts = np.bincount(masked // 4)  # of at most so many in any block
            assert counts.max() <= exactly


def test_texts_that_were_cut_fill_their_slots():
    ids = np.arange(40, dtype=np.int32) + 10
    assert len(whole_slots((ids, ids > 0), END)[0]) == 32
    ids[-1] = END
    assert len(whole_slots((ids, ids > 0), END)[0]) == 40


def test_too_many_texts_are_refused():
    rng = np.random.default_rng(0)
    texts, blocks = drawn_texts(rng, 8 * (50,))
    with pytest.raises(ValueError, match="more than 384 tokens"):
        make_stream(rng, texts, blocks, SIZES, Noise(MASK, END))
