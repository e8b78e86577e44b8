"""Callbacks of the Trainer: topology, kernels, throughput, epochs, history."""
