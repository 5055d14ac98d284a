"""Models of other libraries, switched to rope_cupy by one call."""
