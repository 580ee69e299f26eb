"""Site of a federation: trainer process, rules for what leaves the site, budget and audit log."""
