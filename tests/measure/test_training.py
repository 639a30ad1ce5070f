"""The training of the small checkpoint, as far as it goes without a GPU."""

import json

import numpy as np
import pytest
import reference as ref

import losart

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="training needs torch")

import recall_rows  # noqa: E402
import train  # noqa: E402
from recall_losses import copy_loss, look_back_loss, page_bound_loss  # noqa: E402
from row_layout import Layout  # noqa: E402
from schedule import Stage  # noqa: E402
from sdar_directory import write_checkpoint  # noqa: E402
from small_sdar import ModelShape, SmallSdar  # noqa: E402
from summary import write_summary  # noqa: E402
from trainer import RECALL_EVERY, Trainer  # noqa: E402

from losart.eval.symbols import BLOCK  # noqa: E402
from losart.eval.tasks import TASKS  # noqa: E402
from losart.eval.vocabulary import (  # noqa: E402
    FIRST_SYMBOL,
    HOP,
    VOCABULARY_SIZE,
    token_id,
    write_tokenizer,
)

CPU = torch.device("cpu")
SMALL = ModelShape(VOCABULARY_SIZE, hidden_size=64, num_hidden_layers=2, head_dim=32, intermediate_size=96)
ON_CPU = {"device": "cpu", "shape": SMALL}
STAGES = (Stage(128, 3, 4), Stage(256, 2, 4))


@pytest.fixture
def model():
    """Weights under which every token of a row matters to every answer."""
    torch.manual_seed(1)
    model = SmallSdar(SMALL)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    return model


def asked(prompt, questions):
    """A row whose answers are all masked, and its layout."""
    ids = recall_rows.make_rows(np.random.default_rng(prompt), 1, prompt, questions).ids
    layout = recall_rows.layout(prompt, questions, CPU)
    ids[:, layout.answers.flatten()] = recall_rows.SPECIAL["mask"]
    return ids, layout


