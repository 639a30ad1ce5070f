"""Times on the CPU."""
