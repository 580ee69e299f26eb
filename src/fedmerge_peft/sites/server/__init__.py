"""The server side of a federation across sites."""
