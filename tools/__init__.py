"""What `make gpu-check` is made of: programs that run tests and tools on a GPU, and leave logs, JSON and a short table.

Each works with whatever Python and torch it is started with, and installs nothing.
"""
