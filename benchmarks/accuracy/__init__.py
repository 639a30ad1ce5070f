"""What attention methods cost in accuracy."""
