"""The page at /: one file without anything from outside, and what it must know of the server."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from pathlib import Path
from typing import Any

from starlette.responses import HTMLResponse

from losart.api.model import Model
from losart.attention import POLICIES
from losart.config.options import generation_config

FILE = Path(__file__).with_name("page.html")
TOLD = (  # of options
    *("max_new_tokens", "temperature", "block_length", "confidence_threshold", "editing_threshold"),
    *("budget", "change_threshold"),
)


def page() -> HTMLResponse:
    """The page, with a policy by which the browser loads and runs nothing but what is in it."""
    html = FILE.read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _digests("script", html),
        "style-src": _digests("style", html),
        "img-src": "data:",  # the icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(html, headers=headers)


def _digests(tag: str, html: str) -> str:
    found = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in found]
    return " ".join(f"'sha256-{one}'" for one in digests)


def about(model: Model, options: dict[str, Any]) -> dict[str, Any]:
    """What losart tells beyond OpenAI's API: device, dtype, whether it chats, attention methods, defaults."""
    config = generation_config(model.config, options)
    values = vars(config) | vars(config.attention)
    defaults = {name: values[name] for name in TOLD if math.isfinite(values[name])}
    return {
        "device": model.device,
        "dtype": model.dtype,
        "chat": model.tokenizer is not None and model.chat_template is not None,
        "attention": list(POLICIES),
        "options": {"attention": config.attention.method, **defaults},
    }
