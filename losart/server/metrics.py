"""What a server tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from losart.api.engine import Engine
from losart.observe.step import GenerationResult

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


class Metrics:
    """Counts requests and answers, and reads the engine's figures when it is asked."""

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "losart_requests", "Requests that were answered", ["path", "status"], registry=registry
        )
        self._ended = Counter(
            "losart_generations", "Generations that have ended, by why", ["reason"], registry=registry
        )

        def seconds(name: str, of: str) -> Histogram:
            return Histogram(f"losart_{name}_seconds", of, buckets=SECONDS, registry=registry)

        self._queue = seconds("queue", "From a generation's start to its first pass")
        self._first_token = seconds("first_token", "From a request's headers to its first token")
        self._took = seconds("generation", "From a request's headers to an answer's end")
        self._rate = Histogram(
            "losart_answer_tokens_per_second",
            "New tokens of an answer over the seconds of its passes over blocks",
            buckets=RATES,
            registry=registry,
        )
        ProcessCollector(registry=registry)
        registry.register(EngineCollector(engine))

    def answered(self, path: str, status: int) -> None:
        """Count a request."""
        self._requests.labels(path, str(status)).inc()

    def ended(self, reason: str, count: int = 1) -> None:
        """Count generations: "stop", "length", "error", "timeout" or "cancelled"."""
        self._ended.labels(reason).inc(count)

    def finished(self, result: GenerationResult, before: float, seconds: float) -> None:
        """Count a generation that has a result; `before` seconds of its request passed without it."""
        self.ended(result.finish_reason)
        stats = result.stats
        self._queue.observe(stats.queue_seconds)
        if stats.first_token_seconds is not None:
            self._first_token.observe(before + stats.first_token_seconds)
        self._took.observe(seconds)
        if stats.tokens_per_second:
            self._rate.observe(stats.tokens_per_second)

    def text(self) -> bytes:
        """All of them, in Prometheus' format."""
        return generate_latest(self._registry)


class EngineCollector(Collector):
    """An engine's figures at the moment at which they are read."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Each figure."""
        stats = self._engine.stats
        gauges = {
            "running": ("Generations under way", stats.running),
            "waiting": ("Generations that wait for a place, memory or another's prefill", stats.waiting),
            "kv_memory_limit_bytes": ("What keys and values may take", stats.kv_memory),
            "batch_size": ("Generations that a pass over blocks was of, on average", stats.mean_sequences),
            "tokens_per_second": (
                "New tokens over the seconds of passes over blocks",
                stats.tokens_per_second,
            ),
            "density": ("Share of the prefix that passes over blocks read", stats.density),
            "experts_used": ("Experts of a layer that a pass over blocks used", stats.experts_used),
        }
        for name, (of, value) in gauges.items():
            if value is not None:
                yield GaugeMetricFamily(f"losart_{name}", of, value)
        memory = GaugeMetricFamily("losart_kv_bytes", "Memory of keys and values", labels=["state"])
        for state in ("in_use", "shared", "held"):
            memory.add_metric([state], getattr(stats, f"kv_bytes_{state}"))
        yield memory
        counters = {
            "prefilled_tokens": ("Tokens of prompts that went through the model", stats.prefilled_tokens),
            "reused_tokens": ("Tokens of prompts whose keys and values were there", stats.reused_tokens),
            "new_tokens": ("Tokens of answers", stats.new_tokens),
            "passes": ("Passes over blocks", stats.passes),
            "pass_sequences": ("Generations in them, in all", stats.mean_sequences * stats.passes),
            "pass_seconds": ("Seconds in them", stats.decode_seconds),
            "set_back": ("Generations that gave their memory up and waited", stats.set_back),
        }
        for name, (of, value) in counters.items():
            yield CounterMetricFamily(f"losart_{name}", of, value)
