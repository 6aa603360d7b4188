"""The command `lemo-fx`. Whatever is wrong with what it is given is raised as a LemoError, and printed in one line."""
