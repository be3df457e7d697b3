"""Steps whose state lives on a device: one array in, tokens out later, nothing waits between."""
