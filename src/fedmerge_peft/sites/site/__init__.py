"""Site of a federation: the trainer, its process and connection, and the audit log."""
