"""The plain torch policy: one process, one device, packed sequences."""
