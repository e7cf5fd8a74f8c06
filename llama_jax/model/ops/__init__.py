"""The model's mathematics as pure functions of arrays."""
