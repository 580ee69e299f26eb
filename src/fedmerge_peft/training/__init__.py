"""What one client does in one round."""
