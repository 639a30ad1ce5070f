"""The CUDA backend against the CPU backend: whole models, and what a generation does to the device."""

import numpy as np
import pytest

import losart
from losart.attention import make_policy
from losart.attention.base import PassKind
from losart.backends.base import PassInputs
from losart.options import AttentionConfig, generation_config

pytestmark = pytest.mark.gpu

PROMPT = np.random.default_rng(0).integers(0, 300, 611).tolist()


def hidden_states(model, prompt, block_length):
    """Prefill the prompt's whole blocks; final hidden states of a block after it, as NumPy."""
    transformer = model._transformer
    cache = transformer.backend.new_cache(16)
    whole = len(prompt) // block_length * block_length
    for start in range(0, whole, 4 * block_length):
        transformer.prefill(
            np.array(prompt[start : min(whole, start + 4 * block_length)]), cache, block_length
        )
    policy = make_policy(AttentionConfig(), model.config, block_length)
    policy.begin_pass(PassKind.FIRST, cache.length)
    inputs = PassInputs(np.arange(block_length) + 1, np.arange(block_length), np.zeros(block_length))
    seen = []

    def propose(hidden, inputs, head, config):
        seen.append(transformer.backend.linear(hidden, head))
        return original(hidden, inputs, head, config)

    original, transformer.backend.propose = transformer.backend.propose, propose
    try:
        config = generation_config(model.config, {"block_length": block_length})
        transformer.denoise(inputs, cache, policy, config)
    finally:
        transformer.backend.propose = original
    return seen[0] if isinstance(seen[0], np.ndarray) else seen[0].get()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2), ("float16", 2e-2)])
@pytest.mark.parametrize("block_length", [1, 4, 5, 16, 32])
@pytest.mark.parametrize("head_dim", [48, 64, 128])
def test_logits_are_those_of_the_cpu(make_checkpoint, dtype, tolerance, block_length, bias, head_dim):
    path = make_checkpoint(
        dtype=dtype,
        bias=bias,
        hidden_size=192,
        intermediate_size=320,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=head_dim,
    )
    expected = hidden_states(losart.load(path, device="cpu"), PROMPT, block_length)
    found = hidden_states(losart.load(path, device="cuda"), PROMPT, block_length)
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "options",
    [
        {"block_length": 1},
        {"block_length": 4, "remasking": "low_confidence_static", "denoising_steps": 2},
        {"block_length": 16, "remasking": "entropy_bounded"},
        {"block_length": 16, "remasking": "sequential"},
        {"block_length": 32, "confidence_threshold": 0.2},
    ],
)
@pytest.mark.parametrize("length", [3, 64, 611])
def test_greedy_tokens_are_those_of_the_cpu(tiny_checkpoint, options, length):
    prompt = PROMPT[:length]
    cpu, cuda = (losart.load(tiny_checkpoint, device=device) for device in ("cpu", "cuda"))
    options = {"max_new_tokens": 70, "stop_token_ids": [], **options}
    expected = cpu.generate(prompt, **options).token_ids
    for _ in range(2):  # the second replays what the first captured
        found = cuda.generate(prompt, **options)
        assert found.token_ids == expected
    assert found.stats.density == (1.0 if length > 3 or found.stats.commit_passes else None)


@pytest.mark.parametrize("options", [{"top_k": 7}, {"top_p": 0.6}, {"top_k": 40, "top_p": 0.8}, {}])
def test_samples_are_those_of_the_cpu(tiny_checkpoint, options):
    options = {"temperature": 1.3, "seed": 5, "max_new_tokens": 64, "stop_token_ids": [], **options}
    cpu, cuda = (losart.load(tiny_checkpoint, device=device) for device in ("cpu", "cuda"))
    assert cuda.generate(PROMPT, **options).token_ids == cpu.generate(PROMPT, **options).token_ids


def test_two_generations_on_one_model_do_not_disturb_each_other(tiny_checkpoint):
    model = losart.load(tiny_checkpoint, device="cuda")
    options = {"max_new_tokens": 40, "stop_token_ids": [], "block_length": 8}
    expected = [model.generate(prompt, **options).token_ids for prompt in (PROMPT, PROMPT[100:])]
    streams = [model.stream(prompt, **options) for prompt in (PROMPT, PROMPT[100:])]
    results = [None, None]
    while None in results:
        for i, stream in enumerate(streams):
            step = next(stream, None)
            if step is not None and step.result is not None:
                results[i] = step.result.token_ids
    assert results == expected


def test_nan_is_an_error(make_checkpoint):
    from safetensors.numpy import load_file, save_file

    path = make_checkpoint()
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"] = np.full_like(
        tensors["model.layers.0.self_attn.v_proj.weight"], np.nan
    )
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(losart.NumericalError):
        losart.load(path, device="cuda").generate([1, 2, 3], max_new_tokens=4)
