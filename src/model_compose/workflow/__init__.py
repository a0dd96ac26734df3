"""Workflows: jobs in a graph. Knows components by a callable that it is handed, and neither files nor servers."""
