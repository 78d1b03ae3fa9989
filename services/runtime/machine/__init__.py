"""Resources of the machine and this process: cores, memory, compiled modules."""
