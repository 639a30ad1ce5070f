"""What a user calls: load, generate, stream, their results, and every mistake that has an error."""

import functools
import itertools
import json
import math
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import losart
import losart.backends
from losart import (
    CheckpointError,
    ConfigError,
    DeviceError,
    NumericalError,
    OptionError,
    PromptError,
    TensorError,
)

PROMPT = "Why is the sky blue? "
IDS = [5, 6, 7, 8, 9, 10, 11]


@pytest.fixture(scope="module")
def model(tiny_checkpoint_module):
    return losart.load(tiny_checkpoint_module)


@pytest.fixture(scope="module")
def tiny_checkpoint_module(tmp_path_factory):
    from losart.measure.random_checkpoint import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("model"))


# ---- what generate and stream give


def test_generate_from_a_path_is_generate_from_a_model(model, tiny_checkpoint_module):
    once = losart.generate(tiny_checkpoint_module, PROMPT, max_new_tokens=12, attention="losa")
    assert once.token_ids == model.generate(PROMPT, max_new_tokens=12, attention="losa").token_ids
    assert losart.generate(model, PROMPT, max_new_tokens=12).text == str(
        model.generate(PROMPT, max_new_tokens=12)
    )


def test_text_is_that_of_the_tokens(model):
    result = model.generate(PROMPT, max_new_tokens=30, stop_token_ids=[])
    assert len(result.token_ids) == 30
    assert result.finish_reason == "length"
    assert result.text == str(result) == model.tokenizer.decode(result.token_ids)


def test_prompts_of_each_kind(model):
    ids = model.tokenizer.encode(PROMPT)
    expected = model.generate(PROMPT, max_new_tokens=9).token_ids
    assert model.generate(ids, max_new_tokens=9).token_ids == expected
    assert model.generate(tuple(ids), max_new_tokens=9).token_ids == expected
    assert model.generate(np.array(ids), max_new_tokens=9).token_ids == expected
    messages = [{"role": "user", "content": PROMPT}]
    rendered = model.tokenizer.encode(model.chat_template.render(messages), special=False)
    assert (
        model.generate(messages, max_new_tokens=9).token_ids
        == model.generate(rendered, max_new_tokens=9).token_ids
    )


def test_a_list_of_prompts_gives_a_list_of_results(model):
    prompts = [PROMPT, IDS, [{"role": "user", "content": PROMPT}]]
    together = model.generate(prompts, max_new_tokens=6)
    assert [result.token_ids for result in together] == [
        model.generate(prompt, max_new_tokens=6).token_ids for prompt in prompts
    ]


