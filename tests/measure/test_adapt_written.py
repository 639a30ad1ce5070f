"""What adaptation writes: losart's logits and answers are those of the model that was trained."""

import inspect
import json
from functools import partial

import numpy as np
import pytest

import losart

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="training needs torch")

import small_base as small  # noqa: E402
from adapt import adapter_directory  # noqa: E402
from adapt.block_decoding import Decoding, decode  # noqa: E402
from adapt.card import write_card  # noqa: E402
from adapt.checkpoint_directory import write_checkpoint  # noqa: E402
from adapt.decoder import forward, logits  # noqa: E402
from adapt.family import family_of  # noqa: E402
from adapt.low_rank import added, products  # noqa: E402
from kept_logits import kept_logits  # noqa: E402

from losart.errors import OptionError  # noqa: E402

WRITTEN = [
    ("llama", True, "Fast_dLLM_Qwen", {}),
    ("llama", True, "Fast_dLLM_Qwen", {"tie_word_embeddings": False}),
    ("qwen2", True, "Fast_dLLM_Qwen", {}),
    ("llama", False, "stable_diffcoder", {}),
    ("qwen3", False, "sdar", {}),
]
FIXED = {"remasking": "low_confidence_dynamic", "confidence_threshold": 0.3, "max_new_tokens": 24}


def changed(base, seed=2):
    """A base's weights, each a little other, and a mask vector."""
    generator = torch.Generator().manual_seed(seed)
    weights = base.weights()
    for kind, value in weights.items():
        if kind not in ("embed", "head"):
            weights[kind] = value + 0.1 * value.std() * torch.randn(value.shape, generator=generator)
    return weights | {"mask": torch.randn(base.shape.hidden, generator=generator)}


