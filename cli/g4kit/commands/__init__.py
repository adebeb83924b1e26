"""One file per verb or noun, each with its command as `command`: parse, call, print."""
