"""The chat command."""