@torch.no_grad()
def test_questions_of_a_row_do_not_see_each_other(model):
    ids, layout = asked(256, 5)
    together = model(ids, layout)[0][0, layout.answers]
    for number, places in enumerate(layout.answers):
        group = torch.arange(places[0] - 16, places[-1] + 1)
        alone = torch.cat([ids[:, : layout.document], ids[:, group]], dim=1)
        hidden = model(alone, recall_rows.layout(256, 1, CPU))[0]
        assert torch.allclose(hidden[0, -16:], together[number], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("prompt", [128, 336])
def test_losart_runs_what_was_trained(model, tmp_path, prompt):
    write_checkpoint(model, tmp_path, recall_rows.SPECIAL, BLOCK)
    write_tokenizer(tmp_path)
    rounded = SmallSdar(model.shape)
    rounded.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    ids, layout = asked(prompt, 1)
    logits = rounded.logits(rounded(ids, layout)[0][0, layout.answers[0]])
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


def drawn(count=2, prompt=128, questions=4, samples=32):
    rows = recall_rows.make_rows(np.random.default_rng(3), count, prompt, questions, samples=samples)
    return rows, recall_rows.layout(prompt, questions, CPU)


def test_rows_say_what_is_masked_and_where_answers_stand():
    rows, layout = drawn(count=8, prompt=256, questions=16, samples=512)
    mask, ids = recall_rows.SPECIAL["mask"], rows.ids
    assert (ids.flatten()[rows.masked] == mask).all() and (ids == mask).sum() == len(rows.masked)
    whole = ids.flatten().index_copy(0, rows.masked, rows.targets).view_as(ids)
    assert (whole.gather(1, rows.looking) == ids.gather(1, rows.sources)).all()
    assert rows.looking.shape == (8, 64) and (rows.sources < layout.document).all()
    assert set(rows.looking.flatten().tolist()) <= set(layout.answers.flatten().tolist())
    hidden = ids.gather(1, rows.looking) == mask
    assert hidden.any() and not hidden.all()
    # What cannot be known is not counted: past a hop, symbols whose key is masked.
    hop, block = token_id(HOP), BLOCK
    for place, task in zip(rows.masked.tolist(), rows.tasks.tolist(), strict=True):
        pair = place - place % 2
        past = ids.flatten()[place - block] == hop and (ids.flatten()[pair - 2 : pair] == mask).any()
        symbol = whole.flatten()[place] >= FIRST_SYMBOL
        assert (task == recall_rows.NOT_COUNTED) == bool(past or not symbol)


def test_recall_is_the_share_of_what_can_be_known():
    tasks = torch.tensor([0, 0, 0, 2, recall_rows.NOT_COUNTED])
    right = torch.tensor([True, True, False, False, True])
    assert recall_rows.recall(right, tasks) == {"key": pytest.approx(2 / 3), "keys-4": 0.0}


@torch.no_grad()
def test_page_bound_loss_is_that_of_quests_bounds(model):
    rows, layout = drawn()
    before = model(rows.ids, layout)[1]
    attention = model.model.layers[1].self_attn
    x = model.model.layers[1].input_layernorm(before[1])
    q, k, _ = (
        part.transpose(1, 2).numpy() for part in attention.project(x, *model.rotation(layout.positions))
    )
    scale, losses, weights = 32**-0.5, [], []
    for row in range(len(rows.ids)):
        keys, queries = k[row, : layout.document], q[row, rows.looking[row]]
        page = rows.sources[row].numpy() // 16
        bounds = scale * ref.quest_scores(queries, *ref.page_bounds(keys, 16))
        for head in range(queries.shape[1]):
            scores = np.exp(scale * queries[:, head] @ keys[:, head // 4].T)
            for sample, right in enumerate(page):
                of_page = scores[sample, 16 * right : 16 * right + 16].sum() / scores[sample].sum()
                weights.append(of_page)
                chances = np.exp(bounds[sample, head] - bounds[sample, head].max())
                losses.append(-np.log(chances[right] / chances.sum()))
    expected = np.dot(weights, losses) / np.sum(weights)
    assert page_bound_loss(model, before, layout, rows).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["look_back", "copy", "page_bound"])
def test_auxiliary_losses_fall_by_their_gradients(model, name):
    rows, layout = drawn()

    def loss():
        torch.manual_seed(0)
        if name == "look_back":
            return look_back_loss(model, rows.ids, layout, (1, 16), 64)
        before = model(rows.ids, layout)[1]
        if name == "copy":
            return copy_loss(model, rows.ids, before[1], 64)
        return page_bound_loss(model, before, layout, rows)

    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    first = loss()
    for _ in range(5):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss() < 0.8 * first


def test_training_goes_on_where_it_was_left(tmp_path):
    whole, cut = (Trainer(tmp_path / name, STAGES, 1.0, **ON_CPU) for name in ("whole", "cut"))
    for _ in range(2):
        whole.learn()
        cut.learn()
    cut.save()
    cut = Trainer(tmp_path / "cut", STAGES, 1.0, **ON_CPU)
    assert cut.resume() and cut.state == whole.state
    assert cut.learn() == whole.learn()


def test_steps_follow_from_seed_and_step_whatever_was_drawn_ahead(tmp_path):
    """Rows drawn ahead for a stage that ended meanwhile are not used."""
    trainer = Trainer(tmp_path, STAGES, 1.0, **ON_CPU)
    trainer.learn()  # draws the next step's rows of the first stage
    trainer.state.began.append(1)
    number, rows = trainer._next_rows()
    expected, fresh = trainer._draw(1, 1)
    assert number == expected and torch.equal(rows.ids, fresh.ids)


def test_the_next_stage_begins_when_enough_is_learnt(tmp_path):
    easy = (Stage(128, 2, 4, enough=-1.0), Stage(256, 2, 4))
    trainer = Trainer(tmp_path, easy, 1.0, **ON_CPU)
    trainer.learn()
    assert trainer.state.began == [0, 1] and trainer.state.stage == 1
    trainer.state.step = RECALL_EVERY
    trainer.learn()
    assert trainer.state.stage == 1  # the last one


def test_training_ends_and_logs(tmp_path):
    trainer = Trainer(tmp_path, STAGES, minutes=0.05, **ON_CPU)
    assert not trainer.run(limit=0.0)
    assert trainer.run(limit=60.0)
    assert trainer.state.seconds >= 3 and (tmp_path / "training.pt").exists()
    assert trainer.state.start is None
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["loss"] > 0 and set(row["recall"]) == {"128"} and set(row["recall"]["128"]) == set(TASKS)
    write_summary(trainer, tmp_path / "training.json")
    summary = json.loads((tmp_path / "training.json").read_text())
    assert (summary["steps"], summary["seed"], summary["device"]) == (trainer.state.step, 0, "cpu")
    assert summary["start"] is None
    assert [stage["first_step"] for stage in summary["stages"]] == [0, None]


LOSSES = {"loss", "look_back", "copy"}


def losses(trainer):
    return set(trainer.learn()) - {"tokens", "rate"}


def test_the_page_bound_loss_waits_for_the_first_stage_to_be_learnt(tmp_path):
    trainer = Trainer(tmp_path, STAGES, 1.0, **ON_CPU)
    assert losses(trainer) == LOSSES
    trainer.state.began.append(1)
    assert losses(trainer) == LOSSES | {"page_bound"}


def test_a_loss_of_no_weight_is_left_out(tmp_path):
    trainer = Trainer(tmp_path, STAGES, 1.0, **ON_CPU, page_bound=0.0)
    trainer.state.began.append(1)
    assert losses(trainer) == LOSSES


def checkpoint_of(model, directory):
    write_checkpoint(model, directory, recall_rows.SPECIAL, BLOCK)
    return directory


def test_training_begins_with_the_weights_of_a_checkpoint(model, tmp_path):
    start = checkpoint_of(model, tmp_path / "start")
    trainer = Trainer(tmp_path / "out", STAGES, 1.0, **ON_CPU)
    trainer.start(start)
    given = model.state_dict()
    for name, value in trainer.model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, given[name].bfloat16().float())
    assert not trainer.optimizer.state and trainer.state.step == trainer.state.stage == 0
    assert losses(trainer) == LOSSES | {"page_bound"}  # its heads find facts already
    trainer.save()
    cut = Trainer(tmp_path / "out", STAGES, 1.0, **ON_CPU)
    assert cut.resume() and cut.state == trainer.state and cut.learn() == trainer.learn()
    write_summary(cut, tmp_path / "training.json")
    assert json.loads((tmp_path / "training.json").read_text())["start"] == str(start)


def run_train(monkeypatch, capsys, *arguments):
    """Exit code of the command for no time at all, and what it printed."""
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments), "--device", "cpu", "--limit", "0"])
    try:
        train.main()
        code = 0
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr()


