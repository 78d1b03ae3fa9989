"""What a serving process does before it imports the rest of itself."""

from services.runtime.machine import memory


def prepare() -> None:
    """Takes the faster malloc and the compiled modules, where they are there. May begin the process anew."""
    memory.use_tcmalloc()
    # After it, for what was imported before would be so twice.
    from services.runtime.machine import compiled

    compiled.use()
