"""Measurements at full size; each writes one JSON document, which is committed under `results/`."""
