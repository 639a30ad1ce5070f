"""An HTTP server that speaks OpenAI's API: `losart serve`. Needs the extra `serve`."""
