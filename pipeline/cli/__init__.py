"""The command line: each verb, what it reads and what it prints."""
