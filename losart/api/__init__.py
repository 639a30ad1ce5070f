"""What a user calls: loading a model, generating, sessions, conversations."""