@pytest.mark.parametrize("attention", ["dense", "losa", "quest"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_keys_and_values_in_8_bits(tiny_checkpoint_module, kv, dtype, attention):
    """A list, a session and a stream give what each prompt gives alone, and hold less."""
    model = losart.load(tiny_checkpoint_module, "cpu", dtype, deterministic=True, kv=kv)
    plain = losart.load(tiny_checkpoint_module, "cpu", dtype, deterministic=True)
    assert (model.dtype, model.kv, plain.kv) == (dtype, kv, dtype)
    options = {"max_new_tokens": 10, "stop_token_ids": [], "attention": attention, "budget": 32}
    document = np.random.default_rng(5).integers(0, 256, 400).tolist()
    prompts = [document + IDS, IDS, document[:90]]
    alone = [model.generate(prompt, **options) for prompt in prompts]
    together = model.generate(prompts, **options)
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    session = model.session(**options)
    session.generate(document)
    found = session.generate(prompts[0])
    assert found.token_ids == alone[0].token_ids and found.stats.reused_tokens == 400
    *_, last = model.stream(prompts[0], **options)
    assert last.result.token_ids == alone[0].token_ids
    assert alone[0].stats.kv_bytes < plain.generate(prompts[0], **options).stats.kv_bytes


@pytest.mark.parametrize("attention", ["dense", "losa", "quest", "sparsed"])
def test_stats(model, attention):
    prompt = list(range(1, 203))
    stats = model.generate(
        prompt,
        max_new_tokens=15,
        block_length=4,
        remasking="sequential",
        stop_token_ids=[],
        attention=attention,
        budget=32,
        active=1,
    ).stats
    assert (stats.prompt_tokens, stats.new_tokens) == (202, 15)
    # 202 = 50 blocks of 4 and 2: blocks with 2, 4, 4, 4 and 1 new tokens, one token a pass.
    assert (stats.denoising_passes, stats.commit_passes) == (15, 4)
    assert stats.rides == (0 if attention == "quest" else 4)
    assert stats.forward_passes == 19 - stats.rides
    assert stats.prefill_seconds > 0
    assert stats.tokens_per_second == pytest.approx(15 / stats.decode_seconds)
    if attention == "dense":
        assert (stats.density, stats.sparse_density, stats.active_fraction) == (1.0, None, None)
    else:
        assert 0 < stats.sparse_density < stats.density < 1
        assert stats.active_fraction == (0.25 if attention == "losa" else 1.0)


def test_stream_tells_the_same_story_as_generate(model):
    options = {"max_new_tokens": 22, "block_length": 8, "remasking": "low_confidence_static"}
    steps = list(model.stream(IDS, stop_token_ids=[], **options))
    result = model.generate(IDS, stop_token_ids=[], **options)
    assert [step.result for step in steps[:-1]] == [None] * (len(steps) - 1)
    assert steps[-1].result.token_ids == result.token_ids
    assert steps[-1].text == result.text
    assert len(steps) == result.stats.denoising_passes
    sequence = dict(enumerate(IDS))
    for step in steps:
        assert step.positions == sorted(step.positions)
        for place in step.positions:
            assert step.block_start + place not in sequence
            sequence[step.block_start + place] = step.block[place]
        assert [place for place, token in enumerate(step.block) if token is None] == [
            place for place in range(8) if step.block_start + place not in sequence
        ]
    assert [sequence[position] for position in range(7, 7 + 22)] == result.token_ids
    for earlier, later in itertools.pairwise(steps):
        assert later.text.startswith(earlier.text)


def test_stop_tokens_and_strings(model):
    free = model.generate(IDS, max_new_tokens=40, stop_token_ids=[])
    token = free.token_ids[17]
    first = free.token_ids.index(token)
    stopped = model.generate(IDS, max_new_tokens=40, stop_token_ids=[token])
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: first + 1]

    text = next(text for text in (free.text[i : i + 2] for i in range(9, 30)) if "\ufffd" not in text)
    stopped = model.generate(IDS, max_new_tokens=40, stop_token_ids=[], stop=text)
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(text)]
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]


def test_the_checkpoint_says_block_length_mask_and_end_tokens(make_checkpoint):
    model = losart.load(make_checkpoint(block_length=8))
    steps = list(model.stream(IDS, max_new_tokens=4, stop_token_ids=[]))
    assert len(steps[0].block) == 8
    assert model.config.mask_token_id == model.tokenizer.token_to_id("<|MASK|>")
    assert set(model.config.end_token_ids) >= {model.tokenizer.token_to_id("<|im_end|>")}
    assert len(next(model.stream(IDS, max_new_tokens=4, block_length=5)).block) == 5


def test_positions_of_the_model_limit_new_tokens(make_checkpoint):
    model = losart.load(make_checkpoint(max_positions=64))
    result = model.generate(IDS * 8, max_new_tokens=100, stop_token_ids=[])
    assert (len(result.token_ids), result.finish_reason) == (8, "length")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_auto_is_the_checkpoint_s(make_checkpoint, dtype):
    path = make_checkpoint(dtype=dtype)
    assert losart.load(path).dtype == dtype
    assert losart.load(path, dtype="float32").dtype == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_auto_is_that_of_the_tensors_where_the_configuration_is_silent(make_checkpoint, dtype):
    path = make_checkpoint(dtype=dtype, extra_config={"torch_dtype": None})
    assert losart.load(path, device="cpu").dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kv_auto_is_the_dtype(make_checkpoint, dtype):
    path = make_checkpoint(dtype=dtype)
    assert losart.load(path, "cpu").kv == dtype
    assert losart.load(path, "cpu", "float16").kv == "float16"
    held = losart.load(path, "cpu", kv="int8")
    assert (held.dtype, held.kv, held.weights) == (dtype, "int8", (dtype,))


