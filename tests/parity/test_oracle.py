"""The oracle does what it is trusted for: above all, its block-causal mask is really honoured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the oracle needs torch")
pytest.importorskip("transformers", reason="the oracle needs transformers")

import oracle
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

pytestmark = pytest.mark.parity

MASK = 60
CONFIG = {
    "model_type": "sdar",
    "architectures": ["SDARForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
PROMPT = [5, 9, 33, 2, 17, 40, 8]


def write(directory: Path, **changes: object) -> Path:
    """A random SDAR checkpoint; weights large enough that every token matters to the others."""
    keys = {**CONFIG, **changes}
    torch.manual_seed(3)
    model = Qwen3ForCausalLM(Qwen3Config(**{k: v for k, v in keys.items() if k != "model_type"}))
    tensors = {name: torch.randn_like(tensor) * 0.3 for name, tensor in model.state_dict().items()}
    tensors |= {name: torch.rand_like(tensor) + 0.5 for name, tensor in tensors.items() if "norm" in name}
    if keys["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(keys))
    return directory


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint"))


def generate(checkpoint: Path, prompt: list[int] = PROMPT, **options: object) -> list[int]:
    defaults = {
        "max_new_tokens": 9,
        "block_length": 4,
        "denoising_steps": 4,
        "remasking": "low_confidence_static",
        "confidence_threshold": 0.9,
        "eb_threshold": 0.5,
        "mask_token_id": MASK,
        "stop_token_ids": [],
    }
    return oracle.generate(checkpoint, prompt, **{**defaults, **options})


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the passes from here on."""
    lengths: list[int] = []
    forward = oracle.forward

    def counted(model: Qwen3ForCausalLM, ids: list[int], block_length: int) -> np.ndarray:
        lengths.append(len(ids))
        return forward(model, ids, block_length)

    monkeypatch.setattr(oracle, "forward", counted)
    return lengths


# The mask


def test_the_mask_by_hand() -> None:
    seen = (oracle.block_causal_mask(5, 2)[0, 0] == 0).int().tolist()
    assert seen == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("block_length", [1, 3, 4, 16])
def test_a_token_is_seen_by_its_block_and_the_later_ones_only(checkpoint: Path, block_length: int) -> None:
    ids = list(range(10, 22))
    before = oracle.logits(checkpoint, ids, block_length)
    for changed in range(len(ids)):
        other = [*ids[:changed], 50, *ids[changed + 1 :]]
        difference = np.abs(oracle.logits(checkpoint, other, block_length) - before).max(axis=1)
        start = changed // block_length * block_length
        assert (difference[:start] == 0).all()
        assert (difference[start:] > 1e-3).all()


