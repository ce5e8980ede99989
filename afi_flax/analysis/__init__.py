"""What can be said of a network: its cost, before it is trained."""
