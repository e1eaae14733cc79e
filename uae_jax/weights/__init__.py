"""Weight tables, one a model, and the engine that reads them in both directions."""
