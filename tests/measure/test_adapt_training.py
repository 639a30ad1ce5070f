"""Adapting a small model on a CPU: it learns, resumes, and is what its change says."""

import dataclasses

import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="training needs torch")

import small_base as small  # noqa: E402
from adapt.decoder import forward  # noqa: E402
from adapt.low_rank import added, products  # noqa: E402
from adapt.measures import masked_cross_entropy  # noqa: E402
from adapt.runs import read_run, write_summary  # noqa: E402
from adapt.step_texts import stages  # noqa: E402
from adapt.trainable import Lora  # noqa: E402
from adapt.trainer import Trainer  # noqa: E402

ALL = stages(["dialogues"], 0.4, 0.3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small.small_base(tmp_path_factory.mktemp("base"))


def trainer_of(directory, base, weights=None, **changes):
    texts = {"dialogues": small.counting_texts()}
    weights = base.weights() if weights is None else weights
    return Trainer(directory, base.shape, weights, texts, ALL, small.small_plan(**changes))


@pytest.mark.parametrize("lora", [None, Lora(8, 8.0)])
@pytest.mark.parametrize("shifted", [True, False])
def test_loss_falls(tmp_path, base, lora, shifted):
    trainer = trainer_of(tmp_path, base, lora=lora, shifted=shifted, certain=0.5, steps=24)
    found = [float(trainer.learn()["loss"]) for _ in range(24)]
    assert sum(found[-5:]) < 0.8 * sum(found[:5])


def test_training_goes_on_where_it_was_left(tmp_path, base):
    whole = trainer_of(tmp_path / "whole", base, lora=Lora(4, 4.0))
    cut = trainer_of(tmp_path / "cut", base, lora=Lora(4, 4.0))
    for _ in range(3):
        whole.learn()
        cut.learn()
    cut.save()
    cut = trainer_of(tmp_path / "cut", base, lora=Lora(4, 4.0))
    assert cut.resume() and cut.state == whole.state
    for _ in range(2):
        assert cut.learn() == whole.learn()
    for name, value in whole.trainable.parameters.items():
        assert torch.equal(value, cut.trainable.parameters[name])


def test_a_run_ends_at_its_limit_and_is_resumed(tmp_path, base):
    said = []
    trainer = trainer_of(tmp_path, base, steps=6)
    assert not trainer.run(0.0, said.append)
    trainer = trainer_of(tmp_path, base, steps=6)
    assert trainer.resume() and trainer.run(60.0, said.append) and trainer.state.step == 6
    assert "left" in said[-1] and (tmp_path / "log.jsonl").read_text().count("\n") == 1
    write_summary(trainer, base, None)
    weights, plan = read_run(tmp_path, base, base.weights())
    for kind, value in trainer.trainable.weights(torch.float32).items():
        assert torch.equal(weights[kind], value)
    assert plan["noise"]["mask_id"] == small.MASK_ID


def test_noisy_blocks_are_computed_as_in_decoding(tmp_path, base):
    """A noisy block's rows are those of a pass over the text before it, with that block at its end."""
    trainer = trainer_of(tmp_path, base)
    stream, sizes, weights = trainer.draw(3, 0), trainer.plan.sizes, trainer.trainable.weights(torch.float32)
    x = trainer.rows_of(stream, weights)[0]
    checked = 0
    for at in range(sizes.clean, sizes.tokens, 16):
        start, end = stream.clean_from[at], stream.clean_to[at + 15]
        block = int(stream.noisy_to[at] - stream.noisy_from[at])
        noisy = slice(at + 16 - block, at + 16)  # the last of the slot
        ids = torch.cat([stream.ids[start:end], stream.ids[noisy]])[None]
        places = torch.arange(ids.shape[1])
        seen = (places // block <= places[:, None] // block)[None, None]
        rows = forward(base.shape, weights, ids, places[None], seen, mask_id=small.MASK_ID)
        torch.testing.assert_close(rows[0, -block:], x[noisy], atol=1e-4, rtol=1e-4)
        checked += 1
    assert checked == sizes.noisy // 16


def test_a_change_of_low_rank_is_found_again(tmp_path, base):
    trainer = trainer_of(tmp_path, base, lora=Lora(3, 6.0))
    for _ in range(3):
        trainer.learn()
    original, weights = base.weights(), trainer.trainable.weights(torch.float32)
    found = products(original, weights, 3)
    for kind, value in added(original, found).items():
        torch.testing.assert_close(value, weights[kind].detach(), atol=1e-4, rtol=1e-4)
    # And training that begins with it continues from the same weights.
    other = trainer_of(tmp_path / "other", base, lora=Lora(4, 4.0))
    other.trainable.start(weights)
    for kind, value in other.trainable.weights(torch.float32).items():
        torch.testing.assert_close(value, weights[kind], atol=1e-4, rtol=1e-4)
    room = sum(2 * sum(a.numel() + b.numel() for a, b in of_kind) for of_kind in found.values()) // 2
    smaller = products(original, weights, 3, room)
    assert sum(2 * sum(a.numel() + b.numel() for a, b in one) for one in smaller.values()) <= room
    assert {a.shape[0] for one in smaller.values() for a, _ in one} > {1}


def test_held_out_cross_entropy_rises_with_the_masked(tmp_path, base):
    trainer = trainer_of(tmp_path, base)
    for _ in range(40):
        trainer.learn()
    weights = trainer.trainable.weights(torch.float32)
    found = masked_cross_entropy(trainer, weights, small.counting_texts(40), 8, (2, 8), streams=2)
    assert found[2] < found[8]


def test_plans_are_plain(base):
    assert dataclasses.asdict(small.small_plan(lora=Lora(4, 8.0)))["lora"]["alpha"] == 8.0


@pytest.mark.gpu
def test_compiled_training_is_the_plain_one(tmp_path, base):
    texts = {"dialogues": small.counting_texts()}
    both = [
        Trainer(
            *(
                tmp_path / str(flex),
                base.shape,
                base.weights("cuda"),
                texts,
                ALL,
                small.small_plan(certain=1),
            ),
            flex=flex,
        )
        for flex in (True, False)
    ]
    for _ in range(3):
        compiled, plain = (trainer.learn() for trainer in both)
        assert float(compiled["loss"]) == pytest.approx(float(plain["loss"]), rel=0.02)
