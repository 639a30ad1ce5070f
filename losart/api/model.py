"""A loaded model, and what a user calls on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from losart.api.scoring import Continuation, Score, score
from losart.api.session import Session
from losart.backends import make_backend
from losart.config.model import ModelConfig
from losart.config.options import generation_config
from losart.config.precision import Precision
from losart.engine.engine import HELD_PREFIXES, Engine
from losart.engine.kv_pool import KVPool
from losart.engine.stream import Stream
from losart.errors import OptionError, PromptError
from losart.loaders import ChatTemplate, Checkpoint, Tokenizer, open_checkpoint
from losart.loaders.tokenizer import Prompt, is_batch, prompt_ids
from losart.models.fingerprint import model_fingerprint
from losart.models.transformer import Transformer
from losart.observe.step import GenerationResult, Observer, Progress
from losart.quantization import loaded_tensors
from losart.structured.grammars import Grammars


class Model:
    """A checkpoint on a device. Made by :func:`losart.load`.

    Attributes
    ----------
    config : ModelConfig
    tokenizer : Tokenizer or None
    chat_template : ChatTemplate or None
    device : str
        "cpu" or "cuda".
    dtype : str
        In which weights are held that are not quantized.
    kv : str
        In which keys and values of the prefix are held: `dtype`, "int8" or "fp8".
    activations : str
        In which many tokens are multiplied by matrices that are held in float8: `dtype` or "fp8".
    weights : tuple of str
        In which formats matrices are held: `dtype`, "int4", "int8" and "float8", those that there are.
    matrix_bytes : dict of str to int
        What the matrices of each format take.
    adapter : Path or None
        The adapter that is merged into them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "auto",
        dtype: str = "auto",
        progress: Progress | None = None,
        deterministic: bool = False,
        weights: str = "auto",
        kv: str = "auto",
        merge: str = "dtype",
        activations: str = "auto",
    ) -> None:
        precision = Precision.chosen(dtype, kv, checkpoint.dtype, activations)
        if deterministic and precision.float8_activations:
            raise OptionError(
                "activations='fp8' does not go with deterministic=True: it rounds those of many tokens alone"
            )
        self.config: ModelConfig = checkpoint.config
        self.tokenizer: Tokenizer | None = checkpoint.tokenizer
        self.chat_template: ChatTemplate | None = checkpoint.chat_template
        self.adapter = None if checkpoint.adapter is None else checkpoint.adapter.path
        self.dtype = precision.weights.name
        self.kv = precision.kv.name
        backend = make_backend(device, self.config, precision, deterministic)
        self.device = backend.name
        self.activations = "fp8" if backend.float8_activations else self.dtype
        self._tensors = loaded_tensors(checkpoint, weights, backend.name, merge)
        runner = Transformer(self.config, self._tensors, backend, progress)
        self.matrix_bytes = runner.matrix_bytes
        self.weights = tuple(self.matrix_bytes)
        self._engine = Engine(runner)
        written = None if self.tokenizer is None else self.tokenizer.backend.to_str
        self._grammars = Grammars(self.config, written)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the configuration and of some bytes of each tensor: models of another one differ."""
        return model_fingerprint(self.config, self._tensors)

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        progress: Progress | None = None,
        observer: Observer | None = None,
        **options: Any,
    ) -> GenerationResult | list[GenerationResult]:
        """Generate from a prompt, or from each of a list of prompts.

        A checkpoint's family may have other defaults than these, and names of its own for some.

        Prompts of a list go through the model together where the device can, which is faster; each has the
        result that it has alone, to rounding. With an observer they come one after another.

        Parameters
        ----------
        prompt : str, list of dict, list of int, or a list of these
            Text; chat messages ({"role": ..., "content": ...}), rendered by the checkpoint's chat
            template; or token ids.
        progress : callable, optional
            Called during prefill with the prompt tokens done and in all.
        observer : callable, optional
            Called after each pass over a block with a `Step`: the block, and which tokens
            read which pages of the prefix in each layer. Costs nothing when left out.
        max_new_tokens : int, default 128
            New tokens at most; the model's positions limit them too.
        block_length : int
            Tokens of a block. Default: the checkpoint's, else 4.
        denoising_steps : int
            Passes over a block at most. Default: the block length.
        remasking : str, default "low_confidence_dynamic"
            What a pass fixes: "sequential", "low_confidence_static", "low_confidence_dynamic" or
            "entropy_bounded".
        confidence_threshold : float, default 0.85
            For "low_confidence_dynamic".
        reaches_threshold : bool, default False
            Whether a probability that is equal to the threshold suffices.
        sub_block_length : int, optional
            Tokens of a block all of which are fixed before those that follow. Default: all of it.
        editing_threshold : float, default 1.0
            Fixed tokens are changed where another is proposed with a probability above this; 1: never.
        max_post_steps : int, default 16
            Passes over a block without masks that may change tokens, at most.
        eb_threshold : float, default 0.35
            For "entropy_bounded", in nats.
        temperature : float, default 0.0
            0 is greedy.
        top_k : int, default 0
            Sample from this many most probable tokens; 0 from all.
        top_p : float, default 1.0
            Sample from the most probable tokens that reach this probability together.
        seed : int, optional
            Same seed, same output.
        json_schema : dict or str, optional
            The answer is JSON that this schema describes.
        regex : str, optional
            The answer matches this regular expression as a whole.
        grammar : str, optional
            The answer follows this Lark grammar. At most one of the three can be given.
        logprobs : int, optional
            Have each new token's log-probability in the result, and those of this many most probable tokens
            in its place, 0 to 20: see :class:`losart.TokenLogprob`.
        stop : str or list of str
            Ends the generation; the text is cut before it.
        stop_token_ids : list of int
            Ends the generation. Default: the checkpoint's end tokens; [] for none.
        mask_token_id : int
            Default: the checkpoint's.
        attention : str, default "dense"
            How denoising passes read the prefix: "dense", "losa", "quest" or "sparsed".
        budget, active, change_threshold, selector, drift, candidates, page_size, dense_layers
            Of the attention method: see :class:`losart.AttentionConfig`.
        first_pass, commit, planner
            Of the attention method: see :class:`losart.AttentionConfig`.

        Returns
        -------
        GenerationResult, or a list of them for a list of prompts

        Raises
        ------
        OptionError
            An option is unknown, out of range, or does not go with another.
        PromptError
            The prompt is empty, too long, out of the vocabulary, or needs a tokenizer or a chat
            template that the checkpoint has not; of a list with its index.
        NumericalError
            The logits are not finite.
        OutOfMemoryError
            The KV cache does not fit.
        """
        if not is_batch(prompt):
            return self._submit(self._engine, prompt, progress, observer, options).result()
        # Where somebody observes, who could not tell one prompt's steps from another's, one after another.
        runner = self._engine.runner
        count = runner.max_sequences if observer is None else 1
        engine = Engine(runner, count, KVPool(HELD_PREFIXES), prefill_first=True)
        streams = []
        for index, one in enumerate(prompt):
            try:
                streams.append(self._submit(engine, one, progress, observer, options, each_step=False))
            except PromptError as error:
                raise PromptError(f"prompt {index}: {error}") from error
        for stream in streams:
            stream.start()
        return [stream.result() for stream in streams]

    def _submit(
        self,
        engine: Engine,
        prompt: Any,
        progress: Progress | None,
        observer: Observer | None,
        options: dict[str, Any],
        each_step: bool = True,
    ) -> Stream:
        config = generation_config(self.config, options)
        decode = self.tokenizer.decode if self.tokenizer else None
        engine.check(config, decode)
        grammar = None if config.structure is None else self._grammars.matcher(*config.structure)
        ids = prompt_ids(prompt, self.config, self.tokenizer, self.chat_template)
        return engine.submit(
            ids,
            config,
            decode=decode,
            observer=observer,
            progress=progress,
            each_step=each_step,
            grammar=grammar,
        )

    def stream(
        self,
        prompt: Prompt,
        *,
        progress: Progress | None = None,
        observer: Observer | None = None,
        **options: Any,
    ) -> Stream:
        """Generate from one prompt, giving a `Step` after each denoising pass.

        Options and errors are those of `generate`; errors of the options and the prompt are raised
        at once, before the first step is asked for.
        """
        return self._submit(self._engine, prompt, progress, observer, options)

    def score(
        self,
        prompt: Prompt | Sequence[Prompt],
        continuation: Continuation | Sequence[Continuation],
        *,
        samples: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Score | list[Score]:
        """How probable the model finds a continuation of a prompt, or each of a list.

        log p(continuation | prompt) is a sum over blocks, each given the prompt and the blocks before it. Of
        one it is the log-probability with which decoding that fixes a token per pass from left to right
        (`remasking="sequential"`, temperature 1) gives these tokens: each token given those before it, and
        masks in its own place and after it. It is exact and not random.

        With `samples` the tokens of each block are fixed in so many random orders, and the result is the mean
        log-probability: an unbiased estimate of the bound that these models are trained by (arXiv 2502.09992,
        2503.09573), which is never above the log-probability of decoding in an order that is drawn.

        What follows the last token is not asked for: those positions are masked in all passes.

        Parameters
        ----------
        prompt : str, list of dict, list of int, or a list of these
        continuation : str or list of int, or a list of as many
            Two texts are tokenized together, unless that changes the prompt's tokens.
        samples : int, optional
            Orders of each block's tokens.
        seed : int
            Of the orders.
        attention, block_length, sub_block_length, mask_token_id, ...
            As of `generate`, with the options of the attention method.

        Returns
        -------
        Score, or a list of them for a list of prompts

        Raises
        ------
        OptionError
            An option is none of these, or out of range.
        PromptError
            As of `generate`; or the continuation is empty, or does not fit.
        NumericalError, OutOfMemoryError
            As of `generate`.
        """
        runner = self._engine.runner
        texts = self.tokenizer, self.chat_template
        return score(runner, *texts, prompt, continuation, samples, seed, options)

    def session(self, **options: Any) -> Session:
        """A session: generations with these options, each reusing what the one before it left.

        Options and their errors are those of `generate`.
        """
        return Session(self._engine.runner, self.tokenizer, self.chat_template, options, self._grammars)


def load(
    model: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    *,
    progress: Progress | None = None,
    deterministic: bool = False,
    weights: str = "auto",
    kv: str = "auto",
    adapter: str | os.PathLike[str] | None = None,
    merge: str = "dtype",
    activations: str = "auto",
) -> Model:
    """Load a checkpoint.

    Parameters
    ----------
    model : str or path, optional
        A checkpoint directory, a GGUF file, or a hub id ("org/name"; works offline from the hub's cache).
        Without one, the small checkpoint that comes with losart; its README.md says what it can do.
    device : {"auto", "cpu", "cuda"}
        "auto" takes CUDA where it works, else the CPU.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        In which weights are held, and keys and values with `kv="auto"`; "auto" is the checkpoint's own.
        Arithmetic is float32 on the CPU. Matrices of integers of 4 or 8 bits stay as the checkpoint has them,
        on a GPU with a dtype of 16 bits, and there 8-bit floating-point ones too.
    progress : callable, optional
        Called after each layer's weights with the layers loaded and in all.
    deterministic : bool
        Generations that share passes and beginnings give bit for bit what each gives alone, which is slower:
        twice with 128 sequences on a GPU. Else sums may be rounded otherwise.
    weights : {"auto", "int8", "int4", "fp8"}
        Round the matrices of all layers to 8 bits, with a scale per row, or to 4 bits, with one per 64
        columns, and the head to int8, on a GPU the embedding too. "auto" leaves all as it is. The CPU holds
        what is rounded to fp8 in the format of `dtype`, and a GPU all with a dtype of float32.
    kv : {"auto", "int8", "fp8"}
        Hold keys and values of the prefix in 8 bits, with a float32 scale for each key, and each value, of a
        kv head: `head_dim + 4` bytes in place of `2 * head_dim` in 16 bits, which is about half the memory,
        and half the bytes that attention reads. The block that is being denoised is attended as it is
        without, and page bounds are bounds of what is held. "int8" rounds a channel by at most 1/254 of the
        largest one of its key or value, "fp8" (e4m3) by up to 1/16 of itself, or more where it is small:
        "int8" is usually the more accurate. "auto" holds them in `dtype`.
    adapter : str or path, optional
        A LoRA as PEFT writes it: a directory, or a hub id. It is merged while the weights are loaded, in
        float32, and each sum is rounded once, to what its matrix is held in. Matrices that it leaves as they
        are stay mapped.
    merge : {"dtype", "codes"}
        What becomes of a quantized matrix that is adapted: it is held in the format of `dtype`, or has new
        codes in its own format and groups, which loses what of the adapter is less than half a step.
    activations : {"auto", "fp8"}
        In which more than 64 tokens at a time, of a prompt or of many sequences, are multiplied by matrices
        that are held in fp8 (e4m3). "fp8" rounds what enters such a product to e4m3 too, with a scale for
        each token, by up to 1/16 of itself or more where it is small, on a GPU of compute capability 9.0 and
        where the weights' scales are of whole rows or of multiples of 128 columns. Everywhere else, and with
        "auto", activations are of 16 or 32 bits.

    Raises
    ------
    OptionError
        There is no such dtype, format of weights, of activations, or of keys and values, the checkpoint is
        quantized and `weights` is not "auto", groups of 64 columns do not divide a matrix, or
        `activations="fp8"` is to be deterministic.
    CheckpointError, TensorError, ConfigError
        See `losart.errors`: the message names the file, the tensor or the key.
    DeviceError
        The device is missing.
    """
    checkpoint = open_checkpoint(model, adapter)
    return Model(checkpoint, device, dtype, progress, deterministic, weights, kv, merge, activations)


def generate(
    model: str | os.PathLike[str] | Model | None,
    prompt: Prompt | Sequence[Prompt],
    *,
    device: str = "auto",
    dtype: str = "auto",
    weights: str = "auto",
    kv: str = "auto",
    adapter: str | os.PathLike[str] | None = None,
    **options: Any,
) -> GenerationResult | list[GenerationResult]:
    """Load a checkpoint and generate from it: `load` and `Model.generate` in one.

    `model` is what `load` takes, None for the checkpoint that comes with losart, or a `Model`.

    To generate more than once, load the model once and call its `generate`.
    """
    if isinstance(model, Model):
        return model.generate(prompt, **options)
    loaded = load(model, device, dtype, weights=weights, kv=kv, adapter=adapter)
    return loaded.generate(prompt, **options)
