"""Around a tiny policy's actor."""

from actor_fixtures import case, encoder, sequences, topology  # noqa: F401 - fixtures