def test_activations_in_fp8_are_a_gpus(make_checkpoint):
    path = make_checkpoint(dtype="bfloat16")
    plain, asked = losart.load(path, "cpu"), losart.load(path, "cpu", activations="fp8")
    assert asked.activations == plain.activations == "bfloat16"
    expected = plain.generate(PROMPT, max_new_tokens=4).token_ids
    assert asked.generate(PROMPT, max_new_tokens=4).token_ids == expected
    with pytest.raises(OptionError, match="activations must be auto or fp8, not 'int8'"):
        losart.load(path, "cpu", activations="int8")
    with pytest.raises(OptionError, match="does not go with deterministic"):
        losart.load(path, "cpu", activations="fp8", deterministic=True)


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_weights_take_what_their_tensors_have(make_checkpoint, dtype, itemsize):
    path = make_checkpoint(dtype=dtype)
    model = losart.load(path, "cpu")
    with safe_open(path / "model.safetensors", "np") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    numbers = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    assert model.matrix_bytes == {dtype: numbers * itemsize}
    rounded = losart.load(path, "cpu", weights="int8")
    assert rounded.weights == tuple(rounded.matrix_bytes) and "int8" in rounded.weights
    assert 0 < rounded.matrix_bytes["int8"] < sum(rounded.matrix_bytes.values())


def test_an_engine_says_in_what_its_model_is_held(make_checkpoint):
    model = losart.load(make_checkpoint(), "cpu", weights="int8", kv="fp8")
    stats = losart.Engine(model).stats
    assert stats.kv == model.kv == "fp8"
    assert stats.matrix_bytes == model.matrix_bytes and tuple(stats.matrix_bytes) == model.weights


def test_generate_from_a_path_takes_kv(make_checkpoint):
    path = make_checkpoint()
    for kv in ("auto", "int8"):
        expected = losart.load(path, kv=kv).generate(PROMPT, max_new_tokens=4)
        assert losart.generate(path, PROMPT, kv=kv, max_new_tokens=4).token_ids == expected.token_ids
        assert expected.stats.kv_bytes > 0
    with pytest.raises(OptionError, match="kv must be"):
        losart.generate(path, PROMPT, kv="float8")


def test_same_seed_same_output(model):
    options = {"max_new_tokens": 24, "temperature": 1.2, "top_p": 0.95, "stop_token_ids": []}
    first, again, other = (model.generate(IDS, seed=seed, **options).token_ids for seed in (1, 1, 2))
    assert first == again != other


