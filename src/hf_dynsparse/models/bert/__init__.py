"""DynSparse BERT: configuration and models."""