def test_the_command_starts_with_a_checkpoint_but_goes_on_without_it(tmp_path, monkeypatch, capsys):
    torch.manual_seed(5)
    start = checkpoint_of(SmallSdar(ModelShape(VOCABULARY_SIZE)), tmp_path / "start")
    out = tmp_path / "out"
    code, said = run_train(monkeypatch, capsys, out, "--start", start)
    assert code == 0 and f"beginning with the weights of {start}" in said.out
    written, given = (folder / "model.safetensors" for folder in (out / "checkpoint", start))
    assert written.read_bytes() == given.read_bytes()
    code, said = run_train(monkeypatch, capsys, out, "--start", tmp_path / "gone")
    assert code == 0 and "going on from step 0" in said.out
    assert json.loads((out / "training.json").read_text())["start"] == str(start)


@pytest.mark.parametrize("wrong", ["sizes", "no weights", "no directory"])
def test_a_checkpoint_that_does_not_fit_is_one_line(model, tmp_path, monkeypatch, capsys, wrong):
    start = tmp_path / "start"
    if wrong == "sizes":
        checkpoint_of(model, start)
    elif wrong == "no weights":
        torch.manual_seed(5)
        checkpoint_of(SmallSdar(ModelShape(VOCABULARY_SIZE)), start)
        (start / "model.safetensors").unlink()
    code, said = run_train(monkeypatch, capsys, tmp_path / "out", "--start", start)
    named = {
        "sizes": f"{start / 'config.json'}: hidden_size is 64; the training has 256",
        "no weights": f"{start}: neither model.safetensors",
        "no directory": f"{start / 'config.json'}: no such file",
    }
    assert code == 1 and said.err.startswith(f"train.py: {named[wrong]}") and said.err.count("\n") == 1
