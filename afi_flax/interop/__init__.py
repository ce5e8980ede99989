"""Doors to other tools: weights that come from them, and networks that go there."""
