"""Annotation: labels for the cells of a store, and figures of how good they are."""
