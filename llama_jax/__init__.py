"""The LLaMA family in JAX."""