def block_causal(tokens, block):
    places = torch.arange(tokens)
    return (places // block <= places[:, None] // block)[None, None]


@pytest.mark.parametrize("kind, shifted, family, keys", WRITTEN)
def test_losart_computes_what_was_trained(tmp_path, kind, shifted, family, keys):
    base = small.small_base(tmp_path / "base", kind, **keys)
    found, weights = family_of(kind, shifted), small.rounded(changed(base))
    assert found.name == family
    write_checkpoint(tmp_path / "written", base, weights, found, 8, small.MASK_ID, 0.7)
    model = losart.load(tmp_path / "written", device="cpu", dtype="float32")
    config = model.config
    assert (config.model_type, config.block_length) == (family, 8) and small.END_ID in config.end_token_ids
    assert (config.mask_token_id, config.decoding.shifted) == (small.MASK_ID, shifted)
    assert dict(config.decoding.defaults)["confidence_threshold"] == 0.7
    options = FIXED | ({"sub_block_length": 8} if shifted else {})
    prompts = [np.random.default_rng(n).integers(10, 90, n).tolist() for n in (5, 16, 21)]
    how = Decoding(shifted, 8, small.MASK_ID, small.END_ID, 0.3)
    mine = decode(base.shape, weights, prompts, 24, how).answers
    with kept_logits(model._engine.runner) as seen:
        for prompt, answer in zip(prompts, mine, strict=True):
            seen.clear()
            given = model.generate(prompt, **options).token_ids
            end = (len(prompt) + 24) // 8 * 8 - len(prompt)  # Stable-DiffCoder's last block is a short one
            if small.END_ID in answer:
                end = min(end, answer.index(small.END_ID))
            assert list(given)[:end] == answer[:end]
            whole = [*prompt, *given]
            for start, ids, rows, _, values in seen:
                x = torch.tensor([whole[:start] + ids])
                places = torch.arange(x.shape[1])
                expected = forward(
                    base.shape, weights, x, places[None], block_causal(len(places), 8), mask_id=small.MASK_ID
                )
                expected = logits(base.shape, weights, expected)[0][start:][rows].numpy()
                expected[:, small.MASK_ID] = -np.inf
                np.testing.assert_allclose(values, expected, atol=5e-4, rtol=1e-4)
            assert seen


def test_transformers_loads_what_was_written(tmp_path):
    """The family's own code has Qwen2's layers: their logits under the same mask are those of training."""
    transformers = pytest.importorskip("transformers")
    import family_oracles

    base = small.small_base(tmp_path / "base")
    weights = small.rounded(changed(base))
    write_checkpoint(tmp_path / "written", base, weights, family_of("llama", True), 8, small.MASK_ID, 0.7)
    keys = json.loads((tmp_path / "written" / "config.json").read_text())
    keys["head_dim"] = keys["hidden_size"] // keys["num_attention_heads"]
    assert transformers and keys["architectures"] == ["Fast_dLLM_QwenForCausalLM"]
    model = partial(family_oracles.forward_of(family_oracles.load(tmp_path / "written")))
    ids = np.random.default_rng(0).integers(10, 90, 24).tolist() + 8 * [small.MASK_ID]
    mask = block_causal(32, 8)
    x = forward(base.shape, weights, torch.tensor([ids]), torch.arange(32)[None], mask, mask_id=small.MASK_ID)
    import oracle

    found = model(ids, oracle.block_causal_mask(32, 8))
    expected = logits(base.shape, weights, x)[0].numpy()
    kept = np.arange(expected.shape[1]) != small.MASK_ID
    np.testing.assert_allclose(np.asarray(found)[:, kept], expected[:, kept], atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("kind, shifted", [("qwen3", True), ("qwen2", False)])
def test_combinations_without_a_family_are_refused(kind, shifted):
    with pytest.raises(OptionError, match=f"no family has {kind}'s layers"):
        family_of(kind, shifted)


@pytest.mark.parametrize("kind, shifted", [("llama", True), ("llama", False), ("qwen3", False)])
def test_an_adapter_is_the_change(tmp_path, kind, shifted):
    base = small.small_base(tmp_path / "base", kind)
    original, weights = base.weights(), changed(base)
    weights |= added(original, products(original, weights, 4))
    size = 2 * 10**5
    found = products(original, weights, 4, adapter_directory.room_for_products(base.shape, size))
    family = family_of(kind, shifted)
    where = tmp_path / "adapter"
    adapter_directory.write_adapter(
        where, base, original, weights, found, family, 8, small.MASK_ID, 0.7, "some/base"
    )
    assert (where / adapter_directory.TENSORS).stat().st_size <= size
    read, name, block, mask = adapter_directory.read_adapter(where, base, original)
    assert (name, block, mask) == (family.name, 8, small.MASK_ID)
    ids = torch.tensor([[*range(10, 29), *[small.MASK_ID] * 5]])
    seen = block_causal(24, 8)
    rows = [
        logits(
            base.shape,
            one,
            forward(base.shape, one, ids, torch.arange(24)[None], seen, mask_id=small.MASK_ID),
        )
        for one in (weights, read)
    ]
    torch.testing.assert_close(rows[0], rows[1], atol=0.15, rtol=0.05)  # bfloat16
    assert (rows[0].argmax(-1) == rows[1].argmax(-1)).float().mean() > 0.9


@pytest.mark.skipif(
    "adapter" not in inspect.signature(losart.load).parameters, reason="losart cannot load adapters"
)
@pytest.mark.parametrize("kind, shifted", [("llama", True), ("llama", False), ("qwen3", False)])
def test_losart_adds_an_adapter_to_the_base(tmp_path, kind, shifted):
    base = small.small_base(tmp_path / "base", kind)
    original, weights = base.weights(), changed(base)
    found = products(original, weights, 4)
    adapter_directory.write_adapter(
        *(tmp_path / "adapter", base, original, weights, found, family_of(kind, shifted), 8),
        *(small.MASK_ID, 0.7, "some/base"),
    )
    model = losart.load(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu", dtype="float32")
    read = adapter_directory.read_adapter(tmp_path / "adapter", base, original)[0]
    prompt = list(range(10, 29))
    options = FIXED | ({"sub_block_length": 8} if shifted else {})
    given = list(model.generate(prompt, **options).token_ids)
    how = Decoding(shifted, 8, small.MASK_ID, small.END_ID, 0.3)
    (answer,) = decode(base.shape, read, [prompt], 24, how).answers
    end = min(21, answer.index(small.END_ID) if small.END_ID in answer else 21)
    assert given[:end] == answer[:end]


def test_the_ranks_of_a_small_adapter_differ(tmp_path):
    base = small.small_base(tmp_path / "base")
    original, weights = base.weights(), changed(base)
    found = products(original, weights, 16, adapter_directory.room_for_products(base.shape, 30_000))
    ranks = {a.shape[0] for of_kind in found.values() for a, _ in of_kind}
    assert len(ranks) > 1
    where = tmp_path / "adapter"
    adapter_directory.write_adapter(
        where, base, original, weights, found, family_of("llama", True), 8, small.MASK_ID, 0.7, "some/base"
    )
    assert (where / adapter_directory.TENSORS).stat().st_size <= 30_000
    config = json.loads((where / adapter_directory.CONFIG).read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] and config["r"] == config["lora_alpha"]


def test_biases_that_changed_are_refused(tmp_path):
    base = small.small_base(tmp_path / "base", "qwen2")
    with pytest.raises(OptionError, match="no place for the biases"):
        adapter_directory.write_adapter(
            *(tmp_path, base, base.weights(), changed(base), {}, family_of("qwen2", True), 8),
            *(small.MASK_ID, 0.7, "some/base"),
        )


def test_a_card_says_how(tmp_path):
    (tmp_path / "training.json").write_text(
        '{"plan": {"noise": {"shifted": true}, "lora": null}, "seconds": 9}'
    )
    (tmp_path / "figures.json").write_text(
        '{"cross_entropy": {"8": {"2": 0.5}}, "answers": [{"of": "block 8"}]}'
    )
    write_card(tmp_path, tmp_path, family_of("llama", True), "some/base", "apache-2.0", True, "")
    card = (tmp_path / "README.md").read_text()
    assert "base_model: some/base" in card and "0.500 with 2" in card and "| block 8 |" in card
