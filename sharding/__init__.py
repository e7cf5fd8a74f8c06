"""Meshes, the rules that place logical axes on them, and the placements; knows no model."""
