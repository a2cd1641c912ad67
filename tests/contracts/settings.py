"""How many examples hypothesis draws: each is a transaction or two on a real node."""

from hypothesis import HealthCheck, settings

# ape reverts the chain by function-scoped fixtures; examples that write isolate themselves.
few = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
