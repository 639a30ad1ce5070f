"""One process of losart up to the first token; started by cuda_first_token.py."""

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
    stages.end("context")
    model = losart.load(stages.checkpoint, device=stages.device)
    stages.end("load")
    step = next(model.stream(stages.prompt()))
    stages.end("first token")
    stages.report(next(token for token in step.block if token is not None))


if __name__ == "__main__":
    main()
