"""One process of transformers up to the first token; started by cuda_first_token.py."""

from __future__ import annotations

from process_stages import Stages


def main() -> None:
    stages = Stages()
    import torch
    from transformers import Qwen3ForCausalLM

    stages.end("import")
    torch.zeros(1, device=stages.device)
    stages.end("context")
    model = Qwen3ForCausalLM.from_pretrained(stages.checkpoint, dtype=torch.bfloat16).to(stages.device)
    model.eval()
    stages.end("load")
    with torch.inference_mode():
        ids = torch.tensor([stages.prompt()], device=stages.device)
        token = int(model(ids, logits_to_keep=1).logits[0, -1].argmax())
    stages.end("first token")
    stages.report(token)


if __name__ == "__main__":
    main()