def test_blocks_of_one_token_are_the_plain_causal_model(checkpoint: Path) -> None:
    with torch.no_grad():
        plain = oracle.load(checkpoint)(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(oracle.logits(checkpoint, PROMPT, 1), plain, atol=1e-5)
    assert np.abs(oracle.logits(checkpoint, PROMPT, 2) - plain).max() > 1e-2


@pytest.mark.parametrize(
    "rope_scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_the_rope_of_the_checkpoint_is_used(checkpoint: Path, tmp_path: Path, rope_scaling: dict) -> None:
    scaled = write(tmp_path, rope_scaling=rope_scaling)
    assert oracle.load(scaled).model.rotary_emb.rope_type == rope_scaling["rope_type"]
    assert np.abs(oracle.logits(scaled, PROMPT, 4) - oracle.logits(checkpoint, PROMPT, 4)).max() > 1e-2


def test_loading_keeps_every_weight(tmp_path: Path) -> None:
    directory = write(tmp_path, tie_word_embeddings=True, attention_bias=True)
    state = oracle.load(directory).state_dict()
    saved = oracle.load_file(directory / "model.safetensors")
    assert set(state) - set(saved) == {"lm_head.weight"}
    assert "model.layers.1.self_attn.o_proj.bias" in saved
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    assert torch.equal(state["lm_head.weight"], saved["model.embed_tokens.weight"])


# The procedure


def test_propose_leaves_the_mask_token_out() -> None:
    rows = np.array([[1.0, 9.0, 2.0, 1.0], [0.0, 9.0, 0.0, 0.0]], np.float32)
    ids, confidence, entropy = oracle.propose(rows, 1)
    e = np.exp(1.0)
    assert ids.tolist() == [2, 0]
    np.testing.assert_allclose(confidence, [e / (e + 2), 1 / 3])
    p = np.array([1, e, 1]) / (e + 2)
    np.testing.assert_allclose(entropy, [-(p * np.log(p)).sum(), np.log(3)])


def test_one_step_fixes_a_whole_block_from_one_pass(checkpoint: Path) -> None:
    x = list(PROMPT)
    for masks in (1, 4, 4):  # the prompt leaves one position in its last block
        rows = oracle.logits(checkpoint, x + [MASK] * masks, 4)[-masks:].copy()
        rows[:, MASK] = -np.inf
        x += rows.argmax(axis=1).tolist()
    assert generate(checkpoint, denoising_steps=1) == x[len(PROMPT) :]


def test_blocks_of_one_token_are_decoded_left_to_right(checkpoint: Path) -> None:
    x = list(PROMPT)
    for _ in range(5):
        row = oracle.logits(checkpoint, [*x, MASK], 1)[-1].copy()
        row[MASK] = -np.inf
        x.append(int(row.argmax()))
    assert generate(checkpoint, block_length=1, denoising_steps=1, max_new_tokens=5) == x[len(PROMPT) :]


def test_sequential_fixes_one_after_another(checkpoint: Path) -> None:
    x = list(PROMPT[:4])
    for masks in (4, 3, 2, 1):
        row = oracle.logits(checkpoint, x + [MASK] * masks, 4)[-masks].copy()
        row[MASK] = -np.inf
        x.append(int(row.argmax()))
    assert generate(checkpoint, PROMPT[:4], remasking="sequential", max_new_tokens=4) == x[4:]


def test_thresholds_at_their_ends_are_other_strategies(checkpoint: Path) -> None:
    at_once = generate(checkpoint, denoising_steps=1)
    static = generate(checkpoint)
    assert at_once != static
    assert generate(checkpoint, remasking="low_confidence_dynamic", confidence_threshold=0.0) == at_once
    assert generate(checkpoint, remasking="low_confidence_dynamic", confidence_threshold=1.0) == static
    assert generate(checkpoint, remasking="entropy_bounded", eb_threshold=np.inf) == at_once


@pytest.mark.parametrize(
    ("steps", "passes"),
    [(4, [8, 12, 12, 12, 12]), (2, [8, 12, 12]), (3, [8, 12, 12, 12]), (9, [8, 12, 12, 12, 12])],
)
def test_passes_reach_to_the_end_of_the_block(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, steps: int, passes: list[int]
) -> None:
    lengths = count_passes(monkeypatch)
    generate(checkpoint, denoising_steps=steps, max_new_tokens=5)
    assert lengths == passes


def test_the_last_step_fixes_what_is_left(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = count_passes(monkeypatch)
    options = {"remasking": "entropy_bounded", "eb_threshold": 0.0, "max_new_tokens": 8}
    assert MASK not in generate(checkpoint, PROMPT[:4], denoising_steps=2, **options)
    assert lengths == [8, 8, 12, 12]


@pytest.mark.parametrize("prompt", [PROMPT[:2], PROMPT[:4], PROMPT])
@pytest.mark.parametrize("max_new_tokens", [1, 4, 6])
def test_as_many_tokens_as_asked_for(checkpoint: Path, prompt: list[int], max_new_tokens: int) -> None:
    new = generate(checkpoint, prompt, max_new_tokens=max_new_tokens)
    assert len(new) == max_new_tokens
    assert new == generate(checkpoint, prompt, max_new_tokens=12)[:max_new_tokens]


def test_a_stop_token_ends_it_with_its_block(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = generate(checkpoint, max_new_tokens=13)
    stop = free[3]
    lengths = count_passes(monkeypatch)
    assert generate(checkpoint, max_new_tokens=13, stop_token_ids=[stop]) == free[: free.index(stop) + 1]
    assert max(lengths) < len(PROMPT) + 13
    assert generate(checkpoint, max_new_tokens=13, stop_token_ids=[PROMPT[0]]) == free


def test_the_mask_token_is_never_predicted(tmp_path: Path) -> None:
    tied = write(tmp_path, tie_word_embeddings=True)
    favoured = [m for m in range(64) if oracle.logits(tied, [*PROMPT, m], 4)[-1].argmax() == m]
    assert favoured  # as masks, these would be predicted if they could be
    assert all(m not in generate(tied, mask_token_id=m) for m in favoured[:3])
