"""One model, its engine, and what answers requests with them."""

from __future__ import annotations

from losart.api.engine import Engine
from losart.api.model import Model
from losart.loaders.tokenizer import prompt_ids
from losart.server import protocol, tools
from losart.server.driver import Driver, Submission
from losart.server.errors import ApiError
from losart.server.metrics import Metrics
from losart.server.settings import Settings


class Service:
    """What all requests have in common."""

    def __init__(self, model: Model, engine: Engine, settings: Settings) -> None:
        self.model = model
        self.engine = engine
        self.settings = settings
        self.driver = Driver(engine, settings.queue)
        self.metrics = Metrics(engine)

    def check_name(self, name: str) -> None:
        """See that a model has this name."""
        if name not in self.settings.names:
            message = f"The model '{name}' does not exist; there is: {', '.join(self.settings.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def submissions(self, asked: protocol.Request) -> list[Submission]:
        """The generations that a request asks for; takes as long as its prompts are."""
        model, longest = self.model, self.settings.longest_prompt
        if (offered := asked.offered) is not None:
            tools.check_template(model.chat_template)
        options, made = asked.options(model.config, self.settings.options), list[Submission]()
        for prompt in asked.prompts:
            ids = prompt_ids(prompt, model.config, model.tokenizer, model.chat_template, offered)
            if longest is not None and len(ids) > longest:
                message = f"the prompt has {len(ids)} tokens; this server takes {longest}"
                raise ApiError(400, message, code="context_length_exceeded")
            for choice in range(asked.choices):
                seed = options.get("seed")
                own = {} if seed is None else {"seed": (seed + choice) % protocol.SEEDS}
                made.append(Submission(ids, options | own))
        return made
