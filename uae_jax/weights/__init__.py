"""Weight tables, one per model, and the engine that uses them for import and export."""
