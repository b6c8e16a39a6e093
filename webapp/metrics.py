"""What /metrics reports, in a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120)

REQUESTS = Counter("totarget_requests", "Requests to /v1/completions, by status", ["status"], registry=REGISTRY)
TOKENS = Counter("totarget_tokens", "Tokens of prompts and of completions", ["kind"], registry=REGISTRY)
WAITING = Gauge("totarget_waiting_sequences", "Sequences in the queue", registry=REGISTRY)
RUNNING = Gauge("totarget_running_sequences", "Sequences in the batch", registry=REGISTRY)
BATCH_SIZE = Histogram(
    "totarget_batch_size", "Sequences in a step of the model", buckets=(1, 2, 4, 8, 16, 32), registry=REGISTRY
)
FIRST_TOKEN_S = Histogram(
    "totarget_first_token_seconds", "From a request to its first token", buckets=SECONDS, registry=REGISTRY
)


def n_sequences() -> dict[str, int]:
    """The sequences that run and wait in the engines of all versions."""
    return {name: int(REGISTRY.get_sample_value(f"totarget_{name}_sequences") or 0) for name in ("running", "waiting")}
