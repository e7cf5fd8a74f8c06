"""The one model definition. Only this package imports Flax Linen; everybody else sees dicts."""
