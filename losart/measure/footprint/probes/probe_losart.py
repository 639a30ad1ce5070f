"""One process of losart up to the first token, and on to the last."""

from __future__ import annotations

from process_stages import Stages


def main() -> None:
    stages = Stages()
    import losart

    if stages.device == "cuda":
        import cupy
    stages.end("import")
    if stages.device == "cuda":
        cupy.cuda.runtime.free(0)  # what makes the device's context
        stages.device_memory = lambda: -cupy.cuda.runtime.memGetInfo()[0]
    stages.end("context")
    model = losart.load(stages.checkpoint, device=stages.device)
    stages.end("load")
    request = stages.request
    stream = model.stream(
        stages.prompt(),
        max_new_tokens=request["new_tokens"],
        block_length=request["block_length"],
        mask_token_id=request["mask_token_id"],
        confidence_threshold=request["confidence_threshold"],
        stop_token_ids=[],
    )
    steps = [next(stream)]
    stages.end("first token")
    steps += stream
    stages.end("generate")
    result = steps[-1].result
    assert result is not None
    stages.report(result.token_ids, model.matrix_bytes, {model.kv: result.stats.kv_bytes})
