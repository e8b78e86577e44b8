"""Checkpoints: saved whole, resumed, inspected, exported, pushed to the Hub."""
