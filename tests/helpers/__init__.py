"""What several files of tests use; files of tests do not import one another."""
