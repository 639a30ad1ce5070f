"""What a generation tells on its way: steps, traces, pictures."""
