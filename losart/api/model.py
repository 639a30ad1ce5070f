"""A loaded model, and what a user calls on it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from losart.api.prompts import Prompt, is_batch
from losart.api.session import Session
from losart.backends import make_backend
from losart.config.model import DTYPES, ModelConfig
from losart.errors import OptionError
from losart.loaders import ChatTemplate, Checkpoint, Tokenizer, open_checkpoint
from losart.models.transformer import Transformer
from losart.observe.observation import Observer, Progress
from losart.observe.results import GenerationResult, Step


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
        In which weights, keys and values are held.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "auto",
        dtype: str = "auto",
        progress: Progress | None = None,
    ) -> None:
        if dtype not in ("auto", *DTYPES):
            raise OptionError(f"dtype must be auto, {', '.join(DTYPES)}, not {dtype!r}")
        self.config: ModelConfig = checkpoint.config
        self.tokenizer: Tokenizer | None = checkpoint.tokenizer
        self.chat_template: ChatTemplate | None = checkpoint.chat_template
        self.dtype = checkpoint.dtype if dtype == "auto" else dtype
        backend = make_backend(device, self.config, self.dtype)
        self.device = backend.name
        self._transformer = Transformer(self.config, checkpoint.tensors, backend, progress)

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        progress: Progress | None = None,
        observer: Observer | None = None,
        **options: Any,
    ) -> GenerationResult | list[GenerationResult]:
        """Generate from a prompt, or from each of a list of prompts.

        Parameters
        ----------
        prompt : str, list of dict, list of int, or a list of these
            Text; chat messages ({"role": ..., "content": ...}), rendered by the checkpoint's chat
            template; or token ids.
        progress : callable, optional
            Called during prefill with the prompt tokens done and in all.
        observer : callable, optional
            Called after each pass over a block with an `ObservedPass`: the block, and which tokens
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
        stop : str or list of str
            Ends the generation; the text is cut before it.
        stop_token_ids : list of int
            Ends the generation. Default: the checkpoint's end tokens; [] for none.
        mask_token_id : int
            Default: the checkpoint's.
        attention : str, default "dense"
            How denoising passes read the prefix: "dense", "losa", "quest" or "sparsed".
        budget : int, default 256
            Prefix positions that each query selects.
        active : int or float, default 5
            losa: recomputed tokens of a block, a count or a fraction; 0 reuses all results.
        selector : {"quest", "anchor"}, default "quest"
            losa: what ranks the pages for a recomputed token's queries: QUEST's bound, or the
            attention mass of the pages in the dense first pass.
        drift : {"previous", "refresh"}, default "previous"
            losa: whether the change of a token's query is measured against the previous pass, or
            against the pass in which the token's stored result was computed.
        candidates : {"all", "masked"}, default "all"
            losa: which tokens can be recomputed: all, or only those that are still masked. With
            "masked" a pass recomputes fewer than `active` where fewer are masked, so that not even
            `active=1.0` and a budget of everything is dense attention.
        page_size : int, default 16
            Positions selected together, a multiple of 16 up to 65536.
        dense_layers : int, default 0
            This many first layers stay dense.
        first_pass : {"auto", "dense", "sparse"}, default "auto"
            How the first pass over a block reads the prefix; "auto" is dense for losa and sparsed,
            sparse for quest. "sparse" goes neither with sparsed nor with `selector="anchor"`.
        commit : {"dense", "sparse"}, default "dense"
            How the pass that commits a finished block reads the prefix.
        planner : {"auto", "device", "host"}, default "auto"
            Where a GPU's tokens and pages are selected; the same ones are. "auto" takes the faster. It
            makes no difference on the CPU.

        Returns
        -------
        GenerationResult, or a list of them for a list of prompts

        Raises
        ------
        OptionError
            An option is unknown, out of range, or does not go with another.
        PromptError
            The prompt is empty, too long, out of the vocabulary, or needs a tokenizer or a chat
            template that the checkpoint has not.
        NumericalError
            The logits are not finite.
        OutOfMemoryError
            The KV cache does not fit.
        """
        if is_batch(prompt):
            return [self._generate(one, progress, observer, options) for one in prompt]
        return self._generate(prompt, progress, observer, options)

    def _generate(
        self,
        prompt: Any,
        progress: Progress | None,
        observer: Observer | None,
        options: dict[str, Any],
    ) -> GenerationResult:
        return self.session(**options).generate(prompt, progress=progress, observer=observer)

    def stream(
        self,
        prompt: Prompt,
        *,
        progress: Progress | None = None,
        observer: Observer | None = None,
        **options: Any,
    ) -> Iterator[Step]:
        """Generate from one prompt, giving a `Step` after each denoising pass.

        Options and errors are those of `generate`; errors of the options and the prompt are raised
        at once, before the first step is asked for.
        """
        return self.session(**options).stream(prompt, progress=progress, observer=observer)

    def session(self, **options: Any) -> Session:
        """A session: generations with these options, each prompt reusing the KV cache of those before.

        Options and their errors are those of `generate`.
        """
        return Session(self._transformer, self.tokenizer, self.chat_template, options)


def load(
    model: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    *,
    progress: Progress | None = None,
) -> Model:
    """Load a checkpoint.

    Parameters
    ----------
    model : str or path, optional
        A checkpoint directory, or a hub id ("org/name"; works offline from the hub's cache). Without
        one, the small checkpoint that comes with losart; its README.md says what it can do.
    device : {"auto", "cpu", "cuda"}
        "auto" takes CUDA where it works, else the CPU.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        In which weights, keys and values are held; "auto" is the checkpoint's own. Arithmetic is
        float32 on the CPU.
    progress : callable, optional
        Called after each layer's weights with the layers loaded and in all.

    Raises
    ------
    CheckpointError, TensorError, ConfigError
        See `losart.errors`: the message names the file, the tensor or the key.
    DeviceError
        The device is not there.
    """
    return Model(open_checkpoint(model), device, dtype, progress)


def generate(
    model: str | os.PathLike[str] | Model | None,
    prompt: Prompt | Sequence[Prompt],
    *,
    device: str = "auto",
    dtype: str = "auto",
    **options: Any,
) -> GenerationResult | list[GenerationResult]:
    """Load a checkpoint and generate from it: `load` and `Model.generate` in one.

    `model` is what `load` takes, None for the checkpoint that comes with losart, or a `Model`.

    To generate more than once, load the model once and call its `generate`.
    """
    loaded = model if isinstance(model, Model) else load(model, device, dtype)
    return loaded.generate(prompt, **options)
