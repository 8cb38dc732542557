"""Programs that nobody chose, and an oracle that knows no form."""
