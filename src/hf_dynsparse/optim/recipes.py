"""Recipes of fine-tuning: learning rate and epochs by what the topology does meanwhile."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Defaults of one fine-tuning mode; `taught_rate` instead where hidden states of a teacher are learned."""

    learning_rate: float
    num_train_epochs: float
    does: str
    taught_rate: float | None = None


# Locked patterns want three to five times the learning rate of dense models, and more epochs: arXiv:2111.05754
# (appendix) and arXiv:2203.07259 (section 4) agree.
FINETUNE_MODES = {
    "locked": Recipe(2e-4, 8.0, "the pattern stays fixed, only active blocks train", taught_rate=5e-4),
    "dense": Recipe(5e-5, 3.0, "the model is made dense first: zeros become trainable weights"),
    "dynamic": Recipe(2e-4, 8.0, "the pattern keeps evolving by topology updates"),
    "gradual": Recipe(1e-4, 8.0, "a dense checkpoint is pruned step by step while it trains, and locked at the end"),
}


# Of a model that has been fine-tuned: arXiv:2111.05754, appendix.
QUANTIZATION_AWARE = Recipe(1e-5, 3.0, "the pattern stays fixed, weights and inputs are rounded to 8 bits")