def test_threads_share_a_model(model):
    options = {"max_new_tokens": 24, "attention": "losa", "budget": 32, "active": 2, "stop_token_ids": []}
    prompts = [range_of(n) for n in (5, 130, 77, 250)]
    alone = [model.generate(prompt, **options).token_ids for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = pool.map(lambda prompt: model.generate(prompt, **options).token_ids, prompts)
        assert list(together) == alone


def test_streams_may_take_turns(model):
    options = {"max_new_tokens": 12, "attention": "losa", "budget": 16, "active": 2, "stop_token_ids": []}
    prompts = [range_of(50), IDS]
    streams = [model.stream(prompt, **options) for prompt in prompts]
    results = [None, None]
    for steps in itertools.zip_longest(*streams):
        for i, step in enumerate(steps):
            results[i] = step.result if step is not None else results[i]
    expected = [model.generate(prompt, **options).token_ids for prompt in prompts]
    assert [result.token_ids for result in results] == expected


def test_huge_numbers_are_no_trouble(model):
    huge = {"budget": 10**30, "denoising_steps": 10**12, "top_k": 10**30, "max_new_tokens": 10**30}
    prompt = range_of(200) * 20
    result = model.generate(prompt, attention="quest", active=10**30, dense_layers=1, seed=10**30, **huge)
    dense = model.generate(prompt, max_new_tokens=96)
    assert result.token_ids == dense.token_ids


def test_options_may_be_numpy_s(model):
    plain = {"max_new_tokens": 6, "temperature": 0.5, "stop_token_ids": [3, 4], "seed": 1, "active": 0.5}
    scalars = {"max_new_tokens": np.int64(6), "temperature": np.float32(0.5), "seed": np.uint8(1)}
    expected = model.generate(IDS, attention="losa", **plain).token_ids
    for ids in (np.array([3, 4]), [np.int64(3), 4], (np.int32(3), np.int32(4)), {np.int64(3), 4}):
        options = plain | scalars | {"stop_token_ids": ids, "active": np.float32(0.5)}
        assert model.generate(IDS, attention="losa", **options).token_ids == expected
    assert len(model.generate(IDS, max_new_tokens=np.array(6), stop_token_ids=np.array([])).token_ids) == 6


def test_a_block_of_all_positions(make_checkpoint):
    model = losart.load(make_checkpoint(max_positions=24), device="cpu")
    assert len(model.generate(IDS, max_new_tokens=4, block_length=24, stop_token_ids=[]).token_ids) == 4
    with pytest.raises(OptionError, match=r"block_length \(25\) .* max_positions \(24\)"):
        model.stream(IDS, block_length=25)


def test_prefill_reports_progress(model):
    seen = []
    model.generate(
        [7] * 1501, max_new_tokens=1, block_length=4, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(512, 1500), (1024, 1500), (1500, 1500)]


# ---- mistakes


def test_a_missing_directory_or_file(tmp_path, make_checkpoint):
    with pytest.raises(CheckpointError, match="no-such"):
        losart.load(tmp_path / "no-such")
    path = make_checkpoint()
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        losart.load(path)
    assert isinstance(caught.value, OSError)


@pytest.mark.parametrize("path", [0, 5.0, b"/tmp", [], object()])
def test_what_names_no_checkpoint(path):
    with pytest.raises(CheckpointError, match="a string or a path, not"):
        losart.load(path)


def test_an_unsupported_model_lists_the_supported(make_checkpoint):
    path = make_checkpoint(extra_config={"model_type": "qwen3"})
    with pytest.raises(ConfigError, match=r"qwen3.*sdar"):
        losart.load(path)


def test_an_unsupported_head_dim(make_checkpoint):
    with pytest.raises(ConfigError, match=r"head_dim must be a multiple of 16 .*24"):
        losart.load(make_checkpoint(head_dim=24), device="cpu")


def test_unknown_names_of_device_dtype_and_kv(make_checkpoint):
    path = make_checkpoint()
    with pytest.raises(OptionError, match="device"):
        losart.load(path, device="tpu")
    with pytest.raises(OptionError, match="dtype"):
        losart.load(path, dtype="int8")
    for kv in ("int4", "bfloat16", "", None):
        with pytest.raises(OptionError, match=f"kv must be auto, int8, fp8, not {kv!r}"):
            losart.load(path, kv=kv)


def test_without_cuda_auto_says_so_and_takes_the_cpu(make_checkpoint, monkeypatch):
    path = make_checkpoint()
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if it were not installed
    with pytest.raises(DeviceError, match=r"losart\[cuda12x\]") as caught:
        losart.load(path, device="cuda")
    assert isinstance(caught.value, RuntimeError)
    monkeypatch.setattr(losart.backends, "has_nvidia_device", lambda: True)
    with pytest.warns(UserWarning, match=r"running on the CPU.*losart\[cuda12x\]"):
        assert losart.load(path).device == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert losart.load(path, device="cpu").device == "cpu"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("block_length", 0),
        ("denoising_steps", -1),
        ("remasking", "random"),
        ("remasking", []),
        ("confidence_threshold", 1.5),
        ("eb_threshold", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        *(
            pytest.param(option, 10**400, id=f"{option}-10**400")
            for option in ("temperature", "confidence_threshold", "eb_threshold", "top_p")
        ),
        ("max_new_tokens", np.float64(4)),
        ("max_new_tokens", np.bool_(True)),
        ("stop_token_ids", np.array(["x"])),
        ("stop_token_ids", np.array([[3]])),
        ("top_k", -1),
        ("top_p", 0.0),
        ("seed", -1),
        ("stop", [""]),
        ("stop", 3),
        ("stop_token_ids", [10**6]),
        ("stop_token_ids", ["x"]),
        ("mask_token_id", 10**6),
        ("attention", "sparse"),
        ("attention", 3),
        ("budget", 0),
        ("active", -1),
        ("active", 1.5),
        ("active", True),
        ("page_size", 8),
        ("page_size", 65552),
        ("page_size", 2**31),
        ("page_size", 2**66),
        ("dense_layers", -1),
        ("first_pass", "never"),
        ("commit", "never"),
        ("selector", "mage"),
        ("selector", True),
        ("drift", "first"),
        ("drift", ["refresh"]),
        ("active", "few"),
        ("change_threshold", -0.1),
        ("change_threshold", float("nan")),
        ("change_threshold", "0.2"),
        ("candidates", "fixed"),
        ("candidates", 3),
    ],
)
def test_an_option_out_of_range_is_named(model, option, value):
    with pytest.raises(OptionError, match=option) as caught:
        model.stream(IDS, **{option: value})
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("selector", "'auto' or 'both' or 'quest' or 'anchor'"),
        ("drift", "'auto' or 'previous' or 'refresh'"),
        ("candidates", "'all' or 'masked'"),
        ("first_pass", "'auto' or 'dense' or 'sparse'"),
        ("commit", "'dense' or 'sparse'"),
    ],
)
def test_a_choice_that_is_none_lists_the_choices(model, option, choices):
    with pytest.raises(OptionError, match=f"^{option} must be {choices}, not 'x'$"):
        model.stream(IDS, **{option: "x"})


