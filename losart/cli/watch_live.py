"""The block that is being denoised, redrawn in place by rich (extra `watch`)."""

from __future__ import annotations

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from losart.cli.watch import Watch, active_layers, largest_changes, shown
from losart.config.options import AttentionConfig
from losart.loaders import Tokenizer
from losart.observe.step import Step

TEXT_LINES = 6  # of the text before the block
FIXED, EDITED = "bold green", "bold magenta"
LEGEND = (
    ("masked", "dim"),
    ", ",
    ("fixed in this pass", FIXED),
    ", ",
    ("changed in it", EDITED),
    "; below: in how many layers the token ",
    ("was active", "cyan"),
)


class LiveWatch(Watch):
    """An observer that redraws the block after each pass, below the end of the text so far."""

    def __init__(self, tokenizer: Tokenizer | None, attention: AttentionConfig) -> None:
        super().__init__(tokenizer, attention)
        self._live = Live(console=Console(), auto_refresh=False)

    def __call__(self, step: Step) -> None:
        """Draw one pass."""
        self._live.start()  # with the first pass: progress is shown on the same terminal before it
        self._live.update(self._drawing(step), refresh=True)

    def close(self) -> None:
        """Remove the drawing."""
        self._live.transient = True
        self._live.stop()

    def __exit__(self, *_: object) -> None:
        self._live.stop()  # what was interrupted leaves its last drawing

    def _drawing(self, step: Step) -> Group:
        layers, changes = len(step.layers), largest_changes(step)
        cells = []
        rows = zip(step.block, self.words(step), active_layers(step), strict=True)
        for index, (token, word, active) in enumerate(rows):
            style = "dim" if token is None else FIXED if index in step.fixed else ""
            style = EDITED if index in step.edited else style
            count = (f"{active}/{layers}", "cyan" if active else "dim")
            change = f"\n{shown(changes[index])}" if changes else "\n"
            cells.append(Text.assemble((word, style), "\n", count, (change, "dim")))
        text = Text(self.text[-TEXT_LINES * self._live.console.width :])
        summary = Text(self.summary(step), "bold")
        legend = Text.assemble(*LEGEND, f", and the {self.of_changes()}" if changes else "")
        return Group(text, summary, Columns(cells, equal=True), legend)
