"""What the report's page runs: one script, which reads the page's data and writes text, never markup."""