def test_an_unknown_option_gets_a_suggestion(model):
    for generate in (model.generate, functools.partial(losart.generate, model)):
        with pytest.raises(OptionError, match="did you mean 'temperature'"):
            generate(IDS, temprature=0.5)


@pytest.mark.parametrize("prompt", ["", [], (), np.array([], np.int64)])
def test_an_empty_prompt(model, prompt):
    with pytest.raises(PromptError, match="empty"):
        model.generate(prompt)


@pytest.mark.parametrize(
    "prompt", [None, 3, np.array(3), {"role": "user"}, [1.5], [True], [1, "x"], object()]
)
def test_what_is_no_prompt(model, prompt):
    with pytest.raises(PromptError):
        model.generate(prompt)


@pytest.mark.parametrize("token", [-1, 320, 10**9])
def test_a_token_outside_the_vocabulary(model, token):
    with pytest.raises(PromptError, match=f"token id {token} at place 2"):
        model.generate([1, 2, token])


def test_a_prompt_longer_than_the_positions(model):
    with pytest.raises(PromptError, match="4096"):
        model.generate([1] * 4096)


def test_text_without_a_tokenizer_and_chat_without_a_template(make_checkpoint):
    path = make_checkpoint(tokenizer=False)
    model = losart.load(path)
    assert len(model.generate(IDS, max_new_tokens=4, stop_token_ids=[]).token_ids) == 4
    for prompt in ("text", [{"role": "user", "content": "text"}]):
        with pytest.raises(PromptError, match="tokenizer"):
            model.generate(prompt)
    with pytest.raises(OptionError, match="stop"):
        model.generate(IDS, stop="x")

    path = make_checkpoint("without-template")
    keys = json.loads((path / "tokenizer_config.json").read_text())
    keys.pop("chat_template")
    (path / "tokenizer_config.json").write_text(json.dumps(keys))
    (path / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(PromptError, match="template"):
        losart.load(path).generate([{"role": "user", "content": "text"}])


def with_tensor(path, name, change):
    """Rewrite one tensor of a checkpoint of one file."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name].copy())
    save_file(tensors, file)
    return path


def test_a_tensor_of_the_wrong_shape_is_named(make_checkpoint):
    path = with_tensor(make_checkpoint(), "model.norm.weight", lambda tensor: tensor[:-1])
    with pytest.raises(TensorError, match=r"model\.norm\.weight.*31.*32") as caught:
        losart.load(path)
    assert isinstance(caught.value, ValueError)


def spoil_row(row, value):
    def change(tensor):
        tensor[row] = value
        return tensor

    return change


LAYER = "model.layers.0."


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("tensor", "row"),
    [
        # Token 3 stands in the prefilled part of the prompt only: its keys and values are spoilt.
        ("model.embed_tokens.weight", 3),
        (LAYER + "self_attn.k_proj.weight", 0),
        (LAYER + "self_attn.v_proj.weight", 0),
        (LAYER + "self_attn.q_norm.weight", 0),
        (LAYER + "mlp.down_proj.weight", 0),
        ("model.norm.weight", 0),
        ("lm_head.weight", 7),
    ],
)
@pytest.mark.parametrize("attention", ["dense", "losa", "quest", "sparsed"])
def test_weights_that_are_no_numbers_never_give_an_answer(make_checkpoint, tensor, row, value, attention):
    path = with_tensor(make_checkpoint(), tensor, spoil_row(row, value))
    model = losart.load(path, device="cpu")
    with pytest.raises(NumericalError, match="not finite"):
        model.generate([3, *range(20, 60)], max_new_tokens=40, attention=attention, stop_token_ids=[])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("place", [384, 391, 399])
@pytest.mark.parametrize("attention", ["dense", "losa", "quest", "sparsed"])
def test_a_bad_token_in_a_page_that_would_not_be_selected_shows(make_checkpoint, place, attention):
    """Its page is one of 25, of which a query reads one; where it does not open the page, too."""
    path = with_tensor(make_checkpoint(), "model.embed_tokens.weight", spoil_row(3, np.nan))
    prompt = np.random.default_rng(0).integers(4, 256, 400)
    options = {"max_new_tokens": 4, "attention": attention, "budget": 16, "stop_token_ids": []}
    model = losart.load(path, device="cpu")
    assert len(model.generate(prompt, **options).token_ids) == 4
    prompt[place] = 3
    with pytest.raises(NumericalError, match="not finite"):
        model.generate(prompt, **options)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("tensor", "factor", "dtype"),
    [
        (LAYER + "mlp.down_proj.weight", 1e6, "float16"),
        (LAYER + "self_attn.k_norm.weight", 1e5, "float16"),
        (LAYER + "self_attn.k_norm.weight", -1e5, "float16"),
        (LAYER + "self_attn.v_proj.weight", 4e4, "float16"),
        # Squares that overflow: the norm of finite values would be zero.
        ("model.embed_tokens.weight", 1e20, "float32"),
        (LAYER + "mlp.down_proj.weight", 1e20, "float32"),
        (LAYER + "mlp.down_proj.weight", 1e20, "bfloat16"),
    ],
)
def test_overflow_is_an_error(make_checkpoint, tensor, factor, dtype):
    path = with_tensor(make_checkpoint(), tensor, lambda values: values * np.float32(factor))
    with pytest.raises(NumericalError, match="overflow"):
        losart.load(path, device="cpu", dtype=dtype).generate(
            range_of(40), max_new_tokens=4, stop_token_ids=[]
        )


def range_of(tokens):
    return list(range(20, 20 + tokens))
