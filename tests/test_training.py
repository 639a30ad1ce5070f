"""The training of the small checkpoint, as far as it goes without a GPU."""

import json

import numpy as np
import pytest

import losart

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="training needs torch")

import recall_rows  # noqa: E402
import train  # noqa: E402
from recall_losses import copy_loss, look_back_loss  # noqa: E402
from row_layout import Layout  # noqa: E402
from schedule import Stage  # noqa: E402
from sdar_directory import write_checkpoint  # noqa: E402
from small_sdar import ModelShape, SmallSdar  # noqa: E402

from losart.eval.vocabulary import VOCABULARY_SIZE, write_tokenizer  # noqa: E402

CPU = torch.device("cpu")
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 32, "intermediate_size": 96}
STAGES = (Stage(128, 3, 4), Stage(256, 2, 4, enough=2.0))


@pytest.fixture
def model():
    """Weights under which every token of a row matters to every answer."""
    torch.manual_seed(1)
    model = SmallSdar(ModelShape(VOCABULARY_SIZE, **SMALL))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    return model


def asked(prompt, questions):
    """A row whose answers are all masked, and its layout."""
    ids, _, _ = recall_rows.rows(np.random.default_rng(prompt), 1, prompt, questions)
    layout = recall_rows.layout(prompt, questions, CPU)
    ids[:, layout.answers.flatten()] = recall_rows.SPECIAL["mask"]
    return ids, layout


@torch.no_grad()
def test_questions_of_a_row_do_not_see_each_other(model):
    ids, layout = asked(256, 5)
    together = model(ids, layout, 1)[0][0, layout.answers]
    for number, places in enumerate(layout.answers):
        group = torch.arange(places[0] - 16, places[-1] + 1)
        alone = torch.cat([ids[:, : layout.document], ids[:, group]], dim=1)
        hidden = model(alone, recall_rows.layout(256, 1, CPU), 1)[0]
        assert torch.allclose(hidden[0, -16:], together[number], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("prompt", [128, 336])
def test_losart_runs_what_was_trained(model, tmp_path, prompt):
    write_checkpoint(model, tmp_path, recall_rows.SPECIAL, recall_rows.BLOCK)
    write_tokenizer(tmp_path)
    rounded = SmallSdar(model.shape)
    rounded.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    ids, layout = asked(prompt, 1)
    logits = rounded.logits(rounded(ids, layout, 1)[0][0, layout.answers[0]])
    logits[:, recall_rows.SPECIAL["mask"]] = -torch.inf
    found = losart.load(tmp_path, device="cpu", dtype="float32").generate(
        ids[0, :prompt].tolist(), max_new_tokens=16, denoising_steps=1, stop_token_ids=[]
    )
    assert found.token_ids == logits.argmax(-1).tolist()
    assert len(set(found.token_ids)) > 3


def test_looking_back(model):
    layout = Layout(64, 2, 16, 16, CPU)
    places = torch.tensor([0, 5, 63, 64, 79, 80, 96, 100, 127])  # 96 is the second question's first
    assert layout.back(places, 1).tolist() == [-1, 4, 62, 63, 78, 79, 63, 99, 126]
    assert layout.back(places, 16).tolist() == [-1, -1, 47, 48, 63, 64, 48, 52, 111]


def test_auxiliary_losses_fall_by_their_gradients(model):
    ids, layout = asked(128, 4)

    def losses():
        torch.manual_seed(0)
        kept = model(ids, layout, 1)[1]
        return look_back_loss(model, ids, layout, (1, 16), 64) + copy_loss(model, ids, kept, 64)

    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    first = losses()
    for _ in range(5):
        optimizer.zero_grad()
        losses().backward()
        optimizer.step()
    assert losses() < 0.8 * first


def test_training_goes_on_where_it_was_left(tmp_path):
    whole, cut = (train.Trainer(tmp_path / name, STAGES, 1.0, device="cpu") for name in ("whole", "cut"))
    for _ in range(2):
        whole.learn()
        cut.learn()
    cut.save()
    cut = train.Trainer(tmp_path / "cut", STAGES, 1.0, device="cpu")
    assert cut.resume() and cut.state == whole.state
    assert cut.learn() == whole.learn()


def test_training_ends_and_logs(tmp_path):
    trainer = train.Trainer(tmp_path, STAGES, minutes=0.05, device="cpu")
    assert not trainer.run(limit=0.0)
    assert trainer.run(limit=60.0)
    assert trainer.state.seconds >= 3 and (tmp_path / "training.pt").exists()
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        assert json.loads(line)["loss"] > 0
