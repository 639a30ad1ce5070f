"""One process of torch + transformers up to the first token, and on to the last.

The generation is losart's default, greedy block diffusion with low-confidence dynamic remasking, as
SDAR's public generate.py has it (arXiv 2510.06303), or as Fast-dLLM v2 (arXiv 2509.26328) where a row
predicts the next token: Qwen3 or Llama with SDPA and a cache; prefill without logits of the prompt.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from process_stages import Stages


def main() -> None:
    stages = Stages()
    import torch
    import transformers
    from transformers import DynamicCache

    config = json.loads((Path(stages.checkpoint) / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    stages.end("import")
    if stages.device == "cuda":
        torch.cuda.mem_get_info()  # what makes the device's context, and nothing else yet
        stages.device_memory = lambda: -torch.cuda.mem_get_info()[0]
    stages.end("context")
    model = kind.from_pretrained(stages.checkpoint, dtype="auto", attn_implementation="sdpa")
    model = model.to(stages.device).eval()
    stages.end("load")
    tokens: list[int] = []
    cache = DynamicCache()
    with torch.inference_mode():
        passes = generate(model, stages.prompt(), stages.request, cache, tokens.extend)
        next(passes)
        stages.end("first token")
        for _ in passes:
            pass
    stages.end("generate")
    tensors = (*model.parameters(), *model.buffers())
    weights = held(tensor for tensor in tensors if tensor.dim() > 1)
    kv = held(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    stages.report(tokens[: stages.request["new_tokens"]], weights, kv)


def held(tensors: Iterable[Any]) -> dict[str, int]:
    """Bytes by format."""
    sizes = Counter[str]()
    for tensor in tensors:
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return sizes


def generate(
    model: Any, prompt: list[int], request: dict[str, Any], cache: Any, take: Callable[[list[int]], None]
) -> Iterator[None]:
    """Decode block by block; stops after each denoising pass, and hands over finished blocks."""
    import torch

    length, mask_id = request["block_length"], request["mask_token_id"]

    def forward(ids: Any, start: int, mask: Any, **options: Any) -> Any:
        positions = torch.arange(start, start + len(ids), device=model.device)
        return model(
            ids[None],
            attention_mask=mask[None, None],
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
            **options,
        ).logits[0]

    def likeliest(rows: Any) -> tuple[Any, Any]:
        rows = rows.float()
        rows[:, mask_id] = -torch.inf
        return rows.softmax(-1).max(-1)

    prompt_ids, first = torch.tensor(prompt, device=model.device), None
    whole = len(prompt) // length * length
    if whole:
        block = torch.arange(whole, device=model.device) // length
        last = forward(prompt_ids[:whole], 0, block[:, None] >= block[None, :], logits_to_keep=1)
        first = likeliest(last)[1] if request["shifted"] and whole == len(prompt) else None
    end = len(prompt) + request["new_tokens"]
    for start in range(whole, end, length):
        sees_all = torch.ones(length, start + length, dtype=torch.bool, device=model.device)
        ids = torch.full((length,), mask_id, device=model.device)
        known = prompt_ids[start:]
        ids[: len(known)] = known
        masked = torch.arange(length, device=model.device) >= len(known)
        if first is not None:
            ids[0], masked[0] = first[0], False
        while bool(masked.any()):
            confidence, tokens = likeliest(forward(ids, start, sees_all))
            cache.crop(-length)
            if request["shifted"]:
                confidence, tokens = confidence.roll(1), tokens.roll(1)
            confidence = confidence.masked_fill(~masked, -1)
            fixed = confidence > request["confidence_threshold"]
            fixed[confidence.argmax()] = True
            ids = torch.where(fixed, tokens, ids)
            masked &= ~fixed
            if not bool(masked.any()):
                take(ids[len(known) :].tolist())
                if start + length < end:
                    last = forward(ids, start, sees_all, logits_to_keep=1)
                    first = likeliest(last)[1] if request["shifted"] else None
            yield
