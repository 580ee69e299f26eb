"""The site side of a federation across sites."""
