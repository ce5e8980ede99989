"""What can be said of a network: what it costs, before it is trained, and what it has learned."""
