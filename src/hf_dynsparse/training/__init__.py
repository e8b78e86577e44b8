"""Training: the Trainer, its arguments and callbacks, fine-tuning, many processes, saving."""
