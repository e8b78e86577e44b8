"""What a model, a checkpoint or a run is like: facts, tables, cards, pictures, estimates."""
