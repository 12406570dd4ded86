"""The chat in the browser: ask questions about long videos, and see what the answers rest on."""
