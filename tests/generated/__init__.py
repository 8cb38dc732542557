"""Programs that nobody chose: drawn modules with gates, look-alikes without, and an oracle that knows no form."""
